"""The record of what one modifier did. It is also the plan that can be applied again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError
from typing_extensions import Self

__all__ = [
    "DropCurves",
    "DropReport",
    "ModifierReport",
    "PlanFileError",
    "ShownPath",
    "WidthReport",
    "as_hex",
    "shown_path",
]


def shown_path(path: str | Path | None) -> str | None:
    """A path as files that may be published show it: as it was given, or the last part of an absolute one, which
    would tell about the machine that it is on.
    """
    if path is None:
        return None
    return Path(path).name if Path(path).is_absolute() else str(path)


# A model, a text or a file of a report: whole in memory, as `shown_path` gives it where it is written.
ShownPath = Annotated[str, PlainSerializer(shown_path)]


class PlanFileError(ValueError):
    """A saved plan cannot be used here."""


class ModifierReport(BaseModel):
    """What every modifier's report says. Indices are those of the model as it came into the recipe.

    :param modifier: class name of the modifier
    :param base_model: name or path of the model; see `shown_path`
    :param model_type: ``model_type`` of its text config
    :param num_blocks: blocks that the model came with
    :param num_experts: block index -> experts that the model came with
    :param settings: the modifier's fields, as given
    :param calibration: tokens and sequences behind the decision; null when no data was used
    """

    model_config = ConfigDict(extra="forbid")

    modifier: str
    base_model: ShownPath = ""
    model_type: str = ""
    num_blocks: int = 0
    num_experts: dict[int, int] = {}
    settings: dict[str, Any] = {}
    calibration: dict[str, int] | None = None

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report, edited by hand or not.

        :raises PlanFileError: the file is missing or not a report; says what is wrong
        """
        try:
            return cls.model_validate_json(Path(path).read_text())
        except OSError as error:
            raise PlanFileError(f"plan_path={str(path)!r} cannot be read: {error}.") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise PlanFileError(f"plan_path={str(path)!r} is not a saved plan: {error}") from error

    def describe(self) -> str:
        """One line for the model card."""
        return self.modifier

    def check_fits(
        self, modifier: str, model_type: str, num_blocks: int, num_experts: dict[int, int]
    ) -> None:
        """Make sure that this plan was made by this kind of modifier for such a model.

        :raises PlanFileError: names what differs
        """
        for name, ours, theirs in (
            ("modifier", self.modifier, modifier),
            ("model_type", self.model_type, model_type),
            ("num_blocks", self.num_blocks, num_blocks),
            ("num_experts", self.num_experts, num_experts),
        ):
            if ours and ours != theirs:
                raise PlanFileError(
                    f"The plan was made for another model or modifier: its {name} is {ours!r}, here it is "
                    f"{theirs!r}."
                )


class DropCurves(BaseModel):
    """What each MoE layer's experts are worth, measured with that layer cut alone.

    :param nats: block index -> (experts dropped, or channels of each expert, mean over tokens of KL(intact || cut)
        in nats), fewest first
    :param predicted: nats that the chosen cut costs if damages of layers add up
    :param samples: behind the curves
    :param tokens: behind the curves, padding left out
    :param passes: through all blocks over all of the calibration data, that measuring took
    """

    nats: dict[int, list[tuple[int, float]]]
    predicted: float
    samples: int
    tokens: int
    passes: float


class DropReport(ModifierReport):
    """Report of one drop: what was scored, what went, what stayed.

    :param scores: block index -> score, or -> one score per expert; null where there is none
    :param dropped: block indices, or block index -> dropped experts
    :param kept: the same for what stays
    :param curves: behind a choice with ``scope="sensitivity"``
    """

    scores: dict[int, float | list[float | None] | None]
    dropped: list[int] | dict[int, list[int]]
    kept: list[int] | dict[int, list[int]]
    curves: DropCurves | None = None

    def check_drops(self, kind: type) -> None:
        """Make sure that ``dropped``, edited by hand perhaps, names something, each only once.

        :param kind: ``list`` for block indices, ``dict`` for experts per block
        :raises PlanFileError: it does not
        """
        lists = list(self.dropped.values()) if isinstance(self.dropped, dict) else [self.dropped]
        distinct = all(indices and len(set(indices)) == len(indices) for indices in lists)
        if not isinstance(self.dropped, kind) or not lists or not distinct:
            what = "a list of block indices" if kind is list else "an object: block index -> list of experts"
            raise PlanFileError(
                f"The plan's dropped = {self.dropped!r} must be {what}, with at least one index and each only "
                "once."
            )

    def describe(self) -> str:
        """One line for the model card."""
        if isinstance(self.dropped, dict):
            total = sum(map(len, self.dropped.values()))
            lost = {len(experts) for experts in self.dropped.values()}
            each = (
                f"{lost.pop()} in each of {len(self.dropped)} layers"
                if len(lost) == 1
                else "different numbers per layer"
            )
            what = f"{total} experts dropped ({each})"
        else:
            part = "blocks" if self.modifier.startswith("Block") else "MoE layers"
            what = f"{len(self.dropped)} {part} dropped: {', '.join(map(str, self.dropped)) or 'none'}"
        criterion = self.settings.get("criterion") or self.settings.get("metric")
        chosen = f", chosen by {criterion} on {self.calibration['tokens']} tokens" if self.calibration else ""
        return f"{self.modifier}: {what}{chosen}"


class WidthReport(ModifierReport):
    """Report of an ExpertWidthModifier. Indices are those of the model as it came into the recipe.

    :param widths: block index -> channels of each expert before and after
    :param kept: block index -> expert (``shared 0``, ... for shared ones) -> channels that stay, as a hexadecimal
        number: its first digit stands for the first four channels, the first of them in the highest bit
    :param refitted: block index -> experts whose down projection was fitted
    :param lost: block index -> share of the squared output of the routed experts that is lost on tokens that
        nothing was decided on; null where there were none
    :param curves: behind a choice with ``scope="sensitivity"``
    """

    widths: dict[int, tuple[int, int]]
    kept: dict[int, dict[str, str]]
    refitted: dict[int, list[str]] = {}
    lost: dict[int, float | None] = {}
    curves: DropCurves | None = None

    def channels(self, layer: int, name: str, width: int, count: int) -> list[int]:
        """Channels of an expert that stay.

        :param name: as in ``kept``
        :param width: channels that it has
        :param count: that are to stay
        :raises PlanFileError: the plan, edited by hand perhaps, says otherwise
        """
        text, digits = self.kept.get(layer, {}).get(name, ""), -(-width // 4)
        try:
            number = int(text, 16)
        except ValueError:
            number = 0
        found = [channel for channel in range(width) if number >> (4 * digits - 1 - channel) & 1]
        if len(text) != digits or len(found) != count:
            raise PlanFileError(
                f"The plan's kept[{layer}][{name!r}] = {text!r} must be {digits} hexadecimal digits that name "
                f"{count} of {width} channels."
            )
        return found

    def describe(self) -> str:
        """One line for the model card."""
        changes = sorted({change for change in self.widths.values()})
        what = ", ".join(f"{old} to {new}" for old, new in changes)
        tokens = f", chosen on {self.calibration['tokens']} tokens" if self.calibration else ""
        return f"{self.modifier}: experts of {len(self.widths)} MoE layers cut from {what} channels{tokens}"


def as_hex(channels: Sequence[int], width: int) -> str:
    """Channels as `WidthReport` lists them.

    :param width: channels that there were
    """
    digits = -(-width // 4)
    return f"{sum(1 << (4 * digits - 1 - channel) for channel in channels):0{digits}x}"
