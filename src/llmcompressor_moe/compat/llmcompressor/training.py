"""llm-compressor's session while a model trains."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import llmcompressor.core.lifecycle as upstream
from compressed_tensors.utils import patch_attr
from llmcompressor.core import session_functions
from llmcompressor.core.events import Event, EventType
from llmcompressor.core.session import CompressionSession
from llmcompressor.modifiers.pruning.utils.pytorch import LayerParamMasking

__all__ = ["active", "training_session"]


def training_session(steps_per_epoch: int | None) -> CompressionSession:
    """A session whose events know the step.

    A session makes its lifecycle itself and cannot be given one.

    :param steps_per_epoch: optimizer steps, where schedules count epochs
    """
    lifecycle = _TrainingLifecycle()
    lifecycle.steps_per_epoch = steps_per_epoch
    session = CompressionSession()
    session._lifecycle = lifecycle
    return session


@contextlib.contextmanager
def active(session: CompressionSession) -> Iterator[None]:
    """Make a session the one that modifiers find, for the length of the context.

    ``create_session`` makes a new one each time and cannot be given one that goes on.
    """
    with session_functions.create_session():
        session_functions._local_storage.session = session
        yield


class _TrainingLifecycle(upstream.CompressionLifecycle):
    """llm-compressor's lifecycle with events that know the step.

    It builds events without: every event would be at step 0, schedules would stand still, and ends would never
    come.
    """

    steps_per_epoch: int | None = None

    def event(self, event_type: EventType, global_step: int | None = 0, **kwargs: Any) -> list[Any]:
        """See upstream."""
        step = self.global_step if global_step is None else global_step
        located = functools.partial(Event, global_step=step, steps_per_epoch=self.steps_per_epoch)
        with patch_attr(upstream, "Event", located):
            return super().event(event_type, global_step=step, **kwargs)

    def finalize(self, **kwargs: Any) -> list[Any]:
        """See upstream; a mask that modifiers share (a schedule, then a constant mask) is removed once only."""
        removed: set[str] = set()
        for modifier in self.recipe.modifiers:
            if isinstance(modifier, LayerParamMasking) and modifier.parameterized_layers_ is not None:
                layers = modifier.parameterized_layers_
                modifier.parameterized_layers_ = {
                    name: layers[name] for name in layers if name not in removed
                }
                removed |= set(layers)
        return super().finalize(**kwargs)
