"""`llmcompressor-moe compress MODEL --recipe R --dataset D --output OUT`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli import messages
from llmcompressor_moe.cli.again import command_line
from llmcompressor_moe.cli.errors import error_line, user_errors
from llmcompressor_moe.cli.options import (
    AsJson,
    ComputeDtype,
    Dtype,
    MaxKl,
    MaxMemory,
    MaxPerplexityIncrease,
    MaxReplaced,
    MinRoutingOverlap,
    MinTop1Agreement,
    ModelDirectory,
    NumSamples,
    OutputDirectory,
    SequenceLength,
    Verbose,
)
from llmcompressor_moe.report import DropReport, ModifierReport
from llmcompressor_moe.sizes import bytes_text, count_text

if TYPE_CHECKING:
    from llmcompressor_moe.compression import CompressionSummary
    from llmcompressor_moe.limits import Limits
    from llmcompressor_moe.modifiers import QualityGateModifier
    from llmcompressor_moe.resources import ResourceEstimate

NOT_LEGAL = 1
INTERRUPTED = 130


def compress(
    context: typer.Context,
    recipe: Annotated[Path, typer.Option("--recipe", "-r", help="YAML recipe; ready ones are in recipes/.")],
    output: OutputDirectory,
    model: ModelDirectory = None,
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
    num_samples: NumSamples = 128,
    sequence_length: SequenceLength = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 1,
    pipeline: Annotated[
        str, typer.Option(help="independent or sequential: see docs/modifiers.md.")
    ] = "independent",
    dtype: Dtype = "auto",
    compute_dtype: ComputeDtype = "auto",
    max_memory: MaxMemory = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Decode weights that are stored quantized, so that the recipe can quantize them again. Without "
            "it, they keep their stored precision.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where the same command was stopped, to the same bytes: see docs/large-models.md.",
        ),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option("--text", "-t", help="Text that limits are judged on; not the calibration text."),
    ] = None,
    max_perplexity_increase: MaxPerplexityIncrease = None,
    max_kl: MaxKl = None,
    min_top1_agreement: MinTop1Agreement = None,
    min_routing_overlap: MinRoutingOverlap = None,
    max_replaced: MaxReplaced = None,
    json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Apply a recipe to a model and write the smaller checkpoint, with its tokenizer, checked.

    Exit code 0: written; 1: the result would not be legal to serve, or breaks a limit (then it is kept apart in
    OUTPUT.rejected); 2: something has to be changed first, and nothing is written; 130: interrupted, --resume goes
    on.
    """
    from llmcompressor_moe.check.report import IllegalCheckpointError
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.compression import compress as run
    from llmcompressor_moe.demo import DEMO_MODEL
    from llmcompressor_moe.limits import Limits, LimitsBrokenError

    with logs(verbose), user_errors(show_trace=verbose):
        limits = Limits(
            max_perplexity_increase=max_perplexity_increase,
            max_kl=max_kl,
            min_top1_agreement=min_top1_agreement,
            min_routing_overlap=min_routing_overlap,
            max_replaced=max_replaced,
        )
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
                compute_dtype=compute_dtype,
                max_memory=max_memory,
                requantize=requantize,
                resume=resume,
                gate=_gate(limits, text),
                announce=messages.step,
                on_estimate=lambda estimate: messages.remark("\n".join(describe_estimate(estimate))),
            )
        except KeyboardInterrupt:
            messages.failure(f"interrupted. To go on: {command_line(context, resume=True)}")
            raise typer.Exit(INTERRUPTED) from None
        except (IllegalCheckpointError, LimitsBrokenError) as error:
            messages.failure(error_line(error))
            raise typer.Exit(NOT_LEGAL) from None
    if json:
        typer.echo(summary.model_dump_json(indent=2))
    else:
        render(summary, Console())


def _gate(limits: "Limits", text: str | None) -> "QualityGateModifier | None":
    from llmcompressor_moe.modifiers import QualityGateModifier

    if limits.any and text is None:
        raise ValueError("limits need --text, a text to measure on that is not the calibration text.")
    if not limits.any:
        return None
    return QualityGateModifier(text=text, **limits.model_dump(exclude_none=True))


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
            Text("  pip install --no-deps ./serving    # once, in vLLM's environment"),
            soft_wrap=True,
        )
    console.print(Text(f"  {summary.serve_command}"), soft_wrap=True)


def describe_estimate(estimate: "ResourceEstimate") -> list[str]:
    """Lines that say what a run will need."""
    limit = "at most " if estimate.output_at_most else ""
    passes = "1 pass" if estimate.passes == 1 else f"{estimate.passes} passes"
    return [
        f"  memory   about {bytes_text(estimate.memory)}",
        f"  output   {limit}{bytes_text(estimate.output)}",
        f"  scratch  about {bytes_text(estimate.scratch)} beside the output, while it runs",
        f"  reads    about {bytes_text(estimate.reads)}, {passes} over the calibration data",
    ]


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
