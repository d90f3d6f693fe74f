"""Options for limits, the same in every command that judges models."""

from typing import Annotated

import typer

__all__ = ["MaxKl", "MaxPerplexityIncrease", "MaxReplaced", "MinRoutingOverlap", "MinTop1Agreement"]

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
