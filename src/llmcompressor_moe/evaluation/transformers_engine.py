"""A model in transformers that takes turns at prefill and decode.

    python -m llmcompressor_moe.evaluation.transformers_engine < REQUEST

measures the memory that turns take on a CPU, in a process of its own: see `resident_peaks`.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llmcompressor_moe.check.expected import model_class
from llmcompressor_moe.checkpoint.reader import load_trimmed_moe
from llmcompressor_moe.evaluation.resident_memory import forget_peak, peak_resident_nbytes, resident_nbytes
from llmcompressor_moe.evaluation.turns import Turn
from llmcompressor_moe.inspection import read_config

__all__ = ["TransformersModel", "resident_peaks"]


class TransformersModel:
    """One checkpoint, loaded in the dtype that it is stored in.

    :param path: checkpoint directory
    :param device: as torch names it
    :raises ValueError: transformers cannot build the model
    """

    def __init__(self, path: str | Path, device: str = "cpu"):
        self.device = torch.device(device)
        cls = model_class(read_config(path)) or AutoModelForCausalLM
        before = self._allocated()
        with load_trimmed_moe():
            model = cls.from_pretrained(path, local_files_only=True)
        self.model = model.eval().to(self.device)
        self.nbytes = self._allocated() - before
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._prefill_options = {"logits_to_keep": 1} if last_only else {}

    @torch.no_grad()
    def turn(self, rows: Sequence[Sequence[int]], new_tokens: int) -> Turn:
        """Continue rows of token ids, equally long, greedily by ``new_tokens`` each.

        Memory is told on a GPU: the most that torch had allocated, less what other models held before.

        :raises ValueError: the model keeps no cache
        """
        tokens = torch.tensor([list(row) for row in rows], device=self.device)
        others = self._allocated() - self.nbytes
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = self._now()
        output = self.model(input_ids=tokens, use_cache=True, **self._prefill_options)
        tokens = output.logits[:, -1:].argmax(-1)
        first = self._now()
        if output.past_key_values is None:
            raise ValueError(
                f"{type(self.model).__name__} keeps no cache, so that its decode cannot be measured."
            )
        for _ in range(new_tokens - 1):
            output = self.model(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True)
            tokens = output.logits[:, -1:].argmax(-1)
        end = self._now()
        if self.device.type != "cuda":
            return Turn(first - start, end - first, str(self.device))
        return Turn(
            first - start,
            end - first,
            torch.cuda.get_device_name(self.device),
            torch.cuda.max_memory_allocated(self.device) - others,
            "most bytes that torch allocated on the GPU, less what other models held",
        )

    def close(self) -> None:
        """Let go of the model."""
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def resident_peaks(
    path: str | Path, shapes: Sequence[tuple[Sequence[Sequence[int]], int]]
) -> list[int | None]:
    """The most memory that turns on a CPU take: by how much a process grows that does nothing else.

    The process counts what is resident before it loads the model, loads it, and for each turn reads the peak since
    the turn began. Pages of the checkpoint's files that are mapped count. None where the system does not tell.

    :param shapes: rows of token ids and new tokens of each turn; memory that an allocator keeps from a turn counts
        for later ones, so give the smallest first
    :raises RuntimeError: the process failed; with the end of its error
    """
    request = {"path": str(path), "turns": [[[list(row) for row in rows], new] for rows, new in shapes]}
    run = subprocess.run(
        [sys.executable, "-m", "llmcompressor_moe.evaluation.transformers_engine"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    if run.returncode:
        end = "\n".join(run.stderr.strip().splitlines()[-10:])
        raise RuntimeError(f"{path}: measuring its memory failed:\n{end}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def _answer_resident_peaks() -> None:
    request = json.load(sys.stdin)
    before = resident_nbytes()
    model = TransformersModel(request["path"])
    peaks = []
    for rows, new_tokens in request["turns"]:
        fresh = forget_peak()
        model.turn(rows, new_tokens)
        peak = peak_resident_nbytes()
        peaks.append(peak - before if fresh and peak is not None else None)
    print(json.dumps(peaks))


if __name__ == "__main__":
    _answer_resident_peaks()
