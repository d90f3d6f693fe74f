"""Which points a sweep visits: read from YAML, checked before anything runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from llmcompressor_moe.quantization.schemes import SchemeSpec, resolve_schemes
from llmcompressor_moe.yaml_file import read_yaml

__all__ = ["Grid", "GridError", "Point", "Row", "load_grid"]


# Nobody measures or reads more; a slip in a grid of products asks for millions.
_MOST_POINTS = 10_000


class GridError(ValueError):
    """A grid cannot be used."""


class Point(BaseModel):
    """One variant of the model.

    :param blocks: blocks to drop
    :param layers: MoE layers to drop from the blocks that are left
    :param experts: experts to drop from each MoE layer that is left
    :param bits: mean bits per weight of the experts that are left; None leaves them as they are
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: int = Field(default=0, ge=0)
    layers: int = Field(default=0, ge=0)
    experts: int = Field(default=0, ge=0)
    bits: float | None = Field(default=None, gt=0, le=32)

    @property
    def name(self) -> str:
        """Short, distinct, and fit for a file name."""
        parts = [f"{self.blocks}b", f"{self.layers}l", f"{self.experts}e"]
        # A mean of 16 bits is chosen among schemes: not the same as nothing rounded.
        bits = "16" if self.bits is None else "16.0" if self.bits == 16 else _digits(self.bits)
        return "-".join([*parts, f"{bits}bit"])

    def __str__(self) -> str:
        def some(count: int, what: str) -> str:
            return f"{count} {what}{'s' if count > 1 else ''} dropped"

        said = [
            some(count, what)
            for count, what in (
                (self.blocks, "block"),
                (self.layers, "MoE layer"),
                (self.experts, "expert per layer"),
            )
            if count
        ]
        said = [text.replace("expert per layers", "experts per layer") for text in said]
        if self.bits is not None:
            said.append(f"{_digits(self.bits)} bits")
        return ", ".join(said) or "as it is"


def _digits(bits: float) -> str:
    """All of them: points that differ must not share a name."""
    return str(bits).removesuffix(".0")


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


class Row(BaseModel):
    """Points that differ in every combination of these values; a single value may stand without brackets."""

    model_config = ConfigDict(extra="forbid")

    # Strict: YAML's `yes` and `true` are no counts.
    blocks: list[StrictInt] = Field(default=[0], min_length=1)
    layers: list[StrictInt] = Field(default=[0], min_length=1)
    experts: list[StrictInt] = Field(default=[0], min_length=1)
    bits: list[float | None] = Field(default=[None], min_length=1)

    _lists = field_validator("*", mode="before")(_listed)

    @property
    def count(self) -> int:
        """Combinations, before any are made."""
        return math.prod(map(len, (self.blocks, self.layers, self.experts, self.bits)))

    def points(self) -> Iterator[Point]:
        """Every combination."""
        for blocks, layers, experts, bits in itertools.product(
            self.blocks, self.layers, self.experts, self.bits
        ):
            yield Point(blocks=blocks, layers=layers, experts=experts, bits=bits)


class Grid(BaseModel):
    """What a sweep tries.

    :param points: rows of values; the untouched model is always a point
    :param schemes: candidates for experts at a given mean of bits, weight-only
    :param group_size: replaces the group size of group-wise integer schemes
    :param block_metric: what blocks are dropped by: their similarity, or what the output loses without them
    :param layer_metric: the same for MoE layers
    :param criterion: what experts are dropped by
    :param scope: ``global`` pools the experts of all layers; layers then differ
    """

    model_config = ConfigDict(extra="forbid")

    points: list[Row] = Field(min_length=1)
    schemes: list[SchemeSpec] = ["W4A16", "W8A16", "UNQUANTIZED"]
    group_size: int | None = Field(default=None, ge=1)
    block_metric: Literal["cosine", "kl"] = "kl"
    layer_metric: Literal["cosine", "kl"] = "kl"
    criterion: Literal["router_score", "frequency", "reap", "output_norm"] = "reap"
    scope: Literal["layer", "global"] = "layer"

    @model_validator(mode="after")
    def _check(self) -> Grid:
        for candidate in resolve_schemes(self.schemes, self.group_size, "schemes"):
            if candidate.scheme is not None and candidate.scheme.input_activations is not None:
                raise ValueError(
                    f"schemes: {candidate.name} quantizes inputs, which a sweep does not try; name weight-only "
                    "schemes."
                )
        combinations = sum(row.count for row in self.points)
        if combinations > _MOST_POINTS:
            raise ValueError(
                f"points: {combinations} combinations; give at most {_MOST_POINTS}: a row is every combination "
                "of its values."
            )
        try:
            self.all_points()
        except ValidationError as error:
            raise ValueError(f"points: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
        return self

    def all_points(self) -> list[Point]:
        """Every point once, the untouched model first."""
        return list(dict.fromkeys([Point(), *(point for row in self.points for point in row.points())]))


def load_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file.

    :raises GridError: the file cannot be read, is not YAML, or names what there is not
    """
    try:
        written = read_yaml(path)
    except ValueError as error:
        raise GridError(f"grid {str(path)!r} {error}") from error
    try:
        return Grid.model_validate(written)
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'grid'}: {item['msg']}" for item in error.errors()
        )
        raise GridError(f"grid {str(path)!r}: {said}") from error
