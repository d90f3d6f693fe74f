"""`llmcompressor-moe densify MODEL --output OUT --method neurons --width W`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from llmcompressor_moe.cli import messages
from llmcompressor_moe.cli.errors import user_errors
from llmcompressor_moe.cli.options import (
    AsJson,
    CalibrationText,
    Dtype,
    ModelDirectory,
    NumSamples,
    SequenceLength,
    Verbose,
)
from llmcompressor_moe.sizes import count_text

if TYPE_CHECKING:
    from llmcompressor_moe.recovery.dense import DenseSummary


def densify(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the dense checkpoint.")],
    model: ModelDirectory = None,
    method: Annotated[
        str,
        typer.Option(
            help="neurons (the most useful of all experts), average (of the experts' weights, by use) or uniform "
            "(plain average)."
        ),
    ] = "neurons",
    width: Annotated[
        int | None,
        typer.Option(
            help="Neurons per feed-forward, shared experts' included. Defaults to as many as one token passes. "
            "For neurons only."
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option(help="Fit the output weights of neurons to what the MoE layers put out.")
    ] = True,
    dataset: CalibrationText = "demo",
    num_samples: NumSamples = 128,
    sequence_length: SequenceLength = 256,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda where the whole model fits.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of neurons that only fill up a width.")] = 0,
    json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Merge the experts of every layer into one feed-forward: a plain dense checkpoint, to be distilled.

    Exit code 0: written; 2: something has to be changed first, and nothing is written.
    """
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.demo import DEMO_MODEL
    from llmcompressor_moe.recovery.dense import to_dense

    with logs(verbose), user_errors(show_trace=verbose):
        summary = to_dense(
            model or DEMO_MODEL,
            output,
            method=method,
            width=width,
            refit=refit,
            dataset=dataset,
            num_samples=num_samples,
            sequence_length=sequence_length,
            dtype=dtype,
            device=device,
            seed=seed,
            announce=messages.step,
        )
    if json:
        typer.echo(summary.model_dump_json(indent=2))
    else:
        render(summary, Console())


def render(summary: "DenseSummary", console: Console) -> None:
    """Print what became of the model and the next commands."""
    console.print(Text(summary.output, style="bold"))
    console.print(
        Text(
            f"{summary.model_type} -> {summary.sibling}, {summary.width} neurons per block ({summary.method}); "
            f"{count_text(summary.parameters_before)} parameters ({count_text(summary.active_before)} active per "
            f"token) -> {count_text(summary.parameters_after)}"
        ),
        soft_wrap=True,
    )
    if summary.padded:
        blocks = ", ".join(map(str, summary.padded))
        console.print(
            Text(f"blocks with neurons that put out nothing yet: {blocks}", style="yellow"), soft_wrap=True
        )
    console.print(Text(f"took {summary.seconds:.0f} s, {summary.calibration_tokens} calibration tokens"))
    console.print(Text("next: it was not trained; distil it.", style="bold"))
    console.print(Text(f"  {summary.recover_command}"), soft_wrap=True)
