"""The tables by which transformers turns names of checkpoints into those of models, and back."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping

from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightTransform

__all__ = ["convert_like", "own_conversions", "own_mappings", "save_by", "source_patterns"]


def convert_like(model_type: str, other: str) -> None:
    """Give a family of our own the conversions of another, as transformers' own families share theirs.

    The public function makes transformers apply them to classes outside of itself. What it registers is not among
    the conversions that transformers defines, so nothing could restore it once others have overwritten it.
    """
    conversion_mapping._MODEL_TO_CONVERSION_PATTERN[model_type] = other
    _own_table.cache_clear()
    conversion_mapping.register_checkpoint_conversion_mapping(
        model_type, own_conversions(model_type), overwrite=True
    )


def own_conversions(model_type: str) -> list[WeightTransform] | None:
    """A family's conversions as transformers defines them, whoever has registered others; None without any.

    The public getter returns what was registered last.
    """
    return copy.deepcopy(_own_table().get(model_type))


@contextlib.contextmanager
def own_mappings() -> Iterator[None]:
    """Context in which every architecture has its own conversions, whoever has overwritten them.

    llm-compressor's ``load_quantizable_moe`` registers its own for good, and nothing unregisters them.
    """
    current = conversion_mapping._checkpoint_conversion_mapping_cache
    conversion_mapping._checkpoint_conversion_mapping_cache = (current or {}) | _own_table()
    try:
        yield
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache = current


@functools.cache
def _own_table() -> Mapping[str, list[WeightTransform]]:
    """All families' conversions. Making them compiles some 700 patterns; transformers hands out copies only."""
    return conversion_mapping._build_checkpoint_conversion_mapping()


def save_by(model: PreTrainedModel, conversions: list[WeightTransform]) -> None:
    """Have ``save_pretrained`` and ``revert_weight_conversion`` reverse these conversions.

    They look for an attribute that ``from_pretrained`` leaves behind. A model that was not loaded has none, one
    that was surgically changed has the wrong ones.
    """
    model._weight_conversions = conversions


def source_patterns(conversion: WeightTransform) -> list[str]:
    """Names in checkpoints that a conversion takes, as they were written.

    The public ``source_patterns`` are rewritten for matching.
    """
    return conversion._original_source_patterns
