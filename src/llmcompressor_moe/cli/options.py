"""Options and arguments that mean the same in several commands."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsJson",
    "CalibrationText",
    "ComputeDtype",
    "Device",
    "Dtype",
    "KlSamples",
    "MaxKl",
    "MaxMemory",
    "MaxPerplexityIncrease",
    "MaxReplaced",
    "MaxTokens",
    "MinRoutingOverlap",
    "MinTop1Agreement",
    "ModelDirectory",
    "NumSamples",
    "OutputDirectory",
    "SequenceLength",
    "Stride",
    "Verbose",
    "WindowBatch",
    "WindowLength",
]

ModelDirectory = Annotated[
    Path | None, typer.Argument(help="Directory of the model. Defaults to the bundled demo model.")
]
OutputDirectory = Annotated[Path, typer.Option("--output", "-o", help="Directory for the new checkpoint.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
ComputeDtype = Annotated[
    str,
    typer.Option(
        help="Dtype that 16-bit weights are computed in: auto (the fastest one that loses nothing), float32, "
        "bfloat16 or float16."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for hidden states that wait between blocks, such as 8GiB; more wait in files beside OUTPUT. "
        "Defaults to half of the available memory.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show all logs, and tracebacks.")]

# A calibration run.
CalibrationText = Annotated[
    str, typer.Option("--dataset", "-d", help="Calibration text; see `compress --help`.")
]
NumSamples = Annotated[int, typer.Option(min=1, help="Calibration samples, at most.")]
SequenceLength = Annotated[int, typer.Option(min=1, help="Tokens per calibration sample.")]
KlSamples = Annotated[
    int, typer.Option(min=1, help="Samples on which each block and MoE layer is left out once.")
]

# Text that is measured on.
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of it, about; whole documents.")]
WindowLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens per window; 2048 or what the model takes.")
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that each further window predicts. Defaults to half a window."),
]
WindowBatch = Annotated[int, typer.Option(min=1, help="Windows per forward pass.")]

# Limits that a compressed model has to keep.
MaxPerplexityIncrease = Annotated[
    float | None, typer.Option(min=0, help="Limit: share of the base's perplexity, 0.05 for 5 %.")
]
MaxKl = Annotated[float | None, typer.Option(min=0, help="Limit: mean KL from the base's output, nats.")]
MinTop1Agreement = Annotated[
    float | None, typer.Option(min=0, max=1, help="Limit: share of tokens with the base's first choice.")
]
MinRoutingOverlap = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Limit: share of a token's experts chosen again, of those left."),
]
MaxReplaced = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Limit: share of tokens whose whole set of experts changed."),
]
