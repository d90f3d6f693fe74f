"""What RouterCalibrationModifier wins back after Expert Drop of half, and what it costs.

    python benchmarks/router_calibration.py [--rounds 5]

Cost is CPU time of everything the modifier does (recording, fitting, judging) over that of one bare forward pass over the same
calibration data, both in this process, alternating. Gain is the share of the lost held-out perplexity.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor_moe import ExpertDropModifier, RouterCalibrationModifier
from llmcompressor_moe.demo import DEMO_MODEL, calibration_dataset, heldout_rows
from llmcompressor_moe.evaluation import perplexity

SETTINGS: dict[str, dict[str, Any]] = {
    "output, routers and norms (default)": {},
    "the same, gradient checkpointing": {"gradient_checkpointing": True},
    "output, routers": {"parts": ["router"]},
    "output, routers, norms and scales": {"parts": ["router", "norms", "scales"]},
    "layer, routers and norms": {"objective": "layer"},
    "layer, routers": {"objective": "layer", "parts": ["router"]},
    "layer, routers, norms and scales": {"objective": "layer", "parts": ["router", "norms", "scales"]},
}


class Timed(RouterCalibrationModifier):
    """Adds up the CPU time of its lifecycle."""

    def on_initialize(self, *args: Any, **kwargs: Any) -> bool:
        return _timed(lambda: super(Timed, self).on_initialize(*args, **kwargs))

    def on_calibration_end(self, *args: Any, **kwargs: Any) -> None:
        _timed(lambda: super(Timed, self).on_calibration_end(*args, **kwargs))


spent = 0.0


def _timed(work: Callable[[], Any]) -> Any:
    global spent
    start = time.process_time()
    try:
        return work()
    finally:
        spent += time.process_time() - start


def main(rounds: Annotated[int, typer.Option(help="Rounds per setting.")] = 5, samples: int = 64) -> None:
    """Measure."""
    global spent
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rows, data = torch.tensor(heldout_rows(tokenizer)), calibration_dataset(tokenizer, samples)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)

    def forward() -> float:
        model = load().eval()
        model.set_experts_implementation("eager")
        start = time.process_time()
        with torch.no_grad():
            for row in data:
                model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
        return time.process_time() - start

    base = perplexity(load(), rows)
    dropped = perplexity(oneshot(model=load(), recipe=[ExpertDropModifier(num_drop=4)], dataset=data), rows)
    print(f"held-out perplexity: base {base:.2f}, 4 of 8 experts dropped {dropped:.2f}")
    for name, fields in SETTINGS.items():
        ratios = []
        for _ in range(rounds):
            bare, spent = forward(), 0.0
            model = oneshot(
                model=load(), recipe=[ExpertDropModifier(num_drop=4), Timed(**fields)], dataset=data
            )
            ratios.append(spent / bare)
        after = perplexity(model, rows)
        won = (dropped - after) / (dropped - base)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{name}: perplexity {after:.2f}, {won:.1%} won back, {statistics.median(ratios):.2f} forwards ({spread})"
        )


if __name__ == "__main__":
    typer.run(main)
