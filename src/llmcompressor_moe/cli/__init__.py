"""The command line `llmcompressor-moe`: one module per verb, each usable as a function too."""

import typer

from llmcompressor_moe.cli.check import check
from llmcompressor_moe.cli.compress import compress
from llmcompressor_moe.cli.densify import densify
from llmcompressor_moe.cli.evaluate import evaluate
from llmcompressor_moe.cli.forecast import forecast
from llmcompressor_moe.cli.inspect import inspect
from llmcompressor_moe.cli.recover import recover
from llmcompressor_moe.cli.sweep import sweep

app = typer.Typer(
    name="llmcompressor-moe",
    help="Trim Mixture-of-Experts models with llm-compressor and serve them with vLLM.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(inspect)
app.command()(compress)
app.command()(check)
app.command()(densify)
app.command()(evaluate)
app.command()(forecast)
app.command()(recover)
app.command()(sweep)

__all__ = ["app", "check", "compress", "densify", "evaluate", "forecast", "inspect", "recover", "sweep"]
