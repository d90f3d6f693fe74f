"""What `check --tensor-parallel` says of sizes is what vLLM says when it builds the model at those sizes."""

import json
import os
import pathlib
import subprocess
from dataclasses import dataclass, field
from typing import Any

import pytest
import support
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from llmcompressor.modifiers.quantization import QuantizationModifier

from llmcompressor_moe.check import check_checkpoint
from serving.engine import ENVIRONMENT, PYTHON

pytestmark = pytest.mark.serving

SCRIPT = pathlib.Path(__file__).with_name("one_of_ranks.py")
EXPERTS = [r"re:.*experts\.\d+\..*_proj$"]
ATTENTION = [r"re:.*self_attn\.(q|k|v|o)_proj$"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def packed(targets: list[str], **weights: Any) -> QuantizationScheme:
    """4-bit integers."""
    arguments = QuantizationArgs(**{"num_bits": 4, "type": "int", "symmetric": True} | weights)
    return QuantizationScheme(targets=targets, weights=arguments)


@dataclass(frozen=True)
class Case:
    """Sizes of a tiny model, how it is split, and the codes of what `check` finds."""

    codes: set[str]
    sizes: dict[str, Any] = field(default_factory=dict)
    ranks: int = 4
    expert_parallel: bool = False
    family: str = "qwen3_moe"
    scheme: QuantizationScheme | None = None

    def write(self, folder: pathlib.Path) -> dict[str, Any]:
        """Save the model; the job of building it."""
        sizes = {"num_layers": 1, **HEADS, **self.sizes}
        path = support.saved(self.family, folder, **sizes)
        if self.scheme is not None:
            recipe = QuantizationModifier(config_groups={"some": self.scheme})
            support.trim(
                support.load(path), recipe, no_data=True, output_dir=str(path := folder / "quantized")
            )
        return {
            "model": str(path),
            "tensor_parallel": self.ranks,
            "expert_parallel": self.expert_parallel,
        }


CASES = {
    "fits": Case(set()),
    "vocabulary": Case(set(), {"vocab_size": 130}),
    "vocabulary-padded": Case(
        set(),
        {"vocab_size": 130, "num_attention_heads": 6, "num_key_value_heads": 3, "moe_intermediate_size": 96},
        ranks=3,
    ),
    "vocabulary-torn": Case(
        {"parallel-vocab"},
        {"vocab_size": 128, "num_attention_heads": 6, "num_key_value_heads": 3, "moe_intermediate_size": 96},
        ranks=3,
    ),
    "heads": Case({"parallel-heads"}, {"num_attention_heads": 6}),
    "one-key": Case(set(), {"num_key_value_heads": 1}),
    "keys": Case({"parallel-heads"}, {"num_attention_heads": 12, "num_key_value_heads": 3}),
    "latent-attention": Case(
        set(), {"num_attention_heads": 4, "num_key_value_heads": 3}, ranks=2, family="deepseek_v3"
    ),
    "linear-attention": Case(
        {"parallel-heads"}, {"linear_num_key_heads": 3, "linear_num_value_heads": 6}, family="qwen3_next"
    ),
    "experts-width": Case({"parallel-width"}, {"moe_intermediate_size": 66}),
    "experts-whole": Case(set(), {"moe_intermediate_size": 66}, expert_parallel=True),
    "experts-fused": Case({"parallel-width"}, {"intermediate_size": 66}, family="granitemoe"),
    "experts-uneven": Case(set(), {"num_experts": 6}, expert_parallel=True),
    "experts-few": Case({"parallel-experts"}, {"num_experts": 3}, expert_parallel=True),
    "shared-expert": Case({"parallel-width"}, {"shared_expert_intermediate_size": 66}, family="qwen2_moe"),
    "groups": Case(set(), scheme=packed(ATTENTION, strategy="group", group_size=32)),
    "groups-torn": Case({"parallel-group-size"}, scheme=packed(ATTENTION, strategy="group", group_size=64)),
    "experts-groups": Case(set(), ranks=2, scheme=packed(EXPERTS, strategy="group", group_size=32)),
    "experts-groups-torn": Case(
        {"parallel-group-size"}, scheme=packed(EXPERTS, strategy="group", group_size=32)
    ),
    "experts-groups-whole": Case(
        set(), expert_parallel=True, scheme=packed(EXPERTS, strategy="group", group_size=32)
    ),
    "zero-points-torn": Case(
        {"parallel-group-size"},
        {"hidden_size": 32, "moe_intermediate_size": 8},
        scheme=packed(EXPERTS, strategy="group", group_size=2, symmetric=False),
    ),
    "words-torn": Case(
        {"parallel-group-size"}, {"head_dim": 12}, scheme=packed(ATTENTION, strategy="channel")
    ),
    "blocks": Case(set(), {"head_dim": 128}, ranks=2, scheme=preset_name_to_scheme("FP8_BLOCK", ATTENTION)),
    "blocks-torn": Case(
        {"parallel-group-size"}, {"head_dim": 64}, scheme=preset_name_to_scheme("FP8_BLOCK", ATTENTION)
    ),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return {name: case.write(folder / name) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def built(jobs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What stopped vLLM from building each, None where nothing did."""
    folder = tmp_path_factory.mktemp("built")
    asked, answered = folder / "jobs.json", folder / "answers.json"
    asked.write_text(json.dumps(list(jobs.values())))
    command = [PYTHON, SCRIPT, asked, answered]
    run = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=1800)
    assert answered.exists(), run.stderr[-8000:]
    return dict(zip(jobs, json.loads(answered.read_text()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_refused_exactly_where_vllm_refuses_them(name, jobs, built):
    case, job = CASES[name], jobs[name]
    expert_parallel = case.ranks if case.expert_parallel else 1
    report = check_checkpoint(job["model"], tensor_parallel=case.ranks, expert_parallel=expert_parallel)
    assert {finding.code for finding in report.errors} == case.codes
    assert (built[name] is not None) == bool(case.codes), built[name]
