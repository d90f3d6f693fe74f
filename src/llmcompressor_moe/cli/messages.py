"""What commands say while they work, on standard error."""

from rich.console import Console
from rich.text import Text

__all__ = ["failure", "remark", "step"]


def step(text: str) -> None:
    """What begins now."""
    _say(f"- {text}", "cyan")


def remark(text: str, style: str = "") -> None:
    """A line beside the steps."""
    _say(text, style)


def failure(text: str) -> None:
    """Why the command ends early."""
    _say(f"error: {text}", "bold red")


def _say(line: str, style: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(line, style=style))
