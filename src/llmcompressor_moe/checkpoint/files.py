"""Write a file as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from llmcompressor_moe.checkpoint.atomic import OutputDirectoryError, check_can_write

__all__ = ["check_can_write_file", "write_bytes", "write_text"]


def check_can_write_file(path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Make sure that a file can be written before anything is computed for it.

    :param inputs: files and model directories that are read, of which nothing may be replaced
    :raises OutputDirectoryError: it is a directory, its folder cannot be written, or it is one of the inputs
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise OutputDirectoryError(f"output {str(path)!r} is a directory; name a file.")
    real = path.resolve()
    read = {Path(one).resolve() for one in inputs if Path(one).exists()}
    if path.exists() and (read & {real, *real.parents}):
        raise OutputDirectoryError(
            f"output {str(path)!r} would replace a file that is read; name another, or delete it before."
        )
    check_can_write(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a temporary sibling and move it in place, folders included.

    :raises OutputDirectoryError: it cannot be written; what was there before is still there
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a temporary sibling and move it in place, folders included.

    :raises OutputDirectoryError: it cannot be written; what was there before is still there
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputDirectoryError(f"{str(path)!r} cannot be written ({error}).") from error
