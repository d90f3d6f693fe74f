"""Write a directory as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from llmcompressor_moe.checkpoint.stored import CheckpointChangedError

__all__ = ["OutputDirectoryError", "atomic_directory", "check_can_write", "unfinished_in"]

# Files of an earlier checkpoint; everything else in the target (a tokenizer, notes) survives a save.
_OF_A_CHECKPOINT = (".safetensors", ".safetensors.index.json")


class OutputDirectoryError(OSError):
    """The output directory cannot be written."""


@dataclass(frozen=True)
class _Unfinished:
    directory: Path
    retry: str


_UNFINISHED: ContextVar[_Unfinished | None] = ContextVar("unfinished_checkpoint", default=None)


@contextlib.contextmanager
def unfinished_in(directory: Path, retry: str) -> Iterator[None]:
    """Inside the context, `atomic_directory` writes into this directory, which stays when writing ends badly, so
    that what is in it can be used again.

    :param directory: on the file system of the target
    :param retry: see `atomic_directory`
    """
    token = _UNFINISHED.set(_Unfinished(directory, retry))
    try:
        yield
    finally:
        _UNFINISHED.reset(token)


def check_can_write(target: str | Path) -> None:
    """Make sure that a directory can be written before anything is computed for it.

    :raises OutputDirectoryError: it is a file, or it or its parent is read-only
    """
    target = Path(target).absolute()
    if target.exists() and not target.is_dir():
        raise OutputDirectoryError(f"output {str(target)!r} is a file; name a directory.")
    parent = next(path for path in target.parents if path.exists())
    for directory in [parent, *([target] if target.exists() else [])]:
        probe = directory / f".write-test-{os.getpid()}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputDirectoryError(
                f"output {str(target)!r}: {str(directory)!r} cannot be written ({error.strerror})."
            ) from error


@contextlib.contextmanager
def atomic_directory(
    target: str | Path, retry: str = "call save_pretrained again: the model is still in memory"
) -> Iterator[Path]:
    """A temporary sibling of ``target`` that takes its place when the context ends well, and goes when it
    does not.

    :param retry: what to do when there is space, for the error
    :raises OutputDirectoryError: the target cannot be written
    :raises CheckpointChangedError: a file that is copied from changed
    """
    target = Path(target).absolute()
    check_can_write(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = _UNFINISHED.get()
    if kept is None:
        temporary = target.with_name(f".{target.name}.saving-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    else:
        temporary, retry = kept.directory, kept.retry
        temporary.mkdir(exist_ok=True)
    try:
        yield temporary
        _keep_other_files(target, temporary)
        _swap(temporary, target)
    except CheckpointChangedError:
        raise
    except OSError as error:
        raise OutputDirectoryError(
            f"Saving to {str(target)!r} failed ({error}); the directory is as it was before. Free space or "
            f"choose another directory and {retry}."
        ) from error
    finally:
        if kept is None:
            shutil.rmtree(temporary, ignore_errors=True)


def _keep_other_files(old: Path, new: Path) -> None:
    for entry in old.iterdir() if old.exists() else ():
        if (new / entry.name).exists() or entry.name.endswith(_OF_A_CHECKPOINT):
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
