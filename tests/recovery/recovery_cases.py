"""Small students, teachers and texts for tests of recovery, and recovery in processes of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support
import tiny_models
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from llmcompressor_moe.compression import compress
from llmcompressor_moe.recovery import RecoverySettings, recover
from llmcompressor_moe.recovery.progress import LogEntry

DROPS = "default_stage: {default_modifiers: {ExpertDropModifier: {experts: {1: [0, 3], 2: [5]}}}}"
BASICS = {"length": 16, "batch_size": 4, "steps": 6, "learning_rate": 2e-3, "log_every": 1, "use_cpu": True}


def teacher(directory: Path, family: str = "mixtral") -> Path:
    """A tiny model in float32, so that what is saved is what was trained."""
    return support.saved(family, directory)


def dense() -> MistralForCausalLM:
    """A tiny model without experts."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=support.VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def student(directory: Path, base: Path, recipe: str = DROPS, name: str = "student") -> Path:
    """The teacher after a recipe that needs no data."""
    path = directory / f"{name}.yaml"
    path.write_text(recipe)
    compress(base, path, None, directory / name)
    return directory / name


def text(directory: Path, documents: int = 20, words: int = 40, name: str = "text.txt") -> Path:
    """Words that are one token each for the tiny tokenizer, which finds t0, t1 and t2 in longer words, too."""
    ids = torch.randint(30, 100, (documents, words), generator=torch.Generator().manual_seed(3)).tolist()
    path = directory / name
    path.write_text("\n\n".join(" ".join(f"t{token}" for token in row) for row in ids))
    return path


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same weights, bit by bit."""
    ours, theirs = tensors(first), tensors(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def in_a_process(
    student: Path, output: Path, base: Path, settings: dict[str, Any], *, killed_at: int | None = None
) -> None:
    """Recover in a process that was forked: alone, or one rank of several.

    :param killed_at: step after which the process kills itself with a signal that nobody can catch
    """

    def report(entry: LogEntry) -> None:
        if entry.step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    # What this process was in the run before is not what its copy is.
    AcceleratorState._reset_state(reset_partial_state=True)
    recover(student, output, teacher=base, settings=RecoverySettings.model_validate(settings), report=report)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


__all__ = [
    "BASICS",
    "in_a_process",
    "same",
    "student",
    "teacher",
    "tensors",
    "text",
    "tiny_models",
]
