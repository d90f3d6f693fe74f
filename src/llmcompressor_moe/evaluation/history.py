"""Which parts of a model a checkpoint made from it still has: drops in sequence, put together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedModel

from llmcompressor_moe.report import DropReport
from llmcompressor_moe.saving.save import HISTORY_FILE, saved_reports
from llmcompressor_moe.surgery.skipped import SkippedMoE
from llmcompressor_moe.topology import NotAnMoEError, find_topology, text_config

__all__ = ["KeptParts", "ModelLayout", "kept_parts", "layout_of", "match_layouts", "read_history"]


@dataclass(frozen=True)
class ModelLayout:
    """How many parts a model has.

    :param num_blocks: all blocks, dense ones too
    :param num_experts: block index -> routed experts, for the blocks that have an MoE layer
    """

    num_blocks: int
    num_experts: dict[int, int]

    def __str__(self) -> str:
        counts = sorted(set(self.num_experts.values()))
        experts = " or ".join(map(str, counts)) or "no"
        return f"{self.num_blocks} blocks, {len(self.num_experts)} of them with an MoE layer of {experts} experts"


@dataclass(frozen=True)
class KeptParts:
    """What is left of a base model. All indices are the base's.

    :param base: what it had
    :param blocks: its blocks that are left; one's place in the list is its index now
    :param experts: block -> its experts that are left; one's place in the list is its index now. Blocks without
        an MoE layer are not in it
    """

    base: ModelLayout
    blocks: tuple[int, ...]
    experts: dict[int, tuple[int, ...]]

    @classmethod
    def everything(cls, base: ModelLayout) -> KeptParts:
        """Nothing was dropped."""
        experts = {block: tuple(range(count)) for block, count in base.num_experts.items()}
        return cls(base, tuple(range(base.num_blocks)), experts)

    @property
    def layout(self) -> ModelLayout:
        """How many parts are left, by the indices they have now."""
        counts = {
            position: len(self.experts[block])
            for position, block in enumerate(self.blocks)
            if block in self.experts
        }
        return ModelLayout(len(self.blocks), counts)

    @property
    def dropped_blocks(self) -> list[int]:
        """Blocks that are gone."""
        return sorted(set(range(self.base.num_blocks)) - set(self.blocks))

    @property
    def dropped_layers(self) -> list[int]:
        """MoE layers that are gone from blocks that are left."""
        return [
            block for block in self.blocks if block in self.base.num_experts and block not in self.experts
        ]


def layout_of(model: PreTrainedModel) -> ModelLayout:
    """Count the parts of a model.

    :raises NotAnMoEError: it has no MoE layer, and none was dropped
    """
    try:
        topology = find_topology(model)
    except NotAnMoEError:
        if not any(isinstance(module, SkippedMoE) for module in model.modules()):
            raise
        return ModelLayout(text_config(model.config).num_hidden_layers, {})
    counts = {index: moe.num_experts for index, moe in topology.moe_layers.items()}
    return ModelLayout(len(topology.blocks), counts)


def read_history(checkpoint: str | Path) -> list[DropReport]:
    """Everything that was dropped from a checkpoint, oldest first; empty where it says nothing.

    :param checkpoint: its directory
    :raises ValueError: its ``trimming.json`` cannot be read; names the field
    """
    reports = [report for report in saved_reports(checkpoint) if "dropped" in report]
    try:
        return [DropReport.model_validate(report) for report in reports]
    except ValidationError as error:
        path = Path(checkpoint) / HISTORY_FILE
        raise ValueError(f"{path} holds something that is not a report of a drop: {error}") from error


def kept_parts(history: Sequence[DropReport], base: ModelLayout) -> KeptParts:
    """What drops leave of a model.

    Indices in a report are those of the model as it came into the report's recipe. Reports that agree on that
    model are of one recipe; a recipe that drops anything hands another model on.

    :param history: oldest first
    :raises ValueError: a report was made for a model that is not what the reports before it leave, or drops what
        is not there
    """
    kept = KeptParts.everything(base)
    for layout, reports in itertools.groupby(history, key=_layout_before):
        if layout != kept.layout:
            raise ValueError(_wrong_model(layout, kept))
        kept = _without(kept, reports)
    return kept


def match_layouts(
    base: ModelLayout,
    compressed: ModelLayout,
    history: Sequence[DropReport],
    base_history: Sequence[DropReport] = (),
) -> KeptParts:
    """Which parts of the base those of a compressed model are.

    :param history: what was dropped from the compressed model
    :param base_history: what was dropped from the base before; the compressed model's history begins with it,
        or is empty
    :raises ValueError: the history does not lead from the base to the compressed model
    """
    earlier = list(base_history)
    if history and list(history[: len(earlier)]) != earlier:
        raise ValueError(
            f"The base lost parts in {len(earlier)} drops, and the history of the compressed model does not begin "
            "with these: it was made from another model. Compare it with the model it was made from."
        )
    kept = kept_parts(history[len(earlier) :], base)
    if kept.layout != compressed:
        what = (
            f"its history ({HISTORY_FILE}) leaves {kept.layout}; the file belongs to another checkpoint, or "
            "something else dropped parts as well"
            if history
            else f"no history ({HISTORY_FILE}) beside it says what was dropped"
        )
        raise ValueError(
            f"The compressed model ({compressed}) cannot be compared with the base ({base}) part by part: {what}. "
            "Compare checkpoints that this package wrote, with the model they were made from."
        )
    return kept


def _layout_before(report: DropReport) -> ModelLayout:
    return ModelLayout(report.num_blocks, report.num_experts)


def _wrong_model(layout: ModelLayout, kept: KeptParts) -> str:
    if kept.layout == kept.base:
        return (
            f"The history begins with a model of {layout}; the base has {kept.base}. Compare with the model that "
            "the checkpoint was made from."
        )
    return (
        f"The history has a gap: a drop began with {layout}, but the drops before it leave {kept.layout}. Part of "
        f"{HISTORY_FILE} is missing."
    )


def _without(kept: KeptParts, reports: Iterable[DropReport]) -> KeptParts:
    """What the reports of one recipe leave."""
    now = kept.layout
    blocks: set[int] = set()
    layers: set[int] = set()
    experts: dict[int, set[int]] = {}
    for report in reports:
        if isinstance(report.dropped, dict):
            for layer, gone in report.dropped.items():
                _check_indices(report, gone, range(now.num_experts.get(layer, 0)), f"dropped[{layer}]")
                experts.setdefault(layer, set()).update(gone)
        elif report.modifier.startswith("Block"):
            _check_indices(report, report.dropped, range(now.num_blocks), "dropped")
            blocks.update(report.dropped)
        elif report.modifier.startswith("Layer"):
            _check_indices(report, report.dropped, now.num_experts, "dropped")
            layers.update(report.dropped)
        else:
            raise ValueError(
                f"{report.modifier}: dropped = {report.dropped} is a list neither of blocks nor of MoE layers; "
                "its modifier must begin with Block or Layer."
            )
    return KeptParts(
        kept.base,
        tuple(block for position, block in enumerate(kept.blocks) if position not in blocks),
        {
            block: tuple(
                expert
                for place, expert in enumerate(kept.experts[block])
                if place not in experts.get(position, ())
            )
            for position, block in enumerate(kept.blocks)
            if block in kept.experts and position not in blocks | layers
        },
    )


def _check_indices(report: DropReport, indices: Iterable[int], present: Iterable[int], field: str) -> None:
    unknown = sorted(set(indices) - set(present))
    if unknown:
        raise ValueError(f"{report.modifier}: {field} names {unknown}, which its model did not have.")
