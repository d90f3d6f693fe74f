"""Progress bars: one for a whole run, with the time left; a bar of its own for a long step outside of a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

__all__ = ["RunBar", "progress", "run_progress"]


class RunBar:
    """The bar of a run. It counts bytes, as `ResourceEstimate.work` does.

    :param total: that the run is expected to take
    :param pass_bytes: of these, what one pass over the calibration data takes
    """

    def __init__(self, bar: tqdm, total: float, pass_bytes: float) -> None:
        self._bar, self._pass_bytes = bar, pass_bytes
        self._promised = 0.0
        self._total = total

    def begin(self, description: str | None, passes: float, nbytes: float) -> float:
        """A step begins; returns the bytes that it counts."""
        if description is not None:
            self._bar.set_postfix_str(description)
        wanted = passes * self._pass_bytes + nbytes
        self._promised += wanted
        # Better a bar that slows down than one that stands at the end.
        self._bar.total = max(self._total, self._promised)
        return wanted

    def add(self, nbytes: float) -> None:
        """So many bytes of what steps count are done."""
        self._bar.update(min(nbytes, self._bar.total - self._bar.n))

    def part_of_pass(self, share: float) -> None:
        """A pass that reports nothing else has got on by a share of its work."""
        self.add(self.begin(None, share, 0))

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """What is printed inside does not run into the bar."""
        return tqdm.external_write_mode(file=sys.stderr)

    def finish(self) -> None:
        """The run has ended, whatever it was expected to take."""
        self._bar.update(self._bar.total - self._bar.n)


_RUN: ContextVar[RunBar | None] = ContextVar("run_progress", default=None)


@contextlib.contextmanager
def run_progress(total: float, pass_bytes: float) -> Iterator[RunBar]:
    """Show one bar for everything inside, which ends full.

    :param total: bytes that the run is expected to read, write and compute for; see `ResourceEstimate.work`
    :param pass_bytes: of these, those of one pass over the calibration data
    """
    with tqdm(
        total=max(total, 1),
        desc="Compressing",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
        leave=False,
    ) as bar:
        run = RunBar(bar, max(total, 1), pass_bytes)
        token = _RUN.set(run)
        try:
            yield run
            run.finish()
        finally:
            _RUN.reset(token)


@contextlib.contextmanager
def progress(
    total: int, description: str | None, *, passes: float = 0.0, nbytes: float = 0.0, **options: Any
) -> Iterator[Callable[[int], Any]]:
    """Show how far a long step is: on the bar of the run that it is a part of, or on one of its own.

    :param total: of the step, in its own unit
    :param description: what is done; None: no bar outside of a run, and no new words on the bar of a run
    :param passes: passes over the calibration data that the step takes, for the bar of a run
    :param nbytes: bytes that it takes beside those
    :param options: of a bar of its own, see `tqdm`
    :return: called with the units that were done since the last call
    """
    run = _RUN.get()
    if run is None:
        with tqdm(total=total, desc=description, leave=False, disable=description is None, **options) as bar:
            yield bar.update
        return
    share = run.begin(description, passes, nbytes) / max(total, 1)
    yield lambda units: run.add(units * share)
