"""The ways of running vLLM: several processes, tensor parallel, the API server."""

import pathlib

import pytest

from serving.cases import PROMPTS, Case, make_case
from serving.engine import Result, vllm_logprobs
from serving.server import api_server, server_logprobs

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("mixtral", "layer and expert drop", tmp_path_factory.mktemp("deployment"))


@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel_size": 2}], ids=["one", "tensor"])
def test_spawned_workers(case: Case, parallel: dict[str, int]):
    [result] = vllm_logprobs(
        [case.checkpoint], PROMPTS, multiprocessing=True, distributed_executor_backend="mp", **parallel
    )
    assert result.difference(case.reference) < 1e-4


def test_api_server(case: Case, tmp_path: pathlib.Path):
    with api_server(case.checkpoint, tmp_path / "server.log") as address:
        assert Result(server_logprobs(address, PROMPTS)).difference(case.reference) < 1e-4
