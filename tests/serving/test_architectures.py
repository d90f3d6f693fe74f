"""vLLM against transformers, by architecture and way of trimming; and the refusal without the plugin."""

import pathlib
from collections.abc import Callable

import pytest
import torch

from serving.cases import (
    ARCHITECTURES,
    HETEROGENEOUS,
    PROMPTS,
    VARIANTS,
    Case,
    make_case,
    untouched_reference,
)
from serving.engine import FLOAT32_NOISE, Result, vllm_logprobs

pytestmark = pytest.mark.serving

Key = tuple[str, str]


def _serve_selected(
    request: pytest.FixtureRequest, test: Callable[..., None], folder: pathlib.Path, plugin: bool
) -> dict[Key, tuple[Case, Result]]:
    """Serve the checkpoints of all selected runs of `test` in one vLLM process."""
    items = [item for item in request.session.items if getattr(item, "function", None) is test]
    keys: list[Key] = [
        (item.callspec.params["architecture"], item.callspec.params["variant"]) for item in items
    ]
    cases = [make_case(*key, folder) for key in keys]
    results = vllm_logprobs([case.checkpoint for case in cases], PROMPTS, plugin=plugin)
    return {key: (case, result) for key, case, result in zip(keys, cases, results, strict=True)}


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return _serve_selected(
        request, test_vllm_scores_like_transformers, tmp_path_factory.mktemp("served"), True
    )


@pytest.fixture(scope="session")
def refused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return _serve_selected(
        request, test_refused_without_the_plugin, tmp_path_factory.mktemp("refused"), False
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_scores_like_transformers(architecture, variant, served, record_property):
    case, result = served[architecture, variant]
    effect = (
        (torch.tensor(case.reference) - torch.tensor(untouched_reference(architecture))).abs().max().item()
    )
    assert (effect == 0) if variant == "untouched" else (effect > 0.1)
    difference = result.difference(case.reference)
    record_property("difference", difference)
    assert difference < FLOAT32_NOISE


@pytest.mark.parametrize("variant", HETEROGENEOUS)
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
