"""`llmcompressor-moe forecast MODEL`: what drops and bits will cost, from one calibration run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli import messages
from llmcompressor_moe.cli.errors import user_errors
from llmcompressor_moe.cli.options import (
    AsJson,
    CalibrationText,
    KlSamples,
    ModelDirectory,
    NumSamples,
    SequenceLength,
    Verbose,
)

if TYPE_CHECKING:
    from llmcompressor_moe.evidence import Evidence
    from llmcompressor_moe.outlook import Coverage, Outlook, PointForecast
    from llmcompressor_moe.sweep.grid import Grid

# Rows per kind in the table; everything is in the JSON.
_ROWS = 12


def forecast(
    model: ModelDirectory = None,
    dataset: CalibrationText = "demo",
    num_samples: NumSamples = 64,
    sequence_length: SequenceLength = 256,
    kl_samples: KlSamples = 16,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight-only preset for experts, repeatable. Defaults to W4A16, W8A16 and UNQUANTIZED, in "
            "groups that fit the model."
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Group size of group-wise integer schemes.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the model while it is looked at: auto, bfloat16, float16 or float32.")
    ] = "auto",
    allowed_increase: Annotated[
        float, typer.Option(min=0.0, help="Increase of the perplexity that is allowed; 0.05 is five percent.")
    ] = 0.05,
    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid", "-g", help="Forecast the points of a sweep's grid, too; it names the schemes."
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(help="What a calibration run found (a sweep's evidence.json); none is made then."),
    ] = None,
    save_evidence: Annotated[
        Path | None, typer.Option(help="Write what the calibration run finds to this file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write all as JSON to this file.")
    ] = None,
    json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Say what dropping blocks, MoE layers and experts and lowering bits will cost in perplexity, before any of it
    is done: each amount with an interval, how far is safe, and whether the calibration text suffices to know.

    Exit code 0: done; 2: something is wrong with an argument, the model or the text.
    """
    from llmcompressor_moe.checkpoint.files import check_can_write_file, write_text
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.demo import DEMO_MODEL
    from llmcompressor_moe.evidence.gather import CalibrationSettings
    from llmcompressor_moe.outlook import outlook
    from llmcompressor_moe.outlook.report import check_allowed, common_ranges
    from llmcompressor_moe.sweep.choice import require_possible
    from llmcompressor_moe.sweep.fitting import fit_schemes

    model = model or DEMO_MODEL
    with logs(verbose), user_errors(show_trace=verbose):
        check_allowed(allowed_increase)
        if None not in (evidence, save_evidence):
            raise ValueError(
                f"--save-evidence {str(save_evidence)!r}: with --evidence nothing is gathered that could be "
                "saved; leave one of them out."
            )
        if output is not None and output == save_evidence:
            raise ValueError(f"--output and --save-evidence are both {str(output)!r}; name two files.")
        for path in filter(None, (output, save_evidence)):
            check_can_write_file(path, [one for one in (model, evidence, grid, dataset) if one is not None])
        wanted = _grid(grid, scheme, group_size)
        fitted = fit_schemes(model, wanted)
        if fitted.remark is not None:
            messages.remark(fitted.remark, "yellow")
        wanted, candidates, shape = fitted.grid, fitted.candidates, fitted.shape
        ranges = common_ranges(shape)
        points = [*ranges, *wanted.points] if grid else ranges
        asked = wanted.model_copy(update={"points": points})
        require_possible(asked, shape)
        settings = CalibrationSettings(dataset, num_samples, sequence_length, kl_samples, dtype)
        seen = _evidence(model, evidence, candidates, settings)
        if save_evidence is not None:
            write_text(save_evidence, seen.model_dump_json(indent=1) + "\n")
        found = outlook(seen, shape, asked, allowed_increase)
        if output is not None:
            write_text(output, found.model_dump_json(indent=1) + "\n")
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        render(found, Console())


def _grid(path: Path | None, scheme: Sequence[str] | None, group_size: int | None) -> "Grid":
    from llmcompressor_moe.sweep.grid import Grid, Row, load_grid

    if path is None:
        named = {"schemes": list(scheme)} if scheme else {}
        return Grid(points=[Row()], group_size=group_size, **named)
    if scheme or group_size is not None:
        raise ValueError(f"--grid {str(path)!r} names the schemes; leave out --scheme and --group-size.")
    return load_grid(path)


