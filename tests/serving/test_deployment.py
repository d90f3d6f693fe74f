"""The ways of running vLLM: several processes, tensor and pipeline parallel, the API server."""

import pathlib
from typing import Any

import pytest

from serving.cases import PROMPTS, Case, make_case
from serving.engine import Result, vllm_logprobs
from serving.server import api_server, server_logprobs

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("mixtral", "layer and expert drop", tmp_path_factory.mktemp("deployment"))


PARALLEL = {
    "one": {},
    "tensor": {"tensor_parallel_size": 2},
    # Pipeline ranks on a CPU get the buffers they receive into only from the warm-up, which eager mode
    # leaves out.
    "pipeline": {"pipeline_parallel_size": 2, "enforce_eager": False},
}


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
def test_spawned_workers(case: Case, parallel: dict[str, Any]):
    [result] = vllm_logprobs(
        [case.checkpoint], PROMPTS, multiprocessing=True, distributed_executor_backend="mp", **parallel
    )
    assert result.difference(case.reference) < 1e-4


def test_api_server(case: Case, tmp_path: pathlib.Path):
    with api_server(case.checkpoint, tmp_path / "server.log") as address:
        assert Result(server_logprobs(address, PROMPTS)).difference(case.reference) < 1e-4


def test_compiled(case: Case):
    [result] = vllm_logprobs([case.checkpoint], PROMPTS, enforce_eager=False)
    assert result.difference(case.reference) < 1e-4
