"""Keep AutoRound's own forward passes to itself.

AutoRound tunes a block by running it many times. In llm-compressor 0.14 the hooks of other modifiers in the same
pass see those runs as calibration data: SparseGPT and Wanda collect inputs again for what they have just pruned
and fail at the end, and observers see activations of half-tuned weights.
"""

from __future__ import annotations

import functools
from typing import Any

from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin

__all__ = ["tune_with_hooks_off"]


def tune_with_hooks_off(auto_round: type[Modifier]) -> None:
    """Make an AutoRound modifier class tune its blocks while all modifiers' hooks are off.

    :param auto_round: the class itself, so that this module need not import auto_round
    """
    tune = auto_round.apply_autoround
    if hasattr(tune, "__wrapped__"):
        return

    @functools.wraps(tune)
    def silent(modifier: Modifier, *args: Any, **kwargs: Any) -> Any:
        with HooksMixin.disable_hooks():
            return tune(modifier, *args, **kwargs)

    auto_round.apply_autoround = silent
