"""`llmcompressor-moe sweep MODEL --grid GRID --output OUT`: many ways to shrink a model, measured and drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli import messages
from llmcompressor_moe.cli.errors import user_errors
from llmcompressor_moe.cli.options import (
    CalibrationText,
    Device,
    Dtype,
    KlSamples,
    MaxTokens,
    ModelDirectory,
    NumSamples,
    SequenceLength,
    Stride,
    Verbose,
    WindowBatch,
    WindowLength,
)
from llmcompressor_moe.sizes import bytes_text

if TYPE_CHECKING:
    from llmcompressor_moe.sweep.report import SweepReport


def sweep(
    grid: Annotated[Path, typer.Option("--grid", "-g", help="YAML file with the points; see docs/sweep.md.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for points, report and pictures.")
    ],
    model: ModelDirectory = None,
    dataset: CalibrationText = "demo",
    num_samples: NumSamples = 64,
    sequence_length: SequenceLength = 256,
    kl_samples: KlSamples = 16,
    text: Annotated[str, typer.Option("--text", "-t", help="Text that points are measured on.")] = "demo",
    max_tokens: MaxTokens = 65536,
    length: WindowLength = None,
    stride: Stride = None,
    batch_size: WindowBatch = 1,
    dtype: Dtype = "auto",
    device: Device = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure decoding at every point, beside the untouched model.")
    ] = False,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Interpreter of vLLM's environment, to measure speed there, too.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep every point's checkpoint.")] = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate once, make and measure every point of a grid, and draw the trade-offs.

    What is finished is not done again: the same command goes on after a crash.
    """
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.demo import DEMO_MODEL
    from llmcompressor_moe.evaluation.latency import SpeedSettings
    from llmcompressor_moe.evaluation.run import EvaluationSettings
    from llmcompressor_moe.sweep.grid import load_grid
    from llmcompressor_moe.sweep.page import write_page
    from llmcompressor_moe.sweep.plots import PlotsMissingError, write_plots
    from llmcompressor_moe.sweep.run import SweepSettings, run_sweep

    with logs(verbose), user_errors(show_trace=verbose):
        report = run_sweep(
            model or DEMO_MODEL,
            load_grid(grid),
            output,
            SweepSettings(
                dataset=dataset,
                num_samples=num_samples,
                sequence_length=sequence_length,
                kl_samples=kl_samples,
                evaluation=EvaluationSettings(
                    source=text,
                    max_tokens=max_tokens,
                    length=length,
                    stride=stride,
                    batch_size=batch_size,
                    dtype=dtype,
                    device=device,
                    speed=SpeedSettings(memory=False) if speed else None,
                    vllm_python=vllm_python,
                ),
                keep=keep,
            ),
            announce=messages.step,
        )
        write_page(report, output / "report.html")
        try:
            write_plots(report, output)
        except PlotsMissingError as error:
            messages.remark(f"no PNG files: {error}", "yellow")
    render(report, Console())
    Console().print(Text(f"open {output / 'report.html'}"), soft_wrap=True)


def render(report: "SweepReport", console: Console) -> None:
    """Print the points; a star marks those that nothing beats in size and perplexity."""
    front = set(report.front_by_size())
    table = Table(title="Points", title_justify="left", title_style="bold")
    for column in ("", "point", "size", "perplexity", "KL from base", "routing overlap"):
        table.add_column(column, justify="left" if column in ("", "point") else "right")
    for result in report.points:
        found = result.found
        mean = found.routing.mean if found else None
        table.add_row(
            "*" if result.point.name in front else "",
            str(result.point),
            bytes_text(result.size),
            f"{report.perplexity(result):.2f}",
            f"{found.agreement.mean_kl:.4f}" if found else "",
            f"{mean.top_k_overlap:.1%}" if mean else "",
        )
    console.print(table)
