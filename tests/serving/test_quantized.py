"""Packed int4 experts in checkpoints whose layers differ: the right scheme must reach every layer.

A CPU has no kernel for them, so vLLM's unquantized MoE computes with what its own loaders loaded
(expert_shim.py).
"""

import pytest
from tiny_models import build

from serving.cases import ARCHITECTURES, PROMPTS, VARIANTS, Case
from serving.checkpoints import moe_name, save
from serving.engine import Result, transformers_logprobs, vllm_logprobs
from serving.quantize import pack_experts, round_experts

pytestmark = pytest.mark.serving

# Families that have tensors per expert.
QUANTIZED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Result]]:
    folder = tmp_path_factory.mktemp("quantized")
    cases = {}
    for architecture in QUANTIZED:
        model = build(architecture, **ARCHITECTURES[architecture])
        changes = VARIANTS["layer and expert drop"](model)
        # Group sizes by layer; layer 0, where it has experts, keeps them unquantized.
        groups = {i: 64 if i == 1 else 32 for i in range(1, 4) if moe_name(model.model.layers[i])}
        round_experts(model, groups)
        path = save(model, changes, folder / architecture)
        pack_experts(path, groups)
        cases[architecture] = Case(path, transformers_logprobs(model, PROMPTS))
    results = vllm_logprobs([case.checkpoint for case in cases.values()], PROMPTS, unpack_experts=True)
    return {name: (case, result) for (name, case), result in zip(cases.items(), results, strict=True)}


@pytest.mark.parametrize("architecture", QUANTIZED)
def test_vllm_scores_like_transformers_on_the_rounded_weights(architecture, served):
    case, result = served[architecture]
    assert result.difference(case.reference) < 1e-4
