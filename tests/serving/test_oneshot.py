"""What `oneshot` writes with this project's modifiers, in vLLM, against models trimmed by hand."""

import pathlib
from collections.abc import Callable

import pytest
import support
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import build
from transformers import PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from serving.cases import ARCHITECTURES, BLOCKS, PROMPTS, Case, make_case
from serving.checkpoints import moe_name
from serving.engine import FLOAT32_NOISE, Result, transformers_logprobs, vllm_logprobs

pytestmark = pytest.mark.serving


def _moes(model: PreTrainedModel) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if moe_name(layer)]


# The same cuts as VARIANTS in cases.py, in the words of a recipe.
RECIPES: dict[str, Callable[[PreTrainedModel], list]] = {
    "block drop": lambda m: [BlockDropModifier(blocks=BLOCKS.get(m.config.model_type, [2]))],
    "layer drop": lambda m: [LayerDropModifier(layers=[1, 3])],
    "uniform expert drop": lambda m: [ExpertDropModifier(experts={i: [1, 5] for i in _moes(m)})],
    "non-uniform expert drop": lambda m: [ExpertDropModifier(experts={2: [3, 4], 3: [0, 3, 5, 6]})],
    "layer and expert drop": lambda m: [
        LayerDropModifier(layers=[3]),
        ExpertDropModifier(experts={1: [3, 4], 2: [0, 3, 5, 6]}),
    ],
}

# Families whose experts vLLM loads one by one, which is how compressed experts are written.
QUANTIZED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3"]


def _oneshot(
    architecture: str, recipe: Callable[[PreTrainedModel], list], folder: pathlib.Path
) -> pathlib.Path:
    source = support.saved(architecture, folder / "untouched", **ARCHITECTURES[architecture])
    model, output = support.load(source), folder / "trimmed"
    support.trim(model, recipe(model), output_dir=str(output), no_data=True)
    return output


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> dict[tuple[str, str], tuple[Case, Result]]:
    items = [i for i in request.session.items if getattr(i, "function", None) is test_trimmed_by_oneshot]
    cases = {}
    for key in [(i.callspec.params["architecture"], i.callspec.params["recipe"]) for i in items]:
        folder = tmp_path_factory.mktemp("oneshot")
        reference = make_case(*key, folder / "by-hand").reference
        cases[key] = Case(_oneshot(key[0], RECIPES[key[1]], folder), reference)
    results = vllm_logprobs([case.checkpoint for case in cases.values()], PROMPTS)
    return {key: (case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trimmed_by_oneshot(architecture, recipe, served):
    case, result = served[architecture, recipe]
    assert result.difference(case.reference) < FLOAT32_NOISE


def _trimmed_and_quantized(model: PreTrainedModel) -> list:
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=[r"re:.*\.experts\.\d+\..*"], weights=weights)
    quantize = QuantizationModifier(config_groups={"experts": scheme}, ignore=["lm_head"])
    return [*RECIPES["layer and expert drop"](model), quantize]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> dict[str, tuple[Case, Result]]:
    cases = {}
    for architecture in QUANTIZED:
        path = _oneshot(architecture, _trimmed_and_quantized, tmp_path_factory.mktemp("quantized"))
        cases[architecture] = Case(path, transformers_logprobs(support.load(path), PROMPTS))
    results = vllm_logprobs([case.checkpoint for case in cases.values()], PROMPTS, unpack_experts=True)
    return {key: (case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


@pytest.mark.parametrize("architecture", QUANTIZED)
def test_trimmed_and_quantized_by_oneshot(architecture, quantized):
    case, result = quantized[architecture]
    untouched = transformers_logprobs(build(architecture, **ARCHITECTURES[architecture]), PROMPTS)
    assert Result(untouched).difference(case.reference) > 0.1
    assert result.difference(case.reference) < FLOAT32_NOISE
