"""Dense models made of Mixtures of Experts, on vLLM as it comes: no plugin."""

import pathlib

import pytest
import torch
from support import saved
from transformers import AutoModelForCausalLM

from llmcompressor_moe.recovery.dense import to_dense
from serving.cases import PROMPTS
from serving.engine import transformers_logprobs, vllm_logprobs

pytestmark = pytest.mark.serving

# One with other names, one with norms of queries and keys, one with biases and shared experts, one with
# multipliers, one with norms behind the sublayers, one whose own class has only dense blocks left, and one
# whose own class has one expert per layer.
FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "flex_olmo", "deepseek_v2", "olmoe"]


def test_stock_vllm_serves_dense_models(tmp_path: pathlib.Path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{i}" for row in PROMPTS * 8 for i in row))
    checkpoints, references = [], []
    for family in FAMILIES:
        path = tmp_path / f"{family}-dense"
        source = saved(family, tmp_path)
        to_dense(source, path, dataset=str(text), num_samples=8, sequence_length=40, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        checkpoints.append(path)
        references.append(transformers_logprobs(model, PROMPTS))
    results = vllm_logprobs(checkpoints, PROMPTS, plugin=False)
    for family, result, reference in zip(FAMILIES, results, references, strict=True):
        assert result.difference(reference) < 1e-4, family
