"""Turns, figures and refusals of speed measurements; no assertion depends on how fast anything is."""

import json
import os
import sys

import numpy as np
import pytest
import support
import torch
from pydantic import ValidationError

from llmcompressor_moe import LayerDropModifier
from llmcompressor_moe.demo import DEMO_MODEL
from llmcompressor_moe.evaluation import speed
from llmcompressor_moe.evaluation.cost_reading import model_cost
from llmcompressor_moe.evaluation.latency import (
    Latency,
    Quartiles,
    SpeedComparison,
    SpeedSettings,
    compare_latencies,
)
from llmcompressor_moe.evaluation.resident_memory import forget_peak, peak_resident_nbytes, resident_nbytes
from llmcompressor_moe.evaluation.speed import compare_speed, measure_transformers, measure_vllm
from llmcompressor_moe.evaluation.transformers_engine import TransformersModel, resident_peaks
from llmcompressor_moe.evaluation.turns import Turn, take_turns
from llmcompressor_moe.evaluation.vllm_engine import VllmError, VllmProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def base(folder):
    return support.saved("mixtral", folder)


@pytest.fixture(scope="module")
def small(base, folder):
    path = folder / "small"
    support.trim(support.load(base), LayerDropModifier(num_drop=2)).save_pretrained(path)
    return path


class Recorder:
    """A model that only writes down what it is asked."""

    def __init__(self, name: str, diary: list):
        self.name, self.diary = name, diary
        diary.append(f"load {name}")

    def turn(self, rows, new_tokens):
        self.diary.append((self.name, len(rows)))
        return Turn(1.0, 2.0, "nowhere")

    def close(self):
        self.diary.append(f"close {self.name}")


def recorded(**options):
    diary = []
    turns = take_turns(
        [lambda name=name: Recorder(name, diary) for name in "ab"],
        [[[1]], [[1]] * 2],
        SpeedSettings(rounds=2, **options),
    )
    assert [[len(rounds) for rounds in model] for model in turns] == [[2, 2], [2, 2]]
    return diary


def test_models_take_turns_shape_by_shape():
    assert recorded() == [
        *("load a", "load b"),
        *(("a", 1), ("a", 2), ("b", 1), ("b", 2)),  # warming up
        *(("a", 1), ("b", 1), ("a", 2), ("b", 2)),
        *(("b", 1), ("a", 1), ("b", 2), ("a", 2)),
        *("close b", "close a"),
    ]


def test_models_take_turns_one_at_a_time():
    def alone(name):
        return [f"load {name}", (name, 1), (name, 2), (name, 1), (name, 2), f"close {name}"]

    assert recorded(together=False) == alone("a") + alone("b") + alone("b") + alone("a")


def test_a_model_that_fails_lets_go_of_the_others():
    diary = []

    def broken():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        take_turns([lambda: Recorder("a", diary), broken], [[[1]]], SpeedSettings())
    assert diary == ["load a", "close a"]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_quartiles_are_numpys(count):
    values = np.random.default_rng(count).random(count).tolist()
    found = Quartiles.of(values)
    assert [found.lower, found.median, found.upper] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))


def latency(path, prefill, decode, **changes):
    flat = Quartiles(lower=1, median=1, upper=1)
    fields = {"engine": "vllm", "device": "cpu", "batch": 2, "prompt_length": 10, "new_tokens": 6} | changes
    return Latency(
        path=str(path),
        prefill_seconds=flat,
        decode_tokens_per_second=flat,
        tokens_per_second=flat,
        prefill_rounds=prefill,
        decode_rounds=decode,
        **fields,
    )


def test_ratios_pair_rounds(base, small):
    # A busy second round slows both alike, and moves no ratio.
    slow, fast = latency(base, [2.0, 20.0], [3.0, 30.0]), latency(small, [1.0, 10.0], [2.0, 20.0])
    before, after = model_cost(base), model_cost(small)
    found = compare_latencies(slow, fast, before, after)
    assert found.reached_ratio == 1.5
    assert found.reached_quartiles == Quartiles(lower=1.5, median=1.5, upper=1.5)
    assert found.prefill_ratio.median == 2
    assert found.context == 13
    assert found.bytes_ratio == before.decode_at(2, 13).step / after.decode_at(2, 13).step > 1
    assert found.engine == "vllm"
    written = found.model_dump_json()
    assert SpeedComparison.model_validate_json(written).model_dump_json() == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 3}, "batch is 2 for the base and 3 for the compressed"),
        ({"engine": "transformers"}, "engine is 'vllm' for the base"),
        ({"decode": [1.0]}, "the base has 2 rounds, the compressed model 1"),
    ],
)
def test_only_what_was_measured_alike_is_compared(changes, message, base):
    decode = changes.pop("decode", [1.0, 1.0])
    cost = model_cost(base)
    with pytest.raises(ValueError, match=message):
        compare_latencies(
            latency(base, [1.0] * 2, [1.0] * 2), latency(base, [1.0] * 2, decode, **changes), cost, cost
        )


