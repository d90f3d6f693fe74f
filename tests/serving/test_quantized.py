"""Quantized experts in checkpoints whose layers differ: the right scheme must reach every layer.

A CPU has no kernel for them, so vLLM's unquantized MoE computes with what its own loaders loaded
(expert_shim.py); for an FP8 cache not every CPU has one (cache_shim.py).
"""

import pathlib
from collections.abc import Callable

import pytest
import support
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers.quantization import QuantizationModifier
from stored_models import FP8, FP8_QWEN, MXFP4, fp8, mxfp4, stored_as
from tiny_models import build

from llmcompressor_moe import (
    BlockDropModifier,
    ExpertDropModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
    open_moe,
)
from llmcompressor_moe.loading import load_callable
from serving.cases import PROMPTS, RECIPES, VARIANTS, Case, oneshot, untouched_reference
from serving.checkpoints import moe_name, save
from serving.engine import FLOAT32_NOISE, Result, transformers_logprobs, vllm_logprobs
from serving.families import ARCHITECTURES
from serving.quantize import dequantized, pack_experts, round_experts

pytestmark = pytest.mark.serving

KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def _packed_by_hand(architecture: str, folder: pathlib.Path) -> Case:
    """Without this project: the reference has the rounded weights."""
    model = build(architecture, **ARCHITECTURES[architecture])
    changes = VARIANTS["layer and expert drop"](model)
    # Group sizes by layer; layer 0, where it has experts, keeps them unquantized.
    groups = {i: 64 if i == 1 else 32 for i in range(1, 4) if moe_name(model.model.layers[i])}
    round_experts(model, groups)
    path = save(model, changes, folder / architecture)
    pack_experts(path, groups)
    return Case(path, transformers_logprobs(model, PROMPTS))


def _trimmed_and_quantized(model_type: str, layers: list[int]) -> list:
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=[r"re:.*\.experts\.\d+\..*"], weights=weights)
    quantize = QuantizationModifier(config_groups={"experts": scheme}, ignore=["lm_head"])
    return [*RECIPES["layers and experts"](model_type, layers), quantize]


def _by_one_recipe(architecture: str, folder: pathlib.Path) -> Case:
    """Drops and llm-compressor's quantization in one recipe."""
    path = oneshot(architecture, _trimmed_and_quantized, folder)
    return Case(path, transformers_logprobs(support.load(path), PROMPTS))


def _cut_as_stored(
    quantized: pathlib.Path, plain: pathlib.Path, recipe: Callable[[], list], folder: pathlib.Path
) -> Case:
    """A quantized checkpoint that was opened and cut; the reference is the same cut of its plain values."""
    output = folder / "trimmed"
    support.trim(open_moe(quantized), recipe(), output_dir=str(output), no_data=True)
    return Case(output, transformers_logprobs(support.trim(open_moe(plain), recipe(), no_data=True), PROMPTS))


def _uneven() -> list:
    return [LayerDropModifier(layers=[3]), ExpertDropModifier(experts={1: [3, 4], 2: [0, 3, 5, 6]})]


def _fp8(architecture: str, folder: pathlib.Path) -> Case:
    """Blocks of FP8, as DeepSeek stores them."""
    config = FP8_QWEN if architecture == "qwen3_moe" else FP8
    stored = stored_as(architecture, folder, fp8, config, **ARCHITECTURES[architecture])
    return _cut_as_stored(*stored, _uneven, folder)


def _mxfp4(architecture: str, folder: pathlib.Path) -> Case:
    """MXFP4, as gpt-oss is stored."""

    def recipe() -> list:
        return [BlockDropModifier(blocks=[2, 3]), ExpertDropModifier(experts={0: [1, 4], 1: [0, 3, 5, 6]})]

    return _cut_as_stored(*stored_as(architecture, folder, mxfp4, MXFP4), recipe, folder)


def _int4(architecture: str, folder: pathlib.Path) -> Case:
    """Experts that an earlier run packed."""
    packed, plain = folder / "packed", folder / "plain"
    source = support.saved(architecture, folder, **ARCHITECTURES[architecture])
    quantize = RouterAwareQuantModifier(schemes=["W8A16", "W4A16"], group_size=32, target_bits=6.5)
    support.trim(open_moe(source), quantize, output_dir=str(packed))
    open_moe(packed, requantize=True).save_pretrained(plain)
    return _cut_as_stored(packed, plain, _uneven, folder)


def _cached_in_fp8(architecture: str, folder: pathlib.Path) -> Case:
    """Keys and values rounded by scales of the checkpoint, whose blocks are renumbered."""
    packed, output = folder / "packed", folder / "trimmed"
    source = support.saved(architecture, folder, **ARCHITECTURES[architecture])
    quantize = RouterAwareQuantModifier(
        schemes=["W8A16"], group_size=32, target_bits=9, kv_cache_scheme=KV_CACHE
    )
    support.trim(open_moe(source), quantize, output_dir=str(packed))
    cut = [BlockDropModifier(blocks=[1]), ExpertDropModifier(experts={2: [3, 4], 3: [0, 3, 5, 6]})]
    support.trim(open_moe(packed), cut, output_dir=str(output), no_data=True)
    return Case(output, transformers_logprobs(load_callable(output, device="cpu"), PROMPTS))


KINDS = {
    "packed by hand": (_packed_by_hand, ["mixtral", "deepseek_v3"]),
    # Families whose experts vLLM loads one by one, which is how compressed experts are written.
    "one recipe": (
        _by_one_recipe,
        ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3"],
    ),
    "stored in FP8": (_fp8, ["deepseek_v3", "qwen3_moe"]),
    "stored in MXFP4": (_mxfp4, ["gpt_oss"]),
    "stored in 8 and 4 bit": (_int4, ["mixtral"]),
    "cached in FP8": (_cached_in_fp8, ["qwen3_moe"]),
}
ALL = [(kind, architecture) for kind, (_, architectures) in KINDS.items() for architecture in architectures]
ROUNDED_CACHE = [key for key in ALL if key[0] == "cached in FP8"]


@pytest.fixture(scope="module")
def served(request, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Case, Result]]:
    items = [item for item in request.session.items if item.module is request.module]
    keys = [(item.callspec.params["kind"], item.callspec.params["architecture"]) for item in items]
    cases = {key: KINDS[key[0]][0](key[1], tmp_path_factory.mktemp("quantized")) for key in keys}
    results = vllm_logprobs([case.checkpoint for case in cases.values()], PROMPTS, unpack_experts=True)
    return {key: (case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


@pytest.mark.parametrize(("kind", "architecture"), [key for key in ALL if key not in ROUNDED_CACHE])
def test_vllm_scores_like_transformers(kind, architecture, served):
    case, result = served[kind, architecture]
    assert Result(untouched_reference(architecture)).difference(case.reference) > 0.1
    assert result.difference(case.reference) < FLOAT32_NOISE


@pytest.mark.parametrize(("kind", "architecture"), ROUNDED_CACHE)
def test_rounded_keys_and_values(kind, architecture, served):
    """Noise in the last digit can put one of them on the next of fp8's coarse steps."""
    case, result = served[kind, architecture]
    differences = result.differences(case.reference)
    assert differences.quantile(0.8) < FLOAT32_NOISE
    assert differences.max() < 1e-2
    unrounded = transformers_logprobs(dequantized(support.load(case.checkpoint)), PROMPTS)
    assert result.difference(unrounded) > 1e-2
