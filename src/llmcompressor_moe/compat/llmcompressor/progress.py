"""How far a pass of llm-compressor's own is: it draws many bars, one after the other, and reports to nobody.

The modules that draw them hold tqdm under that name; the end of each part of a model is an event of the session.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import tqdm
from llmcompressor.core import active_session
from llmcompressor.core.events import EventType

__all__ = ["without_bars"]

_UPSTREAM = ("llmcompressor.", "compressed_tensors.")


@contextlib.contextmanager
def without_bars(on_part_done: Callable[[], Any]) -> Iterator[None]:
    """Draw no bars of upstream's.

    :param on_part_done: called when a sequential pass is done with a part of the model, one of about as many as it
        has blocks
    """
    session = active_session()
    event = session.event

    def watched(event_type: EventType, *args: Any, **kwargs: Any) -> Any:
        found = event(event_type, *args, **kwargs)
        # Other pipelines end one epoch with the whole model.
        if event_type == EventType.SEQUENTIAL_EPOCH_END and session.state.model not in kwargs["modules"]:
            on_part_done()
        return found

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(session, "event", watched))
        # They import the class or the package that it is in.
        silenced = {tqdm.tqdm: _silent, tqdm: SimpleNamespace(tqdm=_silent)}
        for name, module in list(sys.modules.items()):
            bar = getattr(module, "tqdm", None) if name.startswith(_UPSTREAM) else None
            if bar in (tqdm, tqdm.tqdm):
                stack.enter_context(patch.object(module, "tqdm", silenced[bar]))
        yield


def _silent(*args: Any, **options: Any) -> tqdm.tqdm:
    return tqdm.tqdm(*args, **options | {"disable": True})
