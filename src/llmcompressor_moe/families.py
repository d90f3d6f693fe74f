"""The one table of exceptions: what the structure of a model cannot tell.

Everything else in this package reads a model's structure. A family enters this table only when the structure
is ambiguous or the family breaks a rule that all others keep, and every entry says why.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FamilyException", "exception_for"]


@dataclass(frozen=True)
class FamilyException:
    """What one family does differently.

    :param refuse_layer_drop: reason why an MoE layer of this family cannot be dropped, if so
    :param refuse_expert_drop: reason why experts of this family cannot be dropped, if so
    :param refuse_block_drop: reason why blocks of this family cannot be dropped, if so
    """

    refuse_layer_drop: str | None = None
    refuse_expert_drop: str | None = None
    refuse_block_drop: str | None = None


_EXCEPTIONS: dict[str, FamilyException] = {}


def exception_for(model_type: str) -> FamilyException:
    """Return the table's entry for a ``model_type``; families that keep all rules get an empty one."""
    return _EXCEPTIONS.get(model_type, FamilyException())
