"""Runs in vLLM's own environment: loads checkpoints one after the other and measures each.

    python measure_vllm.py REQUEST.json RESULTS.json

    request   {"models": [path, ...], "rows": [[token id, ...], ...], "prompts": [[token id, ...], ...],
               "new_tokens": int, "repeats": int, "rounds": int}
    results   [{"perplexity": float, "tokens_per_second": float}, ...]

The perplexity is that of `rows`, each predicted from its start. Generation is greedy, all prompts at once, and
the fastest of the repeats counts, after one that warms up. All models take turns, `rounds` times, and the
fastest round counts, so that another load on the machine does not decide between them.
"""

import gc
import json
import math
import pathlib
import sys
import time
from typing import Any

SETTINGS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "seed": 0,
}


def prompts_of(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    """Token ids as vLLM takes them."""
    return [{"prompt_token_ids": row} for row in rows]


def perplexity(llm: Any, rows: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of its row."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate(prompts_of(rows), sampling, use_tqdm=False)
    scores = [
        entry[token].logprob
        for row, output in zip(rows, outputs, strict=True)
        for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-sum(scores) / len(scores))


def generation_speed(llm: Any, prompts: list[list[int]], new_tokens: int, repeats: int) -> float:
    """Generated tokens per second."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        outputs = llm.generate(prompts_of(prompts), sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    return made / min(seconds[1:])


def measure(model: str, request: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    """All measurements of one checkpoint, with what an earlier round found out."""
    from vllm import LLM

    llm = LLM(model=model, **SETTINGS)
    speed = generation_speed(llm, request["prompts"], request["new_tokens"], request["repeats"])
    if known is None:
        return {"perplexity": perplexity(llm, request["rows"]), "tokens_per_second": speed}
    return known | {"tokens_per_second": max(speed, known["tokens_per_second"])}


def main(request_path: str, results_path: str) -> None:
    """Work through the request; any error ends the run."""
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(pathlib.Path(request_path).read_text())
    results: dict[str, dict[str, Any]] = {}
    for _ in range(request["rounds"]):
        for model in request["models"]:
            results[model] = measure(model, request, results.get(model))
            gc.collect()
            cleanup_dist_env_and_memory()
    pathlib.Path(results_path).write_text(json.dumps([results[model] for model in request["models"]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
