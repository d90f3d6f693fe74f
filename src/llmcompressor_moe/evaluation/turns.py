"""Models take turns at a measurement, whatever engines run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from llmcompressor_moe.evaluation.latency import SpeedSettings

__all__ = ["Runner", "Turn", "take_turns"]


@dataclass(frozen=True)
class Turn:
    """One prefill and the decode after it.

    :param prefill_seconds: from the prompts to the first new token of every sequence
    :param decode_seconds: from there to the last one
    :param device: what it ran on
    :param peak_nbytes: the most memory in use meanwhile, the model with it; None where the engine cannot tell
    :param peak_method: how that was measured
    """

    prefill_seconds: float
    decode_seconds: float
    device: str
    peak_nbytes: int | None = None
    peak_method: str | None = None


class Runner(Protocol):
    """A loaded model that takes turns."""

    def turn(self, rows: Sequence[Sequence[int]], new_tokens: int) -> Turn:
        """Continue rows of token ids, equally long, greedily by ``new_tokens`` each."""

    def close(self) -> None:
        """Let go of the model."""


def take_turns(
    load: Sequence[Callable[[], Runner]],
    prompts: Sequence[Sequence[Sequence[int]]],
    settings: SpeedSettings,
) -> list[list[list[Turn]]]:
    """Let models take turns at every shape, after turns that warm up and do not count.

    Who begins a round changes from round to round, so that none always runs in another's wake.

    :param load: loads each model
    :param prompts: token ids of each shape, [sequences][tokens]
    :return: turns by model, shape and round
    """
    turns: list[list[list[Turn]]] = [[[] for _ in prompts] for _ in load]
    # Loaded once a model warms up once, else whenever it is loaded.
    warm_ups = 1 if settings.together else settings.rounds
    total = (settings.rounds + warm_ups) * len(load) * len(prompts)
    with contextlib.ExitStack() as stack, tqdm(total=total, desc="Measuring speed", unit="turn") as bar:

        def turn(runner: Runner, shape: int) -> Turn:
            taken = runner.turn(prompts[shape], settings.new_tokens)
            bar.update()
            return taken

        if settings.together:
            runners = [_loaded(stack, make) for make in load]
            for runner in runners:
                for shape in range(len(prompts)):
                    turn(runner, shape)
            for order in _orders(len(load), settings.rounds):
                for shape in range(len(prompts)):
                    for model in order:
                        turns[model][shape].append(turn(runners[model], shape))
            return turns
        for order in _orders(len(load), settings.rounds):
            for model in order:
                with contextlib.ExitStack() as alone:
                    runner = _loaded(alone, load[model])
                    for shape in range(len(prompts)):
                        turn(runner, shape)
                    for shape in range(len(prompts)):
                        turns[model][shape].append(turn(runner, shape))
    return turns


def _orders(models: int, rounds: int) -> Iterator[list[int]]:
    """Who comes when, in each round."""
    for start in range(rounds):
        yield [(start + place) % models for place in range(models)]


def _loaded(stack: contextlib.ExitStack, make: Callable[[], Runner]) -> Runner:
    runner = make()
    stack.callback(runner.close)
    return runner
