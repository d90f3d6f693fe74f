"""Routers of checkpoints that GPTQ, AWQ, FP8, ModelOpt and bitsandbytes made: only names and dtypes are real."""

import json
import re

import pytest
import tiny_models
import torch
from breaking import codes, edit_tensors, errors, finding, set_config
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.quantizers.base import HfQuantizer

from llmcompressor_moe.check import check_checkpoint

I32, U8, F8 = torch.int32, torch.uint8, torch.float8_e4m3fn
GATE = r"\.gate$"
# Method -> what config.json says, and the tensors that a Linear of 64 x 64 becomes.
FORMATS = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        {"qweight": (I32, 8, 64), "qzeros": (I32, 2, 8), "scales": (torch.half, 2, 64), "g_idx": (I32, 64)},
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        {"qweight": (I32, 64, 8), "qzeros": (I32, 2, 8), "scales": (torch.half, 2, 64)},
    ),
    "fp8": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {"weight": (F8, 64, 64), "weight_scale_inv": (torch.float, 1, 1)},
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
        {"weight": (U8, 64, 32), "weight_scale": (F8, 64, 4), "weight_scale_2": (torch.float,)},
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {
            "weight": (U8, 2048, 1),
            "weight.absmax": (U8, 64),
            "weight.quant_map": (torch.float, 16),
            "weight.quant_state.bitsandbytes__nf4": (U8, 80),
        },
    ),
}
# The ways in which each says that routers stay plain.
LEFT_ALONE = [
    ("gptq", {"dynamic": {r"-:.*\.gate$": {}}}),
    ("gptq", {}),  # readers look into the files
    ("awq", {"modules_to_not_convert": ["gate"]}),
    ("awq", {}),
    ("fp8", {"modules_to_not_convert": [f"model.layers.{i}.mlp.gate" for i in range(4)]}),
    ("fp8", {"ignored_layers": [f"model.layers.{i}.mlp.gate" for i in range(4)]}),
    ("modelopt", {"ignore": ["model.layers.*.mlp.gate"]}),
    ("modelopt", {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["*mlp.gate*"]}}),
    ("bitsandbytes", {"llm_int8_skip_modules": ["lm_head", "gate"]}),
]


def store(path, method: str, plain: str, **more) -> None:
    """Store all Linears as a method does, but those that match ``plain``."""
    config, parts = FORMATS[method]
    set_config(path, quantization_config=config | more)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if re.search(r"(_proj|gate|w\d)\.weight$", n)]:
            module = name.removesuffix(".weight")
            if not re.search(plain, module):
                del tensors[name]
                tensors |= {
                    f"{module}.{leaf}": torch.zeros(shape).to(dtype)
                    for leaf, (dtype, *shape) in parts.items()
                }

    edit_tensors(path, change)


@pytest.mark.parametrize(("method", "config"), LEFT_ALONE)
def test_routers_that_are_left_alone(good, method, config):
    path = good("qwen3_moe")
    store(path, method, GATE, **config)
    report = check_checkpoint(path)
    assert codes(report) == set()
    assert codes(report, "warning") == {"quant-method-unknown"}


@pytest.mark.parametrize(("method", "config"), [LEFT_ALONE[i] for i in (0, 1, 2, 4, 6, 8)])
def test_routers_that_are_stored_quantized(good, method, config):
    """Whatever the config says."""
    path = good("mixtral" if method == "gptq" else "qwen3_moe")
    store(path, method, "^nothing$", **config)
    assert errors(path) == {"router-quantized"}
    found = finding(path, "router-quantized")
    assert re.fullmatch(r"model\.layers\.\d\..*\.gate", found.subject)
    assert "4 modules alike" in found.message


@pytest.mark.parametrize("method", FORMATS)
def test_gates_of_shared_experts_that_are_stored_quantized(good, method):
    path = good("qwen2_moe")
    store(path, method, r"mlp\.gate$", **{"modules_to_not_convert": ["mlp.gate"]})
    assert errors(path) == {"router-quantized"}
    assert finding(path, "router-quantized").subject.endswith("shared_expert_gate")


@pytest.mark.parametrize(
    ("model_type", "method", "reader"),
    [
        # vLLM hands its quantization config to the routers of Qwen3-MoE, and to none of Mixtral's or Qwen2-MoE's
        ("qwen3_moe", "fp8", "vLLM"),
        ("qwen3_moe", "modelopt", "vLLM"),
        ("mixtral", "fp8", None),
        ("mixtral", "modelopt", None),
        # transformers quantizes every nn.Linear that is not left out: Qwen2-MoE's gate of the shared expert is one
        ("qwen2_moe", "fp8", "transformers"),
        ("qwen2_moe", "bitsandbytes", "transformers"),
        ("qwen2_moe", "awq", "transformers"),
        ("qwen2_moe", "modelopt", None),
        ("qwen2_moe", "gptq", None),
    ],
)
def test_plain_routers_that_the_config_does_not_leave_out(good, model_type, method, reader):
    path = good(model_type)
    store(path, method, r"gate$")
    assert errors(path) == ({"router-not-ignored"} if reader else set())
    if reader:
        assert f"{reader} quantizes it" in finding(path, "router-not-ignored").message


def test_transformers_quantizes_the_modules_that_the_check_says() -> None:
    """Gates of shared experts are Linears to it, routers are not."""
    model = tiny_models.build("qwen2_moe", num_layers=1).to("meta")
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, None)
    replace_with_fp8_linear(model, skipped, FineGrainedFP8Config(), pre_quantized=True)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.shared_expert_gate, FP8Linear)
    assert not isinstance(mlp.gate, FP8Linear)


def test_modelopt_says_it_in_a_file_of_its_own(good):
    path = good("qwen3_moe")
    store(path, "modelopt", GATE)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert "quant-undeclared" in errors(path)
    beside = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.*.mlp.gate"]},
    }
    (path / "hf_quant_config.json").write_text(json.dumps(beside))
    report = check_checkpoint(path)
    assert codes(report) == set()
    assert codes(report, "warning") == {"quant-method-unknown"}
    beside["quantization"]["exclude_modules"] = ["lm_head"]
    (path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert errors(path) == {"router-not-ignored"}
