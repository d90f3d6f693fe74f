"""What RouterAwareQuantModifier writes, in vLLM, against transformers on the dequantized weights.

One process of vLLM serves unquantized experts with its own kernels; another serves quantized ones, which
need kernels that a CPU does not have, through expert_shim.py.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import support
from transformers import PreTrainedModel

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier, RouterAwareQuantModifier
from llmcompressor_moe.check import check_checkpoint
from serving.cases import PROMPTS, Case
from serving.checkpoints import moe_name
from serving.engine import FLOAT32_NOISE, Result, transformers_logprobs, vllm_logprobs
from serving.families import ARCHITECTURES
from serving.quantize import dequantized, write_plan

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"]
# Families whose own checkpoints hold all experts of a layer in one tensor; compressed ones stand alone.
FUSED = ["granitemoe", "granitemoe_swa", "llama4_text"]

GROUP = 32
INTEGERS = ["W8A16", "W4A16", "UNQUANTIZED"]


@dataclass(frozen=True)
class Variant:
    """A recipe: what is cut first, and how precision is chosen.

    `plan` names the schemes of the MoE layers in turn, `fields` are the modifier's.
    """

    cut: Sequence[Callable[[], Any]] = ()
    plan: Sequence[str | Sequence[str]] = ()
    fields: Any = None


def _uneven() -> ExpertDropModifier:
    return ExpertDropModifier(experts={2: [3, 4], 3: [0, 3, 5, 6]})


SHIMMED = {
    "8 and 4 bit": Variant(fields={"schemes": ["W8A16", "W4A16"], "target_bits": 6.5}),
    # The weights are float32: 32 bits each where they stay as they are.
    "16 and 4 bit": Variant(fields={"schemes": ["UNQUANTIZED", "W4A16"], "target_bits": 20}),
    "layer drop": Variant([lambda: LayerDropModifier(layers=[2])], ["W8A16", "W4A16", "W4A16"]),
    "uneven experts, attention, dense": Variant(
        [_uneven], INTEGERS, {"attention_scheme": "W8A16", "dense_scheme": "W4A16"}
    ),
    "fp8, int8, nvfp4, mxfp4": Variant(plan=["FP8_DYNAMIC", "W8A8", "NVFP4A16", "MXFP4A16"]),
    "fused family": Variant(plan=["W8A16", "W4A16"]),
    "fused family, some in 16 bit": Variant(plan=["W8A16", "UNQUANTIZED"]),
    # What is refused without it.
    "some in 16 bit, research": Variant(plan=["W8A16", "UNQUANTIZED"], fields={"servable": False}),
    "research": Variant(plan=["W4A16"], fields={"servable": False}),
    "precision per expert": Variant(plan=[["W4A16", "W8A16"] * 4], fields={"granularity": "expert"}),
}
SERVED = [
    *((family, variant) for variant in list(SHIMMED)[:4] for family in FAMILIES),
    *((family, "fp8, int8, nvfp4, mxfp4") for family in ("mixtral", "qwen3_moe")),
    *((family, "fused family") for family in FUSED),
    *((family, "fused family, some in 16 bit") for family in FUSED if family != "llama4_text"),
]
KINDS = {"16 and 4 bit": 1, "fp8, int8, nvfp4, mxfp4": 4, "fused family, some in 16 bit": 1}
# What vLLM does with them: part of its error, or None where it answers, but wrongly.
NOT_SERVED = {
    ("gpt_oss", "research"): ("moe-family", None),
    ("llama4_text", "some in 16 bit, research"): ("moe-family", "KeyError"),
    ("mixtral", "precision per expert"): ("moe-mixed-schemes", "size of tensor"),
}

NATIVE = {
    "unquantized": Variant(plan=["UNQUANTIZED"]),
    "attention in fp8": Variant(plan=["UNQUANTIZED"], fields={"attention_scheme": "FP8_DYNAMIC"}),
    # vLLM's kernel for int4 on a CPU computes in bfloat16 only.
    "bfloat16": Variant(plan=["UNQUANTIZED"]),
    "attention in int4, bfloat16": Variant(plan=["UNQUANTIZED"], fields={"attention_scheme": "W4A16"}),
}


def _oneshot(family: str, variant: Variant, folder: pathlib.Path) -> pathlib.Path:
    model = support.load(support.saved(family, folder, **ARCHITECTURES.get(family, {})))
    output = folder / "quantized"
    fields = {"group_size": GROUP, **(variant.fields or {})}
    if variant.plan:
        moes = [i for i, layer in enumerate(model.model.layers) if moe_name(layer)]
        schemes = {layer: variant.plan[n % len(variant.plan)] for n, layer in enumerate(moes)}
        fields["plan_path"] = str(write_plan(folder / "plan.json", schemes, GROUP))
    recipe = [*(cut() for cut in variant.cut), RouterAwareQuantModifier(**fields)]
    support.trim(model, recipe, output_dir=str(output), no_data=bool(variant.plan))
    return output


def _served(
    wanted: Sequence[tuple[str, str]],
    variants: dict[str, Variant],
    reference: Callable[[pathlib.Path], PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
    **options: Any,
) -> dict[tuple[str, str], tuple[Case, Result]]:
    cases = {}
    for family, name in wanted:
        path = _oneshot(family, variants[name], tmp_path_factory.mktemp("router-aware"))
        cases[family, name] = Case(path, transformers_logprobs(reference(path), PROMPTS))
    results = vllm_logprobs([case.checkpoint for case in cases.values()], PROMPTS, **options)
    return {key: (case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


@pytest.fixture(scope="module")
def shimmed(request, tmp_path_factory) -> dict[tuple[str, str], tuple[Case, Result]]:
    wanted = _asked_for(request, "shimmed", [*SERVED, *NOT_SERVED])
    return _served(
        wanted, SHIMMED, lambda path: dequantized(support.load(path)), tmp_path_factory, unpack_experts=True
    )


@pytest.fixture(scope="module")
def native(request, tmp_path_factory) -> dict[tuple[str, str], tuple[Case, Result]]:
    wanted = _asked_for(request, "native", [(family, variant) for variant in NATIVE for family in FAMILIES])
    dtypes = [{"dtype": "bfloat16" if "bfloat16" in variant else "float32"} for _, variant in wanted]
    return _served(wanted, NATIVE, support.load, tmp_path_factory, job_options=dtypes)


def _asked_for(request: Any, fixture: str, known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The cases of the tests that run, so that one test alone does not build them all."""
    items = [item for item in request.session.items if fixture in getattr(item, "fixturenames", ())]
    keys = {
        (item.callspec.params["family"], item.callspec.params["variant"])
        for item in items
        if item.module is request.module
    }
    keys |= {(family, "bfloat16") for family, variant in keys if "int4" in variant}
    return [key for key in known if key in keys]


