"""Schemes of a grid that fit a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmcompressor_moe.evidence.gather import ModelShape, SchemeDoesNotFitError, model_shape
from llmcompressor_moe.quantization.schemes import UNQUANTIZED, Candidate, resolve_schemes
from llmcompressor_moe.sweep.grid import Grid

__all__ = ["Fitted", "fit_schemes"]


@dataclass(frozen=True)
class Fitted:
    """A grid whose schemes fit a model.

    :param candidates: its schemes
    :param shape: of the model, under them
    :param remark: what had to change for it; None: nothing
    """

    grid: Grid
    candidates: list[Candidate]
    shape: ModelShape
    remark: str | None = None


def fit_schemes(model: str | Path, grid: Grid) -> Fitted:
    """Schemes that nobody asked for get a group size that fits the model, or are left out.

    :param model: its directory
    :raises ValueError: something is wrong with the model, or a scheme that was asked for does not fit it
    """
    asked = "schemes" in grid.model_fields_set or grid.group_size is not None
    candidates = resolve_schemes(grid.schemes, grid.group_size, "schemes")
    try:
        return Fitted(grid, candidates, model_shape(model, candidates))
    except SchemeDoesNotFitError as error:
        if asked:
            raise
        names, size = [candidate.name for candidate in candidates if candidate.scheme], error.group_size
    if size is None:
        remark = f"{' and '.join(names)} are left out: no group size divides the inputs of all experts"
        grid = grid.model_copy(update={"schemes": [UNQUANTIZED]})
    else:
        remark = f"{' and '.join(names)} get groups of {size}, which divide the inputs of all experts"
        grid = grid.model_copy(update={"group_size": size})
    candidates = resolve_schemes(grid.schemes, grid.group_size, "schemes")
    return Fitted(
        grid, candidates, model_shape(model, candidates), f"{remark}; name schemes to choose others"
    )
