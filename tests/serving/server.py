"""Runs vLLM's OpenAI-compatible server for a test."""

import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from serving.engine import ENVIRONMENT, PYTHON


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def api_server(checkpoint: pathlib.Path, log: pathlib.Path, timeout: float = 300) -> Iterator[str]:
    """Serve `checkpoint` under the name "model"; yields the base address once it answers.

    Raises RuntimeError with the end of the log when the server stops or takes longer than `timeout` seconds.
    """
    port = _free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4"]
    command += ["--max-num-batched-tokens", "256", "--skip-tokenizer-init"]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, time.monotonic() + timeout, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen, address: str, deadline: float, log: pathlib.Path) -> None:
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"the server did not come up:\n{log.read_text()[-6000:]}")


def server_logprobs(address: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every prompt token but the first, per prompt, from the completions endpoint."""
    scores = []
    for prompt in prompts:
        request = {"model": "model", "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0}
        answer = _post(f"{address}/v1/completions", request)
        entries = answer["choices"][0]["prompt_logprobs"]
        scores.append([e[str(token)]["logprob"] for token, e in zip(prompt[1:], entries[1:], strict=True)])
    return scores


def _post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
