"""Runs in vLLM's own environment, which has no llmcompressor_moe: holds one checkpoint and takes turns on demand.

    python vllm_runner.py MODEL OPTIONS

MODEL is a checkpoint directory, OPTIONS a JSON object for `vllm.LLM`. Every line of standard input is a question,
every line of standard output its answer, in JSON; vLLM's own output goes to standard error.

    (loaded)                                              {"ready": true}
    {"turn": [[token id, ...], ...], "new_tokens": int}   {"prefill_seconds", "decode_seconds", "device",
                                                           "peak_nbytes", "peak_method"}
    {"score": [[token id, ...], ...]}                     {"negative_log_likelihood": float}

A turn is greedy. Its prefill ends when every sequence has its first token, its decode when all have all. The score
is the mean, in nats, over every token but the first of its row. Anything that fails ends the process.
"""

import importlib.util
import itertools
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
# Modules beside this file must not be found under names that others import.
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != HERE]

_spec = importlib.util.spec_from_file_location("resident_memory", HERE / "resident_memory.py")
memory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory)

SETTINGS = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0}


def load(model: str, options: dict[str, Any]) -> Any:
    """The engine. On a CPU it does not compile, which would take minutes."""
    from vllm import LLM
    from vllm.platforms import current_platform

    return LLM(model=model, **SETTINGS | {"enforce_eager": current_platform.is_cpu()} | options)


class Peak:
    """The most memory in use on a GPU, as torch allocated it."""

    def start(self) -> None:
        """Forget what was before."""
        import torch

        torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, Any]:
        """What was in use since `start`."""
        import torch

        return {
            "device": torch.cuda.get_device_name(),
            "peak_nbytes": torch.cuda.max_memory_allocated(),
            "peak_method": "most bytes that torch allocated on the GPU, vLLM's KV cache included",
        }


class ResidentPeak:
    """The most memory that this process grew by since this was made, which has to be before the engine is."""

    def __init__(self) -> None:
        self.before = memory.resident_nbytes()
        self.fresh = True

    def start(self) -> None:
        """Forget what was before."""
        self.fresh = memory.forget_peak()

    def read(self) -> dict[str, Any]:
        """What was in use since `start`; no bytes where the system does not tell."""
        peak = memory.peak_resident_nbytes()
        known = self.fresh and peak is not None
        return {
            "device": "cpu",
            "peak_nbytes": peak - self.before if known else None,
            "peak_method": "growth of vLLM's process, its engine and KV cache included" if known else None,
        }


NUMBERS = itertools.count()


def turn(llm: Any, rows: list[list[int]], new_tokens: int) -> dict[str, float]:
    """One prefill and one decode of all rows at once, step by step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    waiting = set()
    first = None
    start = time.perf_counter()
    for row in rows:
        name = str(next(NUMBERS))
        waiting.add(name)
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": row}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs[0].token_ids:
                waiting.discard(output.request_id)
        if first is None and not waiting:
            first = time.perf_counter()
    return {"prefill_seconds": first - start, "decode_seconds": time.perf_counter() - first}


def score(llm: Any, rows: list[list[int]]) -> dict[str, float]:
    """Mean negative log-likelihood of rows of token ids."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    scores = [
        entry[token].logprob
        for row, output in zip(rows, outputs, strict=True)
        for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return {"negative_log_likelihood": -math.fsum(scores) / len(scores)}


def main(model: str, options: str) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    # Whatever vLLM prints must not get between the answers.
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    import torch
    import vllm.entrypoints.llm  # noqa: F401  (what it takes is not the model's)

    peak = Peak() if torch.cuda.is_available() else ResidentPeak()
    llm = load(model, json.loads(options))
    say({"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        if "score" in question:
            say(score(llm, question["score"]))
            continue
        peak.start()
        say(turn(llm, question["turn"], question["new_tokens"]) | peak.read())


if __name__ == "__main__":
    main(*sys.argv[1:])