def test_transformers_side_by_side(base, small):
    settings = SpeedSettings(batch_sizes=(3, 1), prompt_lengths=(5, 9), new_tokens=4, rounds=3, memory=False)
    found = compare_speed(base, [small], settings, device="cpu")
    assert [(c.base.batch, c.base.prompt_length) for c in found] == [(1, 5), (1, 9), (3, 5), (3, 9)]
    for comparison in found:
        assert comparison.engine == "transformers"
        assert (comparison.base.path, comparison.compressed.path) == (str(base), str(small))
        assert comparison.bytes_ratio > 1
        for measured in (comparison.base, comparison.compressed):
            assert measured.device == "cpu"
            assert measured.peak_nbytes is None
            made = measured.batch * 3
            rates = sorted(made / seconds for seconds in measured.decode_rounds)
            assert measured.decode_tokens_per_second.median == rates[1] > 0
            assert measured.prefill_seconds.median == sorted(measured.prefill_rounds)[1] > 0
            assert measured.tokens_per_second.median > 0


def test_a_turn_is_one_prefill_and_single_steps(base):
    model = TransformersModel(base)
    calls = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    prompts = support.token_ids(2, 6)
    model.turn(prompts.tolist(), 5)
    assert [tuple(ids.shape) for ids in calls] == [(2, 6), (2, 1), (2, 1), (2, 1), (2, 1)]
    made = model.model.generate(prompts, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.cat(calls[:5], 1).tolist() == made[:, :-1].tolist()


def test_prompts_are_what_models_see(base, monkeypatch):
    seen = []

    class Fake(Recorder):
        def __init__(self, path, device):
            super().__init__(str(path), seen)

        def turn(self, rows, new_tokens):
            seen.append(rows)
            return Turn(1.0, 1.0, "nowhere")

    monkeypatch.setattr(speed, "TransformersModel", Fake)
    prompts = support.token_ids(4, 9)
    settings = SpeedSettings(batch_sizes=(2,), prompt_lengths=(7,), new_tokens=3, rounds=1, memory=False)
    (measured,) = measure_transformers([base], settings, prompts=prompts)
    assert seen[1] == seen[2] == prompts[:2, :7].tolist()
    assert measured.device == "nowhere"
    assert measured.decode_tokens_per_second.median == 4
    assert measured.tokens_per_second.median == 3


@pytest.mark.skipif(resident_nbytes() is None, reason="the system does not tell")
def test_peaks_of_resident_memory():
    assert forget_peak()
    before = resident_nbytes()
    block = bytearray(os.urandom(1)) * (64 * 1024**2)
    del block
    assert peak_resident_nbytes() - before > 60 * 1024**2
    assert forget_peak()
    assert peak_resident_nbytes() - before < 30 * 1024**2


@pytest.mark.skipif(resident_nbytes() is None, reason="the system does not tell")
def test_memory_of_a_model_in_its_own_process(folder):
    rows = [[token % 2048 for token in range(500)]] * 16
    one, sixteen = resident_peaks(DEMO_MODEL, [(rows[:1], 2), (rows, 2)])
    cost = model_cost(DEMO_MODEL)
    assert one > cost.nbytes
    # 16 sequences of 501 tokens need their cache, at least.
    assert sixteen - one > cost.decode_at(16, 501).kv_cache / 2
    with pytest.raises(RuntimeError, match=r"measuring its memory failed:[\s\S]*no config\.json"):
        resident_peaks(folder / "nothing", [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": (1, 0)}, r"batch_sizes=\(1, 0\) must be numbers of at least 1"),
        ({"batch_sizes": ()}, r"batch_sizes=\(\) must be"),
        ({"prompt_lengths": (-3,)}, r"prompt_lengths=\(-3,\) must be"),
        ({"new_tokens": 1}, "new_tokens=1 must be at least 2"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        (
            {"prompt_lengths": (200,), "new_tokens": 57},
            r"make 257 tokens; .*mixtral' has 256 positions \(max_position_embeddings\)",
        ),
    ],
)
def test_settings_that_cannot_be_measured(settings, message, base):
    with pytest.raises(ValueError, match=message):
        measure_transformers([base], SpeedSettings(**settings))
    with pytest.raises(ValueError, match=message):
        compare_speed(base, [base], SpeedSettings(**settings))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.long), r"shape \(1, 4\); the largest shape needs at least \(2, 4\)"),
        (torch.full((2, 4), 128), "token ids from 128 to 128; the models know 0 to 127"),
    ],
)
def test_prompts_that_do_not_fit(prompts, message, base):
    settings = SpeedSettings(batch_sizes=(2,), prompt_lengths=(4,), new_tokens=2)
    with pytest.raises(ValueError, match=message):
        measure_transformers([base], settings, prompts=prompts)


