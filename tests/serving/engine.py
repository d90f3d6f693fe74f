"""Scores prompts with real vLLM, which runs in its own environment, and with transformers, for comparison."""

import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = pathlib.Path(os.environ.get("VLLM_TEST_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
RUNNER = pathlib.Path(__file__).with_name("runner.py")

# What worked for vLLM on a CPU; none of it is needed to serve on a GPU.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}

# Log-probabilities of float32 models may differ by this much: sums run in another order on each kind of CPU, and
# attention of tiny Granite models, whose `attention_multiplier` is 1, is sharp enough to amplify that.
FLOAT32_NOISE = 2e-4

# vLLM 0.32 computes their rotary embeddings wrong on a CPU with its custom operators.
PLAIN_ROTARY = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "lfm2_moe")
_NO_ROTARY_OPERATORS = {"custom_ops": ["all", "-rotary_embedding", "-deepseek_scaling_rotary_embedding"]}
# What an architecture needs here beyond that; test_engine_limits.py shows it on untouched models.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # Chunked attention needs chunks that KV blocks divide; blocks are 128 tokens by default on a CPU.
    "llama4_text": {"block_size": 32},
    **{name: {"compilation_config": _NO_ROTARY_OPERATORS} for name in PLAIN_ROTARY},
}


@dataclass(frozen=True)
class Result:
    """What one checkpoint gave: log-probabilities per prompt (of every token but the first), or the error."""

    logprobs: list[list[float]] | None = None
    error: str | None = None

    def differences(self, reference: Sequence[Sequence[float]]) -> torch.Tensor:
        """Absolute differences to `reference`, one per token; NaN counts as infinite. An error fails the test."""
        assert self.logprobs is not None, self.error
        ours, theirs = torch.tensor(self.logprobs), torch.tensor(reference)
        return (ours - theirs).abs().nan_to_num(nan=torch.inf).flatten()

    def difference(self, reference: Sequence[Sequence[float]]) -> float:
        """The largest of `differences`."""
        return self.differences(reference).max().item()


def vllm_logprobs(
    checkpoints: Sequence[pathlib.Path],
    prompts: Sequence[Sequence[int]],
    *,
    plugin: bool = True,
    poison: bool = True,
    unpack_experts: bool = False,
    multiprocessing: bool = False,
    known_settings: bool = True,
    job_options: Sequence[Mapping[str, Any]] | None = None,
    timeout: float = 1800,
    **options: Any,
) -> list[Result]:
    """Score `prompts` (equally long) with vLLM for each checkpoint, all in one process; results in order.

    `plugin=False` hides every general plugin from vLLM. `unpack_experts` decompresses experts and packed
    Linears once vLLM loaded them, as a CPU has no kernel for them (expert_shim.py). `multiprocessing` runs
    engine and workers in processes of their own. `options` go to `vllm.LLM`, over the settings that an
    architecture is known to need here; `job_options` holds more of them for each checkpoint.
    """
    jobs = [
        {
            "model": str(path),
            "prompts": [list(p) for p in prompts],
            "options": (_known_settings(path) if known_settings else {}) | options | dict(own),
        }
        for path, own in zip(checkpoints, job_options or [{}] * len(checkpoints), strict=True)
    ]
    request = {"poison": poison, "unpack_experts": unpack_experts, "jobs": jobs}
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing))}
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = pathlib.Path(folder, "request.json"), pathlib.Path(folder, "results.json")
        asked.write_text(json.dumps(request))
        command = [PYTHON, RUNNER, asked, answered]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        results = json.loads(answered.read_text()) if answered.exists() else []
    log = f"{run.stdout[-8000:]}\n{run.stderr[-8000:]}"
    died = f"vLLM's process ended with code {run.returncode}:\n{log}"
    results += [{"error": died}] * (len(jobs) - len(results))
    if multiprocessing:
        # The cause of an error in another process is in the log only.
        results = [r if "logprobs" in r else {"error": f"{r['error']}\n{log}"} for r in results]
    return [Result(**result) for result in results]


def _known_settings(checkpoint: pathlib.Path) -> dict[str, Any]:
    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    return dict(SETTINGS.get(model_type, {}))


@torch.no_grad()
def transformers_logprobs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The same log-probabilities by a transformers model: every token but the first, per prompt."""
    tokens = torch.tensor([list(p) for p in prompts])
    scores = model(tokens, use_cache=False).logits.float().log_softmax(-1)
    return scores[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1).tolist()
