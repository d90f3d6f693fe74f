"""A pass over calibration data that goes on where an earlier process was stopped.

At the end of a block, a pass has three things that matter: what the block returned for every batch, the sums
that observers have so far, and the block's number. All three go into one safetensors file that takes its name
when it is complete. The result of a finished pass replaces it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from llmcompressor_moe.profile.lockstep import Snapshot
from llmcompressor_moe.saving.shards import OutputTensor, dtype_name, write_file

__all__ = ["PassStore", "ResumablePass", "ResumePoint", "StatefulObserver"]


class StatefulObserver(Protocol):
    """An observer whose sums can be saved and restored."""

    def state(self) -> dict[str, torch.Tensor]:
        """What it has so far."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from there."""


class PassStore:
    """Snapshots and results of the passes of one run.

    :param directory: where they are kept
    :param seconds: time between two snapshots of a pass, at least
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self._directory, self._seconds = directory, seconds
        self._numbers: Counter[str] = Counter()

    def next(self, label: str, about: Mapping[str, Any]) -> ResumablePass:
        """The next pass with this label; the order of passes with one label must be the same in every process.

        :param label: a file name
        :param about: what the pass looks at, as JSON; a snapshot of another one is ignored
        """
        number = self._numbers[label]
        self._numbers[label] += 1
        return ResumablePass(self._directory / f"{label}-{number}", about, self._seconds)


class ResumablePass:
    """One pass.

    :param stem: path of its files, without suffix
    """

    def __init__(self, stem: Path, about: Mapping[str, Any], seconds: float) -> None:
        self._snapshot = stem.with_name(f"{stem.name}.safetensors")
        self._result = stem.with_name(f"{stem.name}.json")
        self._about = json.loads(json.dumps(dict(about), sort_keys=True))
        self._seconds, self._last = seconds, time.monotonic()
        self._possible = True

    def result(self) -> Any | None:
        """What `finish` kept, None where the pass has not finished."""
        try:
            kept = json.loads(self._result.read_text())
        except (OSError, ValueError):
            return None
        return kept["result"] if kept["about"] == self._about else None

    def finish(self, result: Any) -> None:
        """The pass is over.

        :param result: as JSON
        :raises OSError: it cannot be written
        """
        self._result.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._result.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"about": self._about, "result": result}))
        unfinished.replace(self._result)
        self._snapshot.unlink(missing_ok=True)

    def start(self) -> ResumePoint:
        """Where to start: at the snapshot, if there is one."""
        try:
            file = safe_open(self._snapshot, "pt")
        except FileNotFoundError:
            return ResumePoint(0, None, None)
        described = json.loads(file.metadata()["pass"])
        if described["about"] != self._about:
            return ResumePoint(0, None, None)
        return ResumePoint(described["block"] + 1, _Outputs(file, described["outputs"]), file)

    def block_done(self, block: int, snapshot: Snapshot, observers: Sequence[StatefulObserver]) -> None:
        """Write a snapshot, if it is time for one.

        :raises OSError: it cannot be written
        """
        if not self._possible or time.monotonic() - self._last < self._seconds:
            return
        tensors: dict[str, torch.Tensor] = {}
        try:
            outputs = [_described(value, tensors) for _, value in sorted(snapshot().items())]
        except _NotStorableError:
            # Some blocks return objects; such a pass starts again from its beginning.
            self._possible = False
            return
        for index, observer in enumerate(observers):
            tensors |= {f"observer.{index}.{name}": value for name, value in observer.state().items()}
        described = json.dumps({"about": self._about, "block": block, "outputs": outputs})
        self._snapshot.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._snapshot, [_stored(*item) for item in tensors.items()], {"pass": described})
        self._last = time.monotonic()


class ResumePoint:
    """Where a pass starts.

    :ivar block: the first block that runs
    :ivar outputs: batch -> what the block before it returned, read when it is asked for; None for the first block
    """

    def __init__(self, block: int, outputs: Mapping[int, Any] | None, file: Any) -> None:
        self.block, self.outputs, self._file = block, outputs, file

    def load(self, observers: Sequence[StatefulObserver]) -> None:
        """Give observers the state that they had here; once, the second time nothing happens."""
        file, self._file = self._file, None
        if file is None:
            return
        for index, observer in enumerate(observers):
            prefix = f"observer.{index}."
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            observer.load_state({name.removeprefix(prefix): file.get_tensor(name) for name in names})


class _Outputs(Mapping[int, Any]):
    """Read from a file that stays open: a later snapshot takes its name."""

    def __init__(self, file: Any, described: list[Any]) -> None:
        self._file, self._described = file, described

    def __getitem__(self, batch: int) -> Any:
        return _restored(self._described[batch], self._file.get_tensor)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._described)))

    def __len__(self) -> int:
        return len(self._described)


class _NotStorableError(TypeError):
    pass


def _described(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested value as JSON, its tensors by name."""
    if isinstance(value, torch.Tensor):
        name = f"output.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(one, tensors) for one in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(one, tensors) for key, one in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise _NotStorableError(type(value).__name__)


def _restored(described: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> Any:
    ((kind, value),) = described.items()
    if kind == "tensor":
        return read(value)
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_restored(one, read) for one in value)
    if kind == "dict":
        return {key: _restored(one, read) for key, one in value.items()}
    return value


def _stored(name: str, value: torch.Tensor) -> OutputTensor:
    return OutputTensor(
        name,
        dtype_name(value.dtype),
        tuple(value.shape),
        value.numel() * value.element_size(),
        lambda: [value],
    )
