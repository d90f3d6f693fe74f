"""The ways of running vLLM: several processes; tensor, pipeline and expert parallel; compiled; the API server."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import build

from serving.cases import PROMPTS, Case
from serving.checkpoints import drop_experts, drop_moes, save
from serving.engine import Result, transformers_logprobs, vllm_logprobs
from serving.server import api_server, server_logprobs

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Counts of experts that two ranks cannot share evenly, and a dropped MoE."""

    @functools.cache
    def make(architecture: str) -> Case:
        # Two ranks need a key head each.
        model = build(architecture, num_key_value_heads=2)
        dropped = drop_moes(model, [3])["per_layer_config"]
        fewer = drop_experts(model, {1: [0, 1, 2, 5, 6], 2: [1, 2, 4]})["per_layer_config"]
        folder = tmp_path_factory.mktemp("deployment") / architecture
        path = save(model, {"per_layer_config": dropped | fewer}, folder)
        return Case(path, transformers_logprobs(model, PROMPTS))

    return make


@pytest.fixture(scope="module")
def case(cases: Callable[[str], Case]) -> Case:
    return cases("mixtral")


_EXPERT_PARALLEL: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "worker_extension_cls": "expert_map_shim.SharedExperts",
}
# An architecture, and how two processes share it.
PARALLEL: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("mixtral", {"tensor_parallel_size": 2}),
    # Pipeline ranks on a CPU get the buffers they receive into only from the warm-up, which eager mode
    # leaves out; so this one is compiled.
    "pipeline": ("mixtral", {"pipeline_parallel_size": 2, "enforce_eager": False}),
    "experts": ("mixtral", _EXPERT_PARALLEL),
    "stacked experts": ("gpt_oss", _EXPERT_PARALLEL),
}


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> dict[str, Result]:
    """Each way of sharing that is asked for, one after the other in one process."""
    items = [item for item in request.session.items if getattr(item, "function", None) is test_two_ranks]
    names = [item.callspec.params["parallel"] for item in items]
    results = vllm_logprobs(
        [cases(PARALLEL[name][0]).checkpoint for name in names],
        PROMPTS,
        multiprocessing=True,
        job_options=[PARALLEL[name][1] for name in names],
        distributed_executor_backend="mp",
    )
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_ranks(parallel: str, cases: Callable[[str], Case], served: dict[str, Result]):
    assert served[parallel].difference(cases(PARALLEL[parallel][0]).reference) < 1e-4


def test_api_server(case: Case, tmp_path: pathlib.Path):
    with api_server(case.checkpoint, tmp_path / "server.log") as address:
        assert Result(server_logprobs(address, PROMPTS)).difference(case.reference) < 1e-4
