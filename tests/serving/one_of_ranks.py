"""Runs in vLLM's own environment: builds models as one rank of several would, and loads its part of the weights.

Reads jobs from the file named by the first argument, and writes one error text or null for each to the second:

    [{"model": path, "tensor_parallel": int, "expert_parallel": bool}, ...]

There is one process. vLLM's groups are told that they were larger, and nothing is ever exchanged.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry


def need_no_kernels() -> None:
    """Nothing runs here: what this kind of CPU has no kernel for is laid out all the same."""
    compressed_tensors_w8a8_fp8.init_fp8_linear_kernel = lambda **_: None
    compressed_tensors_w8a8_fp8.expose_input_quant_key = lambda *_: None
    compressed_tensors_moe_wna16.select_wna16_moe_backend = lambda **_: (None, None)


def build(model: str, rank: int, ranks: int, expert_parallel: bool) -> None:
    """Build a model and load its weights as one of some tensor-parallel ranks."""
    arguments = EngineArgs(
        model=model, dtype="bfloat16", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True
    )
    config = arguments.create_engine_config()
    config.parallel_config.tensor_parallel_size = ranks
    config.parallel_config.enable_expert_parallel = expert_parallel
    config.model_config.verify_with_parallel_config(config.parallel_config)
    with set_current_vllm_config(config):
        if parallel_state._TP is None:
            rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
            parallel_state.init_distributed_environment(1, 0, rendezvous, 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1)
        groups = [parallel_state._TP, parallel_state._EP]
        for group in filter(None, groups):
            group.world_size, group.rank_in_group = ranks, rank
        try:
            built = initialize_model(config)
            get_model_loader(config.load_config).load_weights(built, config.model_config)
        finally:
            for group in filter(None, groups):
                group.world_size, group.rank_in_group = 1, 0


def attempt(job: dict[str, Any]) -> str | None:
    """The first error that the first or the last rank meets."""
    ranks = job["tensor_parallel"]
    for rank in (0, ranks - 1):
        try:
            build(job["model"], rank, ranks, job["expert_parallel"])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    need_no_kernels()
    registry._run_in_subprocess = lambda look: look()
    jobs = json.loads(pathlib.Path(sys.argv[1]).read_text())
    pathlib.Path(sys.argv[2]).write_text(json.dumps([attempt(job) for job in jobs]))
