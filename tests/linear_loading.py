"""Trim a model that `load_quantizable_moe` loaded, in a process of its own: what that registers stays for good.

That way of loading imports every model of transformers, some of which want torchvision, which has no CPU
build here: a stand-in is enough, nothing of it is called.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from unittest.mock import MagicMock

import support
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from transformers import AutoModelForCausalLM

from llmcompressor_moe import ExpertDropModifier

_PARTS = ("", ".io", ".ops", ".ops.boxes", ".transforms", ".transforms.functional", ".transforms.v2")
_NEWER = (".transforms.v2.functional", ".tv_tensors")


def stand_in_for_torchvision() -> None:
    for part in (*_PARTS, *_NEWER):
        name = f"torchvision{part}"
        module = MagicMock()
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules.setdefault(name, module)


def main(base: Path, out: Path, logits: Path) -> None:
    stand_in_for_torchvision()
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert isinstance(model.model.layers[0].mlp.experts, LinearExperts2D)
    model = support.trim(model, [ExpertDropModifier(num_drop=2)], output_dir=str(out))
    # The process can load stock checkpoints of the family again.
    torch.testing.assert_close(support.logits(support.load(out)), support.logits(model), atol=1e-5, rtol=0)
    torch.save(support.logits(model), logits)
