"""Families for which llm-compressor's smoothing mappings change what the model computes: what the names of
modules cannot tell, with the reason. Found by comparing logits before and after; tests hold every entry.
"""

from __future__ import annotations

__all__ = ["wrong_mappings"]

_GATE_OF_ATTENTION = "attention reads its norm through a gate (`g_proj`) that they leave out"
_INDEXER = "the indexer of its attention reads the norm, and they leave it out"
_POSITIONS = (
    "attention reads its norm through a projection for relative positions (`r_proj`) that they leave out"
)

# model_type of the text config -> modifier -> reason.
_WRONG: dict[str, dict[str, str]] = {
    "gemma4_text": {
        "AWQModifier": "its norm after attention does not feed the experts, as they take for granted"
    },
    "glm_moe_dsa": {"AWQModifier": _INDEXER, "SmoothQuantModifier": _INDEXER},
    "inkling_text": {"AWQModifier": _POSITIONS, "SmoothQuantModifier": _POSITIONS},
    "laguna": {"AWQModifier": _GATE_OF_ATTENTION, "SmoothQuantModifier": _GATE_OF_ATTENTION},
}


def wrong_mappings(model_type: str, modifier: str) -> str | None:
    """Why llm-compressor's own mappings for a modifier are wrong for a family; None where they are not.

    :param model_type: the text config's ``model_type``
    :param modifier: class name of the modifier
    """
    return _WRONG.get(model_type, {}).get(modifier)
