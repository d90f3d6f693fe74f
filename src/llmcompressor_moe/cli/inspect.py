"""`llmcompressor-moe inspect MODEL`: what a model is made of and what each drop would save."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli.errors import user_errors
from llmcompressor_moe.sizes import bytes_text, count_text, share_text

if TYPE_CHECKING:
    from llmcompressor_moe.inspection import ModelInspection, MoELayerSize


def inspect(
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory with the model's config.json; the bundled demo model unless told."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show parameters and bytes per part, and what each drop would save; reads config.json, no weights.

    Exit code 0: done; 2: there is no MoE model to look at.
    """
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.demo import DEMO_MODEL
    from llmcompressor_moe.inspection import inspect_model

    with logs(verbose=False), user_errors():
        inspection = inspect_model(model or DEMO_MODEL)
    if json:
        typer.echo(inspection.model_dump_json(indent=2))
    else:
        render(inspection, Console())


def render(inspection: "ModelInspection", console: Console) -> None:
    """Print what the model is, its parts, its MoE layers and what each step would save."""
    console.print(Text(inspection.path, style="bold"))
    console.print(Text(", ".join(_facts(inspection))))
    console.print(_parts(inspection))
    console.print(_moe_layers(inspection))
    console.print(_savings(inspection))


def _facts(inspection: "ModelInspection") -> list[str]:
    facts = [
        f"{inspection.architecture} ({inspection.model_type})",
        f"{inspection.blocks} blocks, {len(inspection.moe_layers)} with an MoE layer",
        f"{count_text(inspection.parameters)} parameters, {count_text(inspection.active_parameters)} active "
        "per token",
        f"{bytes_text(inspection.nbytes)} in {inspection.dtype}",
    ]
    if inspection.on_disk is not None:
        facts.append(f"{bytes_text(inspection.on_disk)} on disk")
    if inspection.quantization:
        facts.append(f"quantized with {inspection.quantization}; the sizes below are those without")
    return facts


def _parts(inspection: "ModelInspection") -> Table:
    table = _table("Parts", "part", "parameters", "active per token", "size", "share")
    for part in inspection.parts:
        table.add_row(
            part.part,
            count_text(part.parameters),
            count_text(part.active_parameters),
            bytes_text(part.nbytes),
            share_text(part.nbytes / inspection.nbytes),
        )
    table.add_section()
    table.add_row(
        "all",
        count_text(inspection.parameters),
        count_text(inspection.active_parameters),
        bytes_text(inspection.nbytes),
        share_text(1.0),
        style="bold",
    )
    return table


def _moe_layers(inspection: "ModelInspection") -> Table:
    table = _table(
        "MoE layers", "blocks", "experts", "top_k", "groups", "shared experts", "one layer", "one expert"
    )
    for run in _alike(inspection.moe_layers):
        first = run[0]
        table.add_row(
            _indices([layer.index for layer in run]),
            str(first.experts),
            str(first.top_k),
            f"{first.groups_kept} of {first.groups}" if first.groups > 1 else "-",
            "yes" if first.shared_experts else "-",
            count_text(first.parameters),
            count_text(first.expert_parameters),
        )
    if inspection.dropped_moe_layers:
        table.add_row(_indices(inspection.dropped_moe_layers), "dropped", *["-"] * 5, style="dim")
    return table


def _savings(inspection: "ModelInspection") -> Table:
    table = _table("What each step would save", "step", "parameters", "active per token", "size", "share")
    for saving in inspection.savings:
        table.add_row(
            saving.step,
            count_text(saving.parameters) if saving.parameters else "-",
            count_text(saving.active_parameters) if saving.active_parameters else "-",
            bytes_text(saving.nbytes),
            share_text(saving.share),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left")
    return table


def _alike(layers: "Sequence[MoELayerSize]") -> "list[list[MoELayerSize]]":
    """Layers that differ in nothing but their index, together; in order of their first."""
    groups: dict[str, list[MoELayerSize]] = {}
    for layer in layers:
        groups.setdefault(layer.model_dump_json(exclude={"index"}), []).append(layer)
    return list(groups.values())


def _indices(indices: Sequence[int]) -> str:
    """Sorted indices with runs written as ranges: ``0-3, 5``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
