"""How commands end when the user has to do something: one clear line and exit code 2."""

import contextlib
from collections.abc import Iterator

import typer
from pydantic import ValidationError

from llmcompressor_moe.cli.messages import failure

__all__ = ["USER_ERROR", "error_line", "user_errors"]

USER_ERROR = 2


@contextlib.contextmanager
def user_errors(show_trace: bool = False) -> Iterator[None]:
    """End the command with one line for errors that name a field, a value and a way out.

    :param show_trace: let the exception through instead, with its traceback
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if show_trace:
            raise
        failure(error_line(error))
        raise typer.Exit(USER_ERROR) from None


def error_line(error: Exception) -> str:
    """The text of an exception on one line; for pydantic the field, what is wrong and the value."""
    if isinstance(error, ValidationError):
        return "; ".join(_field_error(dict(detail)) for detail in error.errors())
    return " ".join(str(error).split()) or type(error).__name__


def _field_error(detail: dict) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    return f"{'.'.join(map(str, detail['loc']))}={detail['input']!r}: {message}"
