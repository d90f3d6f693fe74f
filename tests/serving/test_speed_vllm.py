"""Speed in real vLLM beside the bytes that decode reads: the demo model and the same without some of its parts."""

import math
from pathlib import Path

import pytest
import torch
from support import trim
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier, load_trimmed_moe
from llmcompressor_moe.demo import DEMO_MODEL, heldout_rows
from llmcompressor_moe.evaluation import mean_negative_log_likelihood
from llmcompressor_moe.evaluation.cost_reading import model_cost
from llmcompressor_moe.evaluation.latency import SpeedSettings
from llmcompressor_moe.evaluation.speed import compare_speed
from llmcompressor_moe.evaluation.vllm_engine import VllmError, VllmProcess
from serving.engine import PYTHON

pytestmark = pytest.mark.serving

SETTINGS = SpeedSettings(batch_sizes=(1, 4), prompt_lengths=(24,), new_tokens=8, rounds=2)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed") / "trimmed"
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    trim(model, [LayerDropModifier(layers=[5]), ExpertDropModifier(num_drop=1)]).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_models_side_by_side(trimmed: Path):
    found = compare_speed(DEMO_MODEL, [trimmed], SETTINGS, vllm_python=PYTHON, engines=["vllm"])
    assert [(c.engine, c.base.batch) for c in found] == [("vllm", 1), ("vllm", 4)]
    base, small = model_cost(DEMO_MODEL), model_cost(trimmed)
    for comparison in found:
        for latency in (comparison.base, comparison.compressed):
            assert len(latency.prefill_rounds) == len(latency.decode_rounds) == SETTINGS.rounds
            for quartiles in (
                latency.prefill_seconds,
                latency.decode_tokens_per_second,
                latency.tokens_per_second,
            ):
                assert 0 < quartiles.lower <= quartiles.median <= quartiles.upper < math.inf
            assert latency.peak_nbytes > base.nbytes
            assert latency.peak_method
        batch = comparison.base.batch
        allowed = base.decode_at(batch, 28).per_token / small.decode_at(batch, 28).per_token
        assert comparison.bytes_ratio == allowed > 1
        assert comparison.reached_ratio > 0


def test_scores_are_those_of_transformers(trimmed: Path):
    rows = torch.tensor(heldout_rows(AutoTokenizer.from_pretrained(DEMO_MODEL), 64)[:8])
    with load_trimmed_moe():
        model = AutoModelForCausalLM.from_pretrained(trimmed)
    options = {"max_model_len": 80, "kv_cache_memory_bytes": 2**26}
    with VllmProcess(trimmed, PYTHON, options) as engine:
        score = engine.negative_log_likelihood(rows.tolist())
    assert score == pytest.approx(mean_negative_log_likelihood(model, rows), rel=0.005)


def test_what_does_not_load_is_told_with_the_end_of_the_log(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "mixtral"}')
    with pytest.raises(VllmError, match=r"did not load .*ended with code 1[\s\S]*NoSuchModel"):
        VllmProcess(tmp_path, PYTHON)
