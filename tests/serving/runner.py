"""Runs in vLLM's own environment: loads checkpoints one after the other and scores prompts with each.

Reads a JSON request from the file named by the first argument and writes the results, after every
checkpoint, to the file named by the second:

    request   {"poison": bool, "unpack_experts": bool, "jobs": [{"model", "prompts", "options"}, ...]}
    results   [{"logprobs": [[float, ...], ...]} | {"error": str}, ...]

`options` go to `vllm.LLM`; a prompt is a list of token ids, its log-probabilities those of every token
but the first.
"""

import gc
import json
import pathlib
import sys
import traceback
from typing import Any

_collect, _freeze = gc.collect, gc.freeze

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 2**26,
    "seed": 0,
}


def poison_fresh_memory() -> None:
    """Fill uninitialised memory with NaN: weights that were never loaded must not pass as zeros."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def start_engines_quickly() -> None:
    """Leave out what vLLM does for long-running servers; an engine then starts in a third of the time.

    Every engine collects garbage eight times, among all objects of vLLM's imports. Every architecture is looked
    at in a Python of its own, which imports vLLM again, lest CUDA be initialized too early.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()
    gc.disable()
    for name in ("collect", "freeze", "unfreeze"):
        setattr(gc, name, lambda *_: 0)


def score(model: str, prompts: list[list[int]], options: dict[str, Any]) -> list[list[float]]:
    """Log-probability of every prompt token but the first, per prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, **DEFAULTS | options)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    try:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    finally:
        # Processes of its own would stay, and hold their memory, until something collects `llm`.
        llm.llm_engine.engine_core.shutdown()
    return [
        [entry[token].logprob for token, entry in zip(p[1:], out.prompt_logprobs[1:], strict=True)]
        for p, out in zip(prompts, outputs, strict=True)
    ]


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    """One result: the scores, or the text of whatever went wrong."""
    try:
        return {"logprobs": score(job["model"], job["prompts"], job["options"])}
    except BaseException:
        return {"error": traceback.format_exc()}


def clean_up() -> None:
    """Let go of the last engine, which shuts its process group down, before the next one makes its own."""
    from vllm.distributed import cleanup_dist_env_and_memory

    _collect()
    cleanup_dist_env_and_memory()
    # What is still there belongs to modules that were imported.
    _freeze()


def main(request_path: str, results_path: str) -> None:
    """Work through the request; a job that fails leaves its error text and the next one starts."""
    request = json.loads(pathlib.Path(request_path).read_text())
    start_engines_quickly()
    if request["poison"]:
        poison_fresh_memory()
    if request["unpack_experts"]:
        from cache_shim import serve_fp8_caches_rounded
        from expert_shim import serve_compressed_experts_decompressed

        serve_compressed_experts_decompressed()
        serve_fp8_caches_rounded()
    results: list[dict[str, Any]] = []
    for job in request["jobs"]:
        results.append(attempt(job))
        clean_up()
        pathlib.Path(results_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