def test_what_cannot_be_compared(base):
    with pytest.raises(ValueError, match="compressed is empty"):
        compare_speed(base, [])
    with pytest.raises(ValueError, match="engines has 'onnx'"):
        compare_speed(base, [base], engines=["onnx"])
    with pytest.raises(ValueError, match="vllm_python is not given"):
        compare_speed(base, [base], engines=["vllm"])
    with pytest.raises(ValueError, match="paths is empty"):
        measure_transformers([])
    with pytest.raises(ValidationError, match="batches"):
        SpeedSettings(batches=(1,))


def test_no_interpreter(base, tmp_path):
    for python in (tmp_path / "bin" / "python", tmp_path):
        with pytest.raises(
            ValueError, match=r"is not an interpreter; name the one of an environment that has vLLM"
        ):
            measure_vllm([base], SpeedSettings(prompt_lengths=(8,)), python=python)


def test_an_environment_without_vllm(base, tmp_path, monkeypatch):
    # Whether or not this environment has one.
    (tmp_path / "vllm.py").write_text("raise ModuleNotFoundError(\"No module named 'vllm'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(VllmError, match=r"did not load .*ended with code 1[\s\S]*No module named 'vllm'"):
        VllmProcess(base, sys.executable)


def test_an_engine_that_hangs(base, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    with pytest.raises(VllmError, match=r"took more than 0\.2 s"):
        VllmProcess(base, python, timeout=0.2)


STUB = """
import os, sys
from types import SimpleNamespace
from vllm import SamplingParams
print("noise on standard output")

class Engine:
    def __init__(self):
        self.queue = {}
    def add_request(self, name, prompt, params):
        self.queue[name] = [params.max_tokens, 0]
    def has_unfinished_requests(self):
        return bool(self.queue)
    def step(self):
        out = []
        for name, state in list(self.queue.items()):
            state[1] += 1
            out.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[0] * state[1])]))
            if state[1] == state[0]:
                del self.queue[name]
        return out

class LLM:
    def __init__(self, **options):
        assert not any(name.startswith("llmcompressor") for name in sys.modules)
        assert not any(entry.endswith("evaluation") for entry in sys.path)
        os.system("echo noise of a child")
        self.options = options
        self.llm_engine = Engine()
    def generate(self, prompts, params, use_tqdm):
        if prompts[0]["prompt_token_ids"] == [13]:
            raise RuntimeError("the engine died of " + repr(self.options["colour"]))
        entry = [{i: SimpleNamespace(logprob=-i / 2) for i in range(9)}] * 3
        return [SimpleNamespace(prompt_logprobs=entry) for _ in prompts]
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A module named vllm that answers like the real one, as far as it is asked."""
    package = tmp_path / "vllm"
    (package / "entrypoints").mkdir(parents=True)
    (package / "platforms").mkdir()
    (package / "entrypoints" / "__init__.py").touch()
    (package / "entrypoints" / "llm.py").write_text(STUB)
    (package / "platforms" / "__init__.py").write_text(
        "class current_platform:\n    @staticmethod\n    def is_cpu():\n        return True\n"
    )
    (package / "__init__.py").write_text(
        "from types import SimpleNamespace as SamplingParams\n"
        "def __getattr__(name):\n    from vllm.entrypoints import llm\n    return getattr(llm, name)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_questions_and_answers(stub, base):
    with VllmProcess(base, sys.executable, {"colour": "blue"}) as engine:
        taken = engine.turn([[1, 2], [3, 4]], 3)
        assert taken.prefill_seconds > 0
        assert taken.decode_seconds > 0
        assert (taken.peak_nbytes is None) == (taken.peak_method is None)
        assert engine.negative_log_likelihood([[8, 2, 4]]) == 1.5
        with pytest.raises(VllmError, match=r"did not answer .*[\s\S]*the engine died of 'blue'"):
            engine.negative_log_likelihood([[13]])
        with pytest.raises(VllmError, match="died of"):
            engine.turn([[1]], 2)


def test_vllm_in_the_same_shape_as_transformers(stub, base, small):
    settings = SpeedSettings(batch_sizes=(1, 2), prompt_lengths=(6,), new_tokens=3, rounds=2)
    found = compare_speed(base, [small], settings, vllm_python=sys.executable, engines=["vllm"])
    assert [c.base.batch for c in found] == [1, 2]
    assert all(c.reached_ratio > 0 and c.bytes_ratio > 1 for c in found)
    assert json.loads(found[0].model_dump_json())["base"]["engine"] == "vllm"
