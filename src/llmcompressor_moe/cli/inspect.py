"""`llmcompressor-moe inspect MODEL`: what a model is made of and what drops, schemes and recipes would save."""

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli.compress import describe_estimate
from llmcompressor_moe.cli.errors import user_errors
from llmcompressor_moe.cli.options import AsJson
from llmcompressor_moe.sizes import bytes_text, count_text, parse_bytes, share_text

if TYPE_CHECKING:
    from llmcompressor_moe.forecast import Step
    from llmcompressor_moe.inspection import ModelInspection, MoELayerSize
    from llmcompressor_moe.resources import ResourceEstimate

# What `compress` takes unless it is given other numbers.
_SAMPLES, _LENGTH = 128, 512


def inspect(
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory with the model's config.json. Defaults to the bundled demo model."),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Preset to size the routed experts in, repeatable. Defaults to W4A16 and W8A16."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Group size of group-wise integer schemes.")
    ] = None,
    target_bits: Annotated[
        list[float] | None, typer.Option(help="Mean bits per expert weight to size the model at, repeatable.")
    ] = None,
    target_size: Annotated[
        list[str] | None, typer.Option(help="Size such as 20GiB to give the mean bits for, repeatable.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="Show the size after each step of a YAML recipe.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show parameters and bytes per part, what each drop would save, and sizes with quantized experts; reads
    config.json, no weights.

    Exit code 0: done; 2: there is no MoE model to look at.
    """
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.demo import DEMO_MODEL
    from llmcompressor_moe.forecast import forecast
    from llmcompressor_moe.inspection import inspect_model
    from llmcompressor_moe.recipe_file import read_recipe
    from llmcompressor_moe.slimming import DEFAULT_SCHEMES

    with logs(verbose=False), user_errors():
        inspection = inspect_model(model or DEMO_MODEL, scheme or DEFAULT_SCHEMES, group_size)
        sizes = [parse_bytes(size, "--target-size") for size in target_size or ()]
        steps = forecast(model or DEMO_MODEL, read_recipe(recipe)) if recipe else []
        estimate = _estimate(model or DEMO_MODEL, recipe) if recipe else None
    if json:
        found = {**inspection.model_dump(), "steps": [step.model_dump() for step in steps]}
        typer.echo(dumps(found | {"resources": estimate and estimate.model_dump()}, indent=2))
        return
    console = Console()
    render(inspection, console, [*(target_bits or ()), *map(inspection.bits_at, sizes)])
    if steps:
        console.print(_steps(steps))
        console.print(Text(f"To apply it, with {_SAMPLES} samples of {_LENGTH} tokens:", style="bold"))
        for line in describe_estimate(estimate):
            console.print(Text(line))


def _estimate(model: Path, recipe: Path) -> "ResourceEstimate":
    """What `compress` would need with its defaults."""
    from llmcompressor.utils.dev import get_main_device

    from llmcompressor_moe.profile.computing import fast_dtype
    from llmcompressor_moe.recipe_file import read_recipe
    from llmcompressor_moe.resources import estimate_resources, model_shape, wave_tokens

    shape, device = model_shape(model), get_main_device()
    dtype = fast_dtype(shape.dtype, device)
    return estimate_resources(
        model,
        shape,
        read_recipe(recipe),
        samples=_SAMPLES,
        tokens=_SAMPLES * _LENGTH,
        batch_tokens=_LENGTH,
        wave=wave_tokens(shape, dtype, device, None),
        compute_dtype=dtype,
    )


def render(inspection: "ModelInspection", console: Console, target_bits: Sequence[float] = ()) -> None:
    """Print what the model is, its parts, its MoE layers, what each drop would save, and sizes with quantized
    experts.
    """
    console.print(Text(inspection.path, style="bold"))
    console.print(Text(", ".join(_facts(inspection))))
    console.print(_parts(inspection))
    console.print(_moe_layers(inspection))
    console.print(_savings(inspection))
    console.print(_schemes(inspection, target_bits))
    for size in inspection.schemes:
        if size.refused is not None:
            console.print(Text(f"{size.scheme} does not fit: {size.refused}"))


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
    table = _table("What each drop would save", "drop", "parameters", "active per token", "size", "share")
    for saving in inspection.savings:
        table.add_row(
            saving.step,
            count_text(saving.parameters) if saving.parameters else "-",
            count_text(saving.active_parameters) if saving.active_parameters else "-",
            bytes_text(saving.nbytes),
            share_text(saving.share),
        )
    return table


def _schemes(inspection: "ModelInspection", target_bits: Sequence[float]) -> Table:
    table = _table("With quantized experts", "experts", "bits per weight", "experts alone", "model", "share")
    for size in inspection.schemes:
        if size.refused is not None:
            table.add_row(size.scheme, "-", "-", "-", "-")
        else:
            _add_size(table, inspection, size.scheme, size.bits, size.nbytes, inspection.nbytes_in(size))
    for bits in target_bits:
        model = inspection.nbytes_at(bits)
        experts = inspection.expert_nbytes - (inspection.nbytes - model)
        _add_size(table, inspection, f"mean of {bits:.4g} bits", bits, experts, model)
    return table


def _steps(steps: "Sequence[Step]") -> Table:
    table = _table("After each step of the recipe", "step", "parameters", "active per token", "bits", "size")
    for step in steps:
        limit = "at most " if step.at_most else ""
        table.add_row(
            step.step,
            count_text(step.parameters),
            count_text(step.active_parameters),
            f"{limit}{step.bits:.4g}",
            f"{limit}{bytes_text(step.nbytes)}",
        )
    return table


def _add_size(
    table: Table, inspection: "ModelInspection", name: str, bits: float, experts: int, model: int
) -> None:
    table.add_row(
        name, f"{bits:.4g}", bytes_text(experts), bytes_text(model), share_text(model / inspection.nbytes)
    )


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
