"""Options for a calibration run, the same in every command that makes one to choose by."""

from typing import Annotated

import typer

__all__ = ["CalibrationText", "KlSamples", "NumSamples", "SequenceLength"]

CalibrationText = Annotated[
    str, typer.Option("--dataset", "-d", help="Calibration text; see `compress --help`.")
]
NumSamples = Annotated[int, typer.Option(min=2, help="Calibration samples, at most.")]
SequenceLength = Annotated[int, typer.Option(min=1, help="Tokens per calibration sample.")]
KlSamples = Annotated[
    int, typer.Option(min=1, help="Samples on which each block and MoE layer is left out once.")
]