def _evidence(
    model: Path,
    path: Path | None,
    candidates: Sequence,
    settings: object,
) -> "Evidence":
    from llmcompressor_moe.evidence.gather import gather_evidence, load_evidence

    if path is not None:
        return load_evidence(path, model, candidates)
    messages.step(f"Calibrating {model}")
    return gather_evidence(model, candidates, settings)


def render(found: "Outlook", console: Console) -> None:
    """Print the forecast, what is safe, and how far the calibration data is to be trusted."""
    from llmcompressor_moe.outlook.predict import CONFIDENCE

    console.print(_losses(found))
    console.print(Text(_safe(found), style="bold"), soft_wrap=True)
    curve = found.calibration
    console.print(
        Text(
            f"Intervals hold {CONFIDENCE:.0%} of cut models like those that the curve was fitted on: "
            f"{', '.join(curve.models)} ({curve.points} points)."
        ),
        soft_wrap=True,
    )
    console.print(_coverage(found.coverage))
    style = {"good": "bold green", "thin": "bold yellow", "poor": "bold red"}[found.coverage.verdict]
    said = "; ".join(found.coverage.reasons)
    console.print(
        Text(f"calibration data: {found.coverage.verdict}{f': {said}' if said else ''}", style=style),
        soft_wrap=True,
    )


def _losses(found: "Outlook") -> Table:
    table = Table(title="Forecast", title_justify="left", title_style="bold")
    for position, column in enumerate(
        (
            "point",
            "perplexity",
            "at least",
            "at most",
            "nats per token",
            f"within {found.allowed_increase:.3g}",
        )
    ):
        table.add_column(column, justify="right" if position else "left")
    for group in _groups(found):
        for one in _some(group, found):
            loss = one.loss
            table.add_row(
                str(one.point),
                *(
                    f"x {factor:.3f}" if factor < 100 else f"x {factor:.3g}"
                    for factor in (loss.perplexity_factor, loss.perplexity_low, loss.perplexity_high)
                ),
                f"{loss.nll_increase:.4f}",
                "safe" if loss.keeps(found.allowed_increase) else "",
            )
        table.add_section()
    return table


def _groups(found: "Outlook") -> list[list["PointForecast"]]:
    """Points of the same kinds together, in the order of their first ones."""
    groups: dict[tuple[bool, ...], list[PointForecast]] = {}
    for one in found.points:
        point = one.point
        kinds = (point.blocks > 0, point.layers > 0, point.experts > 0, point.bits is not None)
        groups.setdefault(kinds, []).append(one)
    return list(groups.values())


def _some(points: Sequence["PointForecast"], found: "Outlook") -> list["PointForecast"]:
    """At equal distances, and those on both sides of the allowed increase."""
    if len(points) <= _ROWS:
        return list(points)
    shown = {index * (len(points) - 1) // (_ROWS - 1) for index in range(_ROWS)}
    safe = [one.loss.keeps(found.allowed_increase) for one in points]
    for index in range(1, len(points)):
        if safe[index] != safe[index - 1]:
            shown |= {index - 1, index}
    return [points[index] for index in sorted(shown)]


def _percent(found: "Outlook") -> str:
    return f"{100 * found.allowed_increase:.3g} %"


def _safe(found: "Outlook") -> str:
    safe = found.safe
    bits = f"{safe.bits:g} bits per expert weight" if safe.bits is not None else "none of the bits tried"
    return (
        f"safe, each alone, for {_percent(found)} more perplexity at most: up to {safe.blocks} block(s), "
        f"{safe.layers} MoE layer(s), {safe.experts} expert(s) per layer; down to {bits}"
    )


def _coverage(found: "Coverage") -> Table:
    from llmcompressor_moe.quantization.sensitivity import PRIOR_TOKENS

    table = Table(title="Calibration data", title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("tokens", f"{found.tokens}"),
        ("tokens behind divergences, about", f"{found.kl_tokens}"),
        ("tokens per expert, least", f"{found.min_tokens}"),
        ("tokens per expert, median", f"{found.median_tokens:g}"),
        ("experts that saw none", f"{found.unseen} of {found.experts}"),
        (f"experts that saw fewer than {PRIOR_TOKENS}", f"{found.starved} of {found.experts}"),
        *(
            (f"halves agree on {name}", "-" if value is None else f"{value:.2f}")
            for name, value in found.stability.items()
        ),
    ):
        table.add_row(name, value)
    return table
