"""All batches go through a model block by block and give what the model gives alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from compressed_tensors.offload.module import offload_module, remove_module_offload
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llmcompressor_moe.profile import Profile, Statistic, collect_profile
from llmcompressor_moe.profile.computing import ComputedModules, computed_in, fast_dtype
from llmcompressor_moe.profile.forward import forwards, run_batches
from llmcompressor_moe.profile.lockstep import run_lockstep
from llmcompressor_moe.profile.observers import ExpertsObserver
from llmcompressor_moe.profile.observing import attached
from llmcompressor_moe.profile.options import current_options, run_options
from llmcompressor_moe.profile.samples import LayerSample, collect_samples
from llmcompressor_moe.surgery.bypass import bypass_block, bypass_moe
from llmcompressor_moe.topology import find_topology

STATISTICS = {Statistic.BLOCK, Statistic.LAYER, Statistic.ROUTING, Statistic.OUTPUT}


def native(model: PreTrainedModel) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch, use_cache=False).logits for batch in support.padded_batches()]


def lockstep(model: PreTrainedModel, **options) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    with run_options(**options):
        run_batches(model, support.padded_batches(), None, None, on_logits=found.__setitem__)
    return [found[index] for index in range(len(support.padded_batches()))]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 2e-4) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("model_type", support.UNLIKE_FAMILIES)
def test_equals_the_model_alone(model_type: str) -> None:
    model = tiny_models.build(model_type)
    expected = native(model)
    assert_equal(lockstep(model), expected)
    linearize_moe(model)
    assert_equal(lockstep(model), expected)
    assert_equal(lockstep(model, wave_tokens=1), expected)
    assert_equal(lockstep(model, wave_tokens=24), expected)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v4", "gemma4_text"])
def test_waiting_in_files_changes_nothing(model_type: str, tmp_path: Path) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    in_memory = lockstep(model)
    in_files = lockstep(model, max_memory=0, scratch=tmp_path)
    some_in_files = lockstep(model, max_memory=5000, scratch=tmp_path)
    for one, other, another in zip(in_memory, in_files, some_in_files, strict=True):
        assert torch.equal(one, other) and torch.equal(one, another)
    assert not list(tmp_path.iterdir())


def test_a_full_scratch_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"scratch=.*max_memory"):
        lockstep(tiny_models.build("qwen3_moe"), max_memory=0, scratch=tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "gemma4_text", "qwen3_next"])
@pytest.mark.parametrize("linear", [False, True])
def test_16_bit_weights_are_computed_in_float32(model_type: str, linear: bool) -> None:
    model = tiny_models.build(model_type).to(torch.bfloat16)
    expected = native(copy.deepcopy(model).float())
    if linear:
        linearize_moe(model).to(torch.bfloat16)
    found = lockstep(model, compute_dtype=torch.float32)
    assert found[0].dtype == torch.float32
    assert_equal(found, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_fast_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "llmcompressor_moe.profile.computing._cpu_features"
    monkeypatch.setattr(path, lambda: frozenset({"avx2"}))
    assert fast_dtype(torch.bfloat16, "cpu") == fast_dtype(torch.float16, "cpu") == torch.float32
    assert fast_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert fast_dtype(torch.float64, "cpu") == torch.float64
    monkeypatch.setattr(path, lambda: frozenset({"avx512_bf16"}))
    assert fast_dtype(torch.bfloat16, "cpu") == torch.bfloat16


def test_only_16_bit_tensors_are_cast() -> None:
    module = nn.Linear(4, 4, dtype=torch.bfloat16)
    module.register_buffer("scale", torch.ones(1, dtype=torch.float16))
    module.register_buffer("packed", torch.ones(4).to(torch.float8_e4m3fn))
    module.register_buffer("count", torch.ones(1, dtype=torch.int64))
    with computed_in([module], torch.float32):
        assert module.weight.dtype == module.scale.dtype == torch.float32
        assert module.packed.dtype == torch.float8_e4m3fn and module.count.dtype == torch.int64
        module.count = torch.zeros(1, dtype=torch.int64)
    assert module.weight.dtype == torch.bfloat16
    assert not module.count.any(), "what is written inside stays"


def test_a_cache_that_casts_itself_is_asked_to() -> None:
    module = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    offload_module(module, "cpu", "cpu")
    asked = []

    def onload_as(offloaded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        asked.append(offloaded)
        return offloaded.to(dtype)

    module._parameters.onload_as = onload_as
    weights = ComputedModules([module], torch.float32)
    with weights:
        first = module.weight
        assert module.weight is first and first.dtype == torch.float32
        weights.release()
        assert module.weight is not first
    assert len(asked) == 2 and asked[0] is module._parameters.offloaded_values["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model = linearize_moe(tiny_models.build("qwen3_moe").to(dtype))
    expected = lockstep(model, compute_dtype=torch.float32)
    for module in model.modules():
        remove_module_offload(module)
        offload_module(module, "cpu", "cpu")
    assert_equal(lockstep(model, compute_dtype=torch.float32), expected)
    for module in model.modules():
        remove_module_offload(module)
        offload_module(module, "cpu", "disk", offload_dir=str(tmp_path))
    caches = {name: module._parameters for name, module in model.named_modules()}
    assert_equal(lockstep(model, compute_dtype=torch.float32), expected)
    assert all(module._parameters is caches[name] for name, module in model.named_modules())


def test_each_expert_is_called_once_with_the_tokens_of_all_batches() -> None:
    model = linearize_moe(tiny_models.build("mixtral", num_experts=2, top_k=2))
    calls: list[int] = []
    expert = model.model.layers[0].mlp.experts[0]
    expert.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    run_batches(model, support.padded_batches(), None, None)
    assert calls == [3 * 12]


def test_the_head_runs_only_where_logits_are_wanted() -> None:
    model = tiny_models.build("qwen3_moe")
    calls = []
    model.lm_head.register_forward_hook(lambda *_args: calls.append(1))
    run_batches(model, support.padded_batches(), None, None)
    assert not calls
    lockstep(model)
    assert len(calls) == len(support.padded_batches())


def test_a_model_without_moe_layers() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=3, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    blocks = []
    with forwards(model):
        run_lockstep(model, support.padded_batches(), on_block_done=lambda block, _: blocks.append(block))
    assert blocks == [0, 1, 2]
    assert_equal(lockstep(model), native(model))


def test_blocks_in_another_order() -> None:
    model = linearize_moe(tiny_models.build("qwen3_moe"))
    model.model.layers = Reversed(model.model.layers)
    assert_equal(lockstep(model), native(model))


class Reversed(nn.ModuleList):
    """Blocks that a model goes through from the last to the first."""

    def __getitem__(self, index):
        return list(self)[::-1] if isinstance(index, slice) else super().__getitem__(index)


def test_bypassed_parts_stay_bypassed() -> None:
    model = linearize_moe(tiny_models.build("qwen3_moe"))
    bypass_block(model.model.layers[1])
    bypass_moe(model.model.layers[2].mlp)
    assert_equal(lockstep(model), native(model))


def own_forwards(model: nn.Module) -> dict[str, object]:
    return {
        name: module.__dict__["forward"]
        for name, module in model.named_modules()
        if "forward" in module.__dict__
    }


def test_an_exception_surfaces_and_everything_is_as_it_was() -> None:
    model = linearize_moe(tiny_models.build("qwen3_moe").to(torch.bfloat16))
    forwards_before = own_forwards(model)
    parameters = {name: module._parameters for name, module in model.named_modules()}
    ended = []

    def block_forward(own):
        def forward(*args, **kwargs):
            try:
                return own(*args, **kwargs)
            finally:
                ended.append(1)

        return forward

    with contextlib.ExitStack() as stack:
        inner = model.model.forward
        model.model.forward = block_forward(inner)
        stack.callback(delattr, model.model, "forward")
        handle = model.model.layers[2].mlp.gate.register_forward_hook(fail)
        stack.callback(handle.remove)
        with pytest.raises(ZeroDivisionError, match="in the third block"):
            run_batches(model, support.padded_batches(), None, None)
    assert len(ended) == 3, "forwards that wait are ended, not left in the middle"
    assert own_forwards(model) == forwards_before
    assert all(module._parameters is parameters[name] for name, module in model.named_modules())
    run_batches(model, support.padded_batches(), None, None)


def fail(*_args) -> None:
    raise ZeroDivisionError("in the third block")


def profiled(model: PreTrainedModel, **options) -> Profile:
    with run_options(**options):
        return collect_profile(model, find_topology(model), support.padded_batches(), STATISTICS)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text"])
def test_waves_of_one_batch_give_the_statistics_of_one_wave(model_type: str) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    whole, single = profiled(model), profiled(model, wave_tokens=1)
    assert whole.num_tokens == single.num_tokens == 33
    assert single.block_similarity == pytest.approx(whole.block_similarity, abs=1e-6)
    assert single.layer_similarity == pytest.approx(whole.layer_similarity, abs=1e-6)
    for index, experts in whole.experts.items():
        assert single.experts[index].routed_tokens == experts.routed_tokens
        assert single.experts[index].weighted_output_norm == pytest.approx(
            experts.weighted_output_norm, rel=1e-5
        )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v4", "zaya"])
def test_a_pass_that_is_resumed_is_bit_identical(model_type: str) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    topology = find_topology(model)

    def run(**options) -> dict[int, list]:
        observers = {
            block.index: ExpertsObserver(model, block, STATISTICS) for block in topology.blocks if block.moe
        }
        done: dict[int, list] = {}

        def note(block: int, snapshot) -> None:
            if block in observers:
                done[block] = [values.clone() for values in observers[block].accumulators()]
            saved[block] = {index: cloned(output) for index, output in snapshot().items()}
            if block == stop:
                raise KeyboardInterrupt

        with forwards(model), attached(observers.values()), stopping():
            run_lockstep(model, support.padded_batches(), on_block_done=note, **options)
        return done

    saved: dict[int, dict] = {}
    stop = None
    whole = run()
    saved.clear()
    stop = 1
    first = run()
    assert max(saved) == 1
    stop = None
    resumed = run(start_block=2, resume=saved[1])
    assert set(first) | set(resumed) == set(whole) and not set(first) & set(resumed)
    for block, accumulators in (first | resumed).items():
        for ours, theirs in zip(accumulators, whole[block], strict=True):
            assert torch.equal(ours, theirs), block


def cloned(output):
    if isinstance(output, tuple):
        return tuple(value.clone() if value is not None else None for value in output)
    return output.clone()


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    with contextlib.suppress(KeyboardInterrupt):
        yield


def test_a_start_in_the_middle_needs_what_came_before() -> None:
    with pytest.raises(ValueError, match="resume"):
        run_lockstep(tiny_models.build("qwen3_moe"), support.padded_batches(), start_block=1)


def test_samples_are_handed_over_layer_by_layer() -> None:
    model = linearize_moe(tiny_models.build("qwen3_moe"))
    topology = find_topology(model)
    kept = collect_samples(model, topology, support.padded_batches(), 4)
    handed: dict[int, LayerSample] = {}
    assert (
        collect_samples(model, topology, support.padded_batches(), 4, on_layer_done=handed.__setitem__) == {}
    )
    assert list(handed) == list(kept) == [0, 1, 2, 3]
    for index, sample in kept.items():
        assert sample.tokens == 33
        for ours, theirs in zip(handed[index].experts, sample.experts, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.outputs, theirs.outputs)
            assert len(ours.inputs) == min(4, ours.routed_tokens)
    with run_options(wave_tokens=12):
        waves = collect_samples(model, topology, support.padded_batches(), 3)
    assert all(len(expert.inputs) <= 3 for sample in waves.values() for expert in sample.experts)


def test_options_end_with_their_context() -> None:
    with run_options(wave_tokens=7), run_options(max_memory=5) as options:
        assert current_options() == options and (options.wave_tokens, options.max_memory) == (7, 5)
    assert current_options().wave_tokens is None
    with pytest.raises(TypeError), run_options(memory=1):
        pass
