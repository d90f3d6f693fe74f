"""What vLLM gets wrong, shown on untouched models, and what is refused with the plugin in place."""

import ast
import json
import pathlib
from typing import Any

import pytest
from tiny_models import build

from llmcompressor_moe.families import exception_for
from serving.cases import PROMPTS, Case, make_case
from serving.checkpoints import save
from serving.engine import PLAIN_ROTARY, PYTHON, Result, transformers_logprobs, vllm_logprobs
from serving.families import ARCHITECTURES

pytestmark = pytest.mark.serving


def _untouched(architecture: str, folder: pathlib.Path, **values: Any) -> Case:
    model = build(architecture, **ARCHITECTURES[architecture] | values)
    return Case(save(model, {}, folder), transformers_logprobs(model, PROMPTS))


class TestWrongWithoutUs:
    """The models are untouched. When one of these tests fails, vLLM has got better: drop the setting."""

    @pytest.fixture(scope="class")
    def wrong(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Result]]:
        folder = tmp_path_factory.mktemp("wrong")
        cases = {name: _untouched(name, folder / name) for name in PLAIN_ROTARY}
        shifted = ["full_attention", "sliding_attention"] * 2
        cases["gpt_oss"] = _untouched("gpt_oss", folder / "gpt_oss", layer_types=shifted)
        results = vllm_logprobs([case.checkpoint for case in cases.values()], PROMPTS, known_settings=False)
        return {name: (case, result) for (name, case), result in zip(cases.items(), results, strict=True)}

    @pytest.mark.parametrize("architecture", PLAIN_ROTARY)
    def test_rotary_operator_on_a_cpu(self, architecture, wrong):
        case, result = wrong[architecture]
        assert result.difference(case.reference) > 0.01

    def test_gpt_oss_slides_every_other_layer_whatever_layer_types_says(self, wrong):
        case, result = wrong["gpt_oss"]
        assert result.difference(case.reference) > 0.01


# Overrides put into an untouched Mixtral, options of vLLM, and what the error must say.
REFUSED = {
    "unknown part": ({"2": {"skip": ["attention"]}}, {}, "Layer 2: `skip` names ['attention']"),
    "unread attribute": (
        {"1": {"num_local_experts": 6}, "2": {"rms_norm_eps": 0.001}},
        {},
        "Layer 2 of MixtralForCausalLM: `rms_norm_eps: 0.001` cannot be honoured",
    ),
    "unread attribute, transformers backend": (
        {"1": {"num_local_experts": 6}, "2": {"rms_norm_eps": 0.001}},
        {"model_impl": "transformers"},
        "Layer 2 of TransformersMoEForCausalLM: `rms_norm_eps: 0.001` cannot be honoured",
    ),
    # vLLM finds this one itself: the router in the checkpoint has eight rows.
    "config that lies": (
        {"2": {"num_local_experts": 6}},
        {},
        "Tried to load weights of size torch.Size([8, 64])",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    paths = []
    for per_layer_config, _, _ in REFUSED.values():
        path = make_case("mixtral", "untouched", tmp_path_factory.mktemp("refused")).checkpoint
        config = json.loads((path / "config.json").read_text()) | {"per_layer_config": per_layer_config}
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    results = vllm_logprobs(paths, PROMPTS, job_options=[options for _, options, _ in REFUSED.values()])
    return dict(zip(REFUSED, results, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_override_that_cannot_be_honoured(name, refused):
    assert refused[name].logprobs is None
    assert REFUSED[name][2] in refused[name].error


def test_routers_that_vllm_quantizes_where_the_config_does_not_leave_them_out():
    """All others are built without a quantization config, which `check` relies on."""
    (models,) = PYTHON.parents[1].glob("lib/python*/site-packages/vllm/model_executor/models")
    following = set()
    for module in models.glob("*.py"):
        for call in ast.walk(ast.parse(module.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "GateLinear":
                handed = [ast.unparse(word.value) for word in call.keywords if word.arg == "quant_config"]
                if handed not in ([], ["None"]):
                    following.add(module.stem)
    # transformers does not have the last one
    assert following == {"qwen3_moe", "lfm2_moe", "k2_horizon"}
    assert all(exception_for(name).router_follows_config for name in ("qwen3_moe", "lfm2_moe"))
    assert not exception_for("mixtral").router_follows_config
