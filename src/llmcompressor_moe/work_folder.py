"""What a run keeps beside its output while it works, so that another process can go on after it was stopped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from llmcompressor_moe.profile.resumable import PassStore

__all__ = ["WorkFolder", "WorkFolderError", "current_work", "work_path"]

Kept = TypeVar("Kept", bound=BaseModel)

_RUN = "run.json"
# Contents that take time to make again.
_WORTH = ("passes/*", "decisions/*", "unfinished/*.safetensors")


class WorkFolderError(ValueError):
    """A run cannot go on from what an earlier one left, or another one is at work."""


def work_path(output: str | Path) -> Path:
    """Where the work folder of an output directory is."""
    output = Path(output).absolute()
    return output.with_name(f".{output.name}.work")


class WorkFolder:
    """The folder ``.OUTPUT.work``.

    - ``run.json``: what the run is made of, and what it chose when it started
    - ``passes/``: snapshots and results of calibration passes
    - ``decisions/``: reports of modifiers that have decided
    - ``unfinished/``: the checkpoint, shard by shard
    - ``scratch/``: hidden states and changed weights; worthless for another process

    :param path: the folder
    :param snapshot_seconds: time between two snapshots of a pass, at least
    """

    def __init__(self, path: Path, snapshot_seconds: float) -> None:
        self.path = path
        self.unfinished, self.scratch = path / "unfinished", path / "scratch"
        self.passes = PassStore(path / "passes", snapshot_seconds)

    @property
    def resumable(self) -> bool:
        """Whether it holds anything that saves time."""
        return any(next(self.path.glob(pattern), None) for pattern in _WORTH)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def prepare(
        self, identity: Mapping[str, Any], chosen: Mapping[str, Any], *, resume: bool, same_bytes: bool
    ) -> dict[str, Any]:
        """Make the folder, or take over the one of a stopped run.

        :param identity: everything that the result depends on, by the names that people know
        :param chosen: what a new run chooses when it starts; a continued run keeps the first one's choice
        :param resume: False removes what an earlier run left
        :param same_bytes: whether a continued run makes every tensor again bit for bit; otherwise finished
            shards are written again
        :return: what holds for this run
        :raises WorkFolderError: the earlier run was another one; names what differs
        :raises OSError: the folder cannot be written
        """
        identity = json.loads(json.dumps(dict(identity)))
        known = self._known() if resume else None
        if known is None:
            self.clear()
            known = {"identity": identity, "chosen": dict(chosen)}
        _check_same(known["identity"], identity, self.path)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if not same_bytes:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        for directory in (self.scratch, self.unfinished):
            directory.mkdir(parents=True, exist_ok=True)
        for entry in self.unfinished.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.suffix != ".safetensors":
                entry.unlink()
        _write_json(self.path / _RUN, known)
        return known["chosen"]

    def decided(self, name: str, kind: type[Kept], decide: Callable[[], Kept]) -> Kept:
        """What a modifier decides, or has decided in an earlier process.

        :param name: a file name that is the same in every process
        """
        path = self.path / "decisions" / f"{name}.json"
        if path.is_file():
            return kind.model_validate(json.loads(path.read_text()))
        report = decide()
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, report.model_dump(mode="json"))
        return report

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out.

        :raises WorkFolderError: another process is at work
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f"{self.path.name}.lock")
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise WorkFolderError(
                    f"another process writes to this output: {str(lock)!r} is locked. Wait for it, or choose "
                    "another output."
                ) from error
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Let modifiers inside the context keep what they decide here."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def clear(self) -> None:
        """Remove it with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _known(self) -> dict[str, Any] | None:
        try:
            known = json.loads((self.path / _RUN).read_text())
        except (OSError, ValueError):
            # Stopped before it had begun.
            return None
        return known if isinstance(known, dict) and {"identity", "chosen"} <= set(known) else None


_CURRENT: ContextVar[WorkFolder | None] = ContextVar("work_folder", default=None)


def current_work() -> WorkFolder | None:
    """The work folder of the run that goes on, None where nothing is kept."""
    return _CURRENT.get()


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    differing = [
        _difference(name, before.get(name), now.get(name))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise WorkFolderError(
            f"--resume: {str(path)!r} was left by another run: {'; '.join(differing)}. Give what it was started "
            "with, or leave out --resume to start over."
        )


def _difference(name: str, before: Any, now: Any) -> str:
    shown = [repr(value) for value in (before, now)]
    if any(len(text) > 60 for text in shown):
        return f"{name} differs"
    return f"{name} was {shown[0]}, now {shown[1]}"


def _write_json(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    unfinished.replace(path)
