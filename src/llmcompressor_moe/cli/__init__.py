"""The command line `llmcompressor-moe`: one module per verb, each usable as a function too."""

import typer

from llmcompressor_moe.cli.check import check

app = typer.Typer(
    name="llmcompressor-moe",
    help="Trim Mixture-of-Experts models with llm-compressor and serve them with vLLM.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(check)


@app.callback()
def _main() -> None:
    # with a callback typer keeps the verb even while there is only one
    return


__all__ = ["app", "check"]
