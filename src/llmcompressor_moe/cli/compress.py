"""`llmcompressor-moe compress MODEL --recipe R --dataset D --output OUT`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli.errors import error_line, user_errors
from llmcompressor_moe.report import DropReport, ModifierReport
from llmcompressor_moe.sizes import bytes_text, count_text

if TYPE_CHECKING:
    from llmcompressor_moe.compression import CompressionSummary

NOT_LEGAL = 1


def compress(
    recipe: Annotated[Path, typer.Option("--recipe", "-r", help="YAML recipe; ready ones are in recipes/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the new checkpoint.")],
    model: Annotated[
        Path | None, typer.Argument(help="Directory of the model; the bundled demo model unless told.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "-d",
            help='Calibration text: "demo" (bundled), a .txt file (blank line between documents), a .jsonl '
            'file with "text", a directory written by datasets.save_to_disk, or NAME or NAME:SPLIT of a '
            "dataset. Not needed by recipes that name indices.",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration samples, at most.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per calibration sample.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 1,
    pipeline: Annotated[
        str, typer.Option(help="independent or sequential: see docs/modifiers.md.")
    ] = "independent",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all logs, and tracebacks.")] = False,
) -> None:
    """Apply a recipe to a model and write the smaller checkpoint, with its tokenizer, checked.

    Exit code 0: written; 1: the result would not be legal to serve; 2: something has to be changed first.
    Nothing is written then.
    """
    from llmcompressor_moe.check.report import IllegalCheckpointError
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.compression import compress as run
    from llmcompressor_moe.demo import DEMO_MODEL

    steps = Console(stderr=True)
    with logs(verbose), user_errors(show_trace=verbose):
        try:
            summary = run(
                model or DEMO_MODEL,
                recipe,
                dataset,
                output,
                num_samples=num_samples,
                sequence_length=sequence_length,
                batch_size=batch_size,
                pipeline=pipeline,
                dtype=dtype,
                announce=lambda step: steps.print(Text(f"- {step}", style="cyan"), soft_wrap=True),
            )
        except IllegalCheckpointError as error:
            steps.print(Text(f"error: {error_line(error)}", style="bold red"))
            raise typer.Exit(NOT_LEGAL) from None
    if json:
        typer.echo(summary.model_dump_json(indent=2))
    else:
        render(summary, Console())


def render(summary: "CompressionSummary", console: Console) -> None:
    """Print what changed, what was dropped, the verdict and the next command."""
    sizes = Table(title=Text(summary.output), title_justify="left", title_style="bold")
    for column in ("", "before", "after", "left"):
        sizes.add_column(column, justify="right" if column else "left")
    for name, before, after, text in (
        ("size on disk", summary.bytes_before, summary.bytes_after, bytes_text),
        ("parameters", summary.parameters_before, summary.parameters_after, count_text),
        ("active per token", summary.active_before, summary.active_after, count_text),
    ):
        sizes.add_row(name, text(before), text(after), f"{100 * after / before:.1f} %")
    console.print(sizes)
    for report in summary.reports:
        console.print(Text(describe_report(report)), soft_wrap=True)
    warnings = [finding for finding in summary.check.findings if finding.severity.value == "warning"]
    console.print(Text(f"check: legal to serve, {len(warnings)} warning(s)", style="bold green"))
    for finding in warnings:
        console.print(Text(f"  {finding}", style="yellow"))
    took = f"{summary.seconds:.0f} s"
    if summary.calibration_tokens:
        took += f", {summary.calibration_tokens} calibration tokens"
    console.print(Text(f"took {took}"))
    console.print(Text("next:", style="bold"))
    if summary.needs_plugin:
        console.print(
            Text("  pip install --no-deps ./serving    # once, in vLLM's environment: layers differ"),
            soft_wrap=True,
        )
    console.print(Text(f"  {summary.serve_command}"), soft_wrap=True)


def describe_report(report: ModifierReport) -> str:
    """One line that says what a modifier did, indices included."""
    if not isinstance(report, DropReport):
        return report.describe()
    return f"{report.modifier}: {_dropped(report)}"


def _dropped(report: DropReport) -> str:
    if isinstance(report.dropped, dict):
        total = sum(len(experts) for experts in report.dropped.values())
        had = sum(report.num_experts.get(layer, 0) for layer in report.dropped)
        each = ", ".join(f"{layer}: {experts}" for layer, experts in report.dropped.items())
        return f"{total} of {had} experts (layer: experts) {each}"
    what = "blocks" if report.modifier.startswith("Block") else "MoE layers"
    total = report.num_blocks if what == "blocks" else len(report.num_experts)
    return f"{len(report.dropped)} of {total} {what}: {', '.join(map(str, report.dropped)) or 'none'}"