def _schemes(path: pathlib.Path) -> set[tuple]:
    """Kinds of weight quantization in a checkpoint: bits, type, strategy."""
    groups = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    return {tuple(group["weights"][name] for name in ("num_bits", "type", "strategy")) for group in groups}


@pytest.mark.serving
@pytest.mark.parametrize(("family", "variant"), SERVED)
def test_quantized_experts(family, variant, shimmed):
    case, result = shimmed[family, variant]
    assert check_checkpoint(case.checkpoint).ok
    assert len(_schemes(case.checkpoint)) == KINDS.get(variant, 2)
    assert result.difference(case.reference) < FLOAT32_NOISE


@pytest.mark.serving
@pytest.mark.parametrize(("family", "variant"), NOT_SERVED)
def test_vllm_fails_where_check_says_so(family, variant, shimmed):
    case, result = shimmed[family, variant]
    code, error = NOT_SERVED[family, variant]
    assert [finding.code for finding in check_checkpoint(case.checkpoint).errors] == [code]
    if error is None:
        assert result.difference(case.reference) > 0.1
    else:
        assert error in result.error


@pytest.mark.serving
@pytest.mark.parametrize("variant", ["unquantized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_experts_without_help(family, variant, native):
    case, result = native[family, variant]
    assert check_checkpoint(case.checkpoint).ok
    assert result.difference(case.reference) < FLOAT32_NOISE


@pytest.mark.serving
@pytest.mark.parametrize("variant", ["attention in fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_attention_without_help(family, variant, native):
    """Inputs are rounded, too: noise in the last digit can put one of them on the next of fp8's coarse steps."""
    case, result = native[family, variant]
    assert check_checkpoint(case.checkpoint).ok
    differences = result.differences(case.reference)
    assert differences.quantile(0.8) < FLOAT32_NOISE
    assert differences.max() < 1e-2


@pytest.mark.serving
@pytest.mark.parametrize("variant", ["attention in int4, bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int4_attention_without_help(family, variant, native):
    """Within what bfloat16 costs without any quantization."""
    case, result = native[family, variant]
    assert check_checkpoint(case.checkpoint).ok
    if "no attribute 'cpu_gemm_wna16'" in (result.error or ""):
        pytest.skip("vLLM has no int4 kernel for this CPU")
    plain, plain_result = native[family, "bfloat16"]
    noise = plain_result.differences(plain.reference)
    assert result.differences(case.reference).median() < 2 * noise.median()
