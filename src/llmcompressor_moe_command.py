"""Entry point of the command `llmcompressor-moe`.

Outside the package, because importing the package imports llm-compressor, whose log then goes to standard
output already; this sets its level before.
"""

import os


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    from llmcompressor_moe.cli import app

    app()
