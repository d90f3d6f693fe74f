"""vLLM against transformers: every family that it serves, all kinds of drop; and refusals without the plugin."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from serving.cases import PROMPTS, RECIPES, VARIANTS, Case, make_case, trimmed_case, untouched_reference
from serving.engine import FLOAT32_NOISE, Result, vllm_logprobs
from serving.families import ARCHITECTURES

pytestmark = pytest.mark.serving

Served = dict[tuple[str, str], tuple[Case, Result]]
# Models by which the plugin is tried without the rest of this project; two kinds of attention and of routers.
BY_HAND = ["mixtral", "deepseek_v3"]


def _asked_for(request: pytest.FixtureRequest, *tests: Callable[..., None]) -> list[tuple[str, str]]:
    """Architecture and variant of all selected runs of some tests."""
    items = [item for item in request.session.items if getattr(item, "function", None) in tests]
    return list(
        dict.fromkeys((i.callspec.params["architecture"], i.callspec.params["variant"]) for i in items)
    )


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the checkpoints of some tests, each once."""
    made: dict[tuple[str, str], Case] = {}

    def make(*tests: Callable[..., None]) -> dict[tuple[str, str], Case]:
        for architecture, variant in set(_asked_for(request, *tests)) - set(made):
            folder: pathlib.Path = tmp_path_factory.mktemp("trimmed")
            case = make_case if variant in VARIANTS else trimmed_case
            made[architecture, variant] = case(architecture, variant, folder)
        return {key: made[key] for key in _asked_for(request, *tests)}

    return make


def _serve(cases: dict[tuple[str, str], Case], **options: Any) -> Served:
    """Serve the checkpoints in one vLLM process."""
    results = vllm_logprobs([case.checkpoint for case in cases.values()], PROMPTS, **options)
    return {key: (case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


@pytest.fixture(scope="module")
def served(cases) -> Served:
    return _serve(cases(test_vllm_scores_like_transformers, test_plugin_alone))


@pytest.fixture(scope="module")
def refused(cases) -> Served:
    return _serve(cases(test_refused_without_the_plugin), plugin=False)


def _held_to_reference(key: tuple[str, str], served: Served, record_property: Callable[..., None]) -> None:
    case, result = served[key]
    untouched = torch.tensor(untouched_reference(key[0]))
    effect = (torch.tensor(case.reference) - untouched).abs().max().item()
    assert (effect == 0) if key[1] == "untouched" else (effect > 0.1)
    difference = result.difference(case.reference)
    record_property("difference", difference)
    assert difference < (FLOAT32_NOISE if key[0].startswith("granite") else 1e-4)


@pytest.mark.parametrize("variant", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_scores_like_transformers(architecture, variant, served, record_property):
    _held_to_reference((architecture, variant), served, record_property)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", BY_HAND)
def test_plugin_alone(architecture, variant, served, record_property):
    _held_to_reference((architecture, variant), served, record_property)


@pytest.mark.parametrize("variant", ["layers and experts"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_refused_without_the_plugin(architecture, variant, refused):
    _, result = refused[architecture, variant]
    assert result.logprobs is None
    reasons = (
        "AmbiguousGlobalPerLayerAttributeError",
        "NotImplementedError: Heterogeneous MLA models are not supported",
        "model type `deepseek` but Transformers does not recognize this architecture",
    )
    assert any(reason in result.error for reason in reasons)
