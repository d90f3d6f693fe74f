"""Lets vLLM share experts over ranks of a CPU. For tests only.

vLLM places and loads experts, and adds up what ranks computed, as on a GPU. Its kernel for a CPU takes every
expert for one that the rank holds; here those of other ranks get no weight, as GPU kernels do it.
"""

from functools import wraps
from typing import Any

from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


class SharedExperts:
    """A worker extension: importing it is what counts."""


def _among_its_own(apply: Any) -> Any:
    @wraps(apply)
    def apply_to_held_experts(
        self: Any, *, topk_ids: Any, topk_weights: Any, expert_map: Any = None, **rest: Any
    ) -> Any:
        if expert_map is not None:
            held = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(held < 0, 0.0)
            topk_ids = held.clamp(min=0).to(topk_ids.dtype)
        return apply(self, topk_ids=topk_ids, topk_weights=topk_weights, expert_map=expert_map, **rest)

    return apply_to_held_experts


CPUUnquantizedExperts.apply = _among_its_own(CPUUnquantizedExperts.apply)
