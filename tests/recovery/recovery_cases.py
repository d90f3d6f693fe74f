"""Small students, teachers and texts for tests of recovery; as a script it recovers one in a process of its own.

python tests/recovery/recovery_cases.py STUDENT OUTPUT TEACHER SETTINGS-AS-JSON [resume]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support
import tiny_models
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from llmcompressor_moe.compression import compress

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


def command(
    model: Path, output: Path, base: Path, settings: dict[str, Any], *, ranks: int = 1, resume: bool = False
) -> list[str]:
    """What recovers a student in a process of its own, or in several."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    )
    arguments = [str(model), str(output), str(base), json.dumps(settings)]
    return [sys.executable, *launcher, __file__, *arguments, *(["resume"] if resume else [])]


def environment() -> dict[str, str]:
    """One thread each, and numbers that do not depend on how many there are."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: Any, **options: Any) -> None:
    """Recover in a process of its own; see `command`."""
    subprocess.run(command(*arguments, **options), check=True, env=environment(), timeout=300)


def main(model: str, output: str, base: str, settings: str, resume: str = "") -> None:
    from llmcompressor_moe.recovery import RecoverySettings, recover

    torch.set_num_threads(1)
    recover(
        model,
        output,
        teacher=base,
        settings=RecoverySettings.model_validate_json(settings),
        resume=bool(resume),
        # Read by tests that interrupt a run.
        report=lambda entry: print(f"step {entry.step}", flush=True),
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


__all__ = [
    "BASICS",
    "command",
    "environment",
    "run",
    "same",
    "student",
    "teacher",
    "tensors",
    "text",
    "tiny_models",
]

if __name__ == "__main__":
    main(*sys.argv[1:])
