"""What is loaded trains, and what is saved is a checkpoint of the kind that it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recovery_cases as cases
import support
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import nn
from transformers import AutoModelForCausalLM, MistralForCausalLM, Trainer, TrainingArguments

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.check import IllegalCheckpointError, check_checkpoint
from llmcompressor_moe.checkpoint.atomic import OutputDirectoryError
from llmcompressor_moe.checkpoint.layout import read_layout
from llmcompressor_moe.loading import load_decompressed
from llmcompressor_moe.recovery.fake_quantization import fake_quantize_in_training, straight_through
from llmcompressor_moe.recovery.lifecycle import SessionCallback, constant_masks
from llmcompressor_moe.recovery.parameters import select
from llmcompressor_moe.recovery.students import load_student, save_student

_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}}},
    "W4A16_ASYM": {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**_WEIGHTS, "symmetric": False}}}
    },
    "FP8_DYNAMIC": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
    "FP8": {"targets": "Linear", "scheme": "FP8"},
    "W8A8": {"targets": "Linear", "scheme": "W8A8"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return support.saved("mixtral", tmp_path_factory.mktemp("base"), num_layers=2)


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory):
    """Scheme -> a checkpoint that lost experts and was quantized."""
    directory = tmp_path_factory.mktemp("quantized")

    def make(scheme: str) -> Path:
        path = directory / scheme
        if not path.exists():
            quantize = QuantizationModifier(ignore=["lm_head", "re:.*gate$"], **SCHEMES[scheme])
            recipe = [ExpertDropModifier(num_drop=2), quantize]
            support.tokenizer().save_pretrained(path)
            support.trim(support.load(base), recipe, output_dir=str(path))
        return path

    return make


def train(
    model: nn.Module, directory: Path, callback: SessionCallback | None = None, rate: float = 2e-3
) -> list[float]:
    """Losses of eight steps in transformers' Trainer on one batch."""
    ids = support.token_ids(4).tolist()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=rate,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[callback] if callback else [],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of every tensor in a checkpoint."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_layout(path).tensors.items()}


def answers(model: nn.Module) -> torch.Tensor:
    return support.logits(model.eval())


@pytest.mark.parametrize("linear_experts", [False, True])
def test_a_plain_student_becomes_a_stock_checkpoint(base, tmp_path, linear_experts):
    student = load_student(base, linear_experts=linear_experts)
    assert student.training
    before = answers(student)
    torch.testing.assert_close(before, answers(support.load(base)), atol=1e-5, rtol=1e-5)
    select(student.train(), ["all"])
    losses = train(student, tmp_path)
    assert losses[-1] < losses[0]
    after = answers(student)
    assert save_student(student, tmp_path / "out", base).ok
    stock, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    torch.testing.assert_close(answers(stock), after, atol=1e-5, rtol=1e-5)
    assert stored(tmp_path / "out") == stored(base)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}


def test_weights_are_saved_in_the_dtype_that_they_came_in(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    student = load_student(tmp_path / "half", "float32")
    assert {value.dtype for value in student.parameters()} == {torch.float32}
    rotary = student.model.rotary_emb.inv_freq
    torch.testing.assert_close(rotary, support.load(base).model.rotary_emb.inv_freq, atol=0, rtol=0)
    save_student(student, tmp_path / "out", tmp_path / "half")
    assert stored(tmp_path / "out") == stored(tmp_path / "half")
    assert {dtype for dtype, _ in stored(tmp_path / "out").values()} == {"BF16"}
    assert load_student(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("linear_experts", [False, True])
def test_a_trimmed_student_keeps_layers_history_and_card(base, tmp_path, linear_experts):
    source = tmp_path / "trimmed"
    recipe = [ExpertDropModifier(experts={0: [1, 2]}), LayerDropModifier(layers=[1])]
    support.tokenizer().save_pretrained(source)
    support.trim(support.load(base), recipe, output_dir=str(source), no_data=True)
    (source / "notes.txt").write_text("mine")
    student = load_student(source, linear_experts=linear_experts)
    select(student, ["all"])
    train(student, tmp_path)
    after = answers(student)
    assert save_student(student, tmp_path / "out", source).experts == {0: 6, 1: 0}
    torch.testing.assert_close(answers(support.load(tmp_path / "out")), after, atol=1e-5, rtol=1e-5)
    assert stored(tmp_path / "out") == stored(source)
    for name in ("trimming.json", "README.md", "tokenizer.json", "notes.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_a_pruned_student_is_as_sparse_as_it_was(base, tmp_path):
    model = support.load(base)
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data):
            weight[weight.abs() < weight.abs().median()] = 0
    model.save_pretrained(tmp_path / "pruned")
    student = load_student(tmp_path / "pruned", linear_experts=True)
    select(student, ["all"])
    train(student, tmp_path, SessionCallback(constant_masks(student)))
    save_student(student, tmp_path / "out", tmp_path / "pruned")
    after = support.load(tmp_path / "out").model.layers
    for layer, trained in zip(model.model.layers, after, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            was, now = layer.mlp.experts.get_parameter(name), trained.mlp.experts.get_parameter(name)
            assert torch.equal(was == 0, now == 0)
            assert not torch.equal(was, now)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_student_trains_rounded_and_is_compressed_again(quantized, tmp_path, scheme):
    source = quantized(scheme)
    student = load_student(source)
    torch.testing.assert_close(answers(student), answers(load_decompressed(source)), atol=0, rtol=0)
    names = select(student.train(), ["all"])
    assert not any("scale" in name or "zero_point" in name for name in names)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    losses = train(student, tmp_path)
    assert losses[-1] < losses[0] - 0.1
    still = {name for name, value in student.named_parameters() if torch.equal(value, before[name])}
    assert still == before.keys() - set(names)
    after = answers(student)
    assert save_student(student, tmp_path / "out", source).ok
    assert check_checkpoint(tmp_path / "out").ok
    torch.testing.assert_close(answers(load_decompressed(tmp_path / "out")), after, atol=0, rtol=0)
    torch.testing.assert_close(answers(load_student(tmp_path / "out")), after, atol=0, rtol=0)
    assert stored(tmp_path / "out") == stored(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize(("scheme", "rate"), [("W4A16", 2e-2), ("W8A8", 2e-3)])
def test_quantized_weights_alone_learn_through_the_rounding(quantized, tmp_path, scheme, rate):
    """Embeddings, norms and routers, which are not rounded, stand still."""
    student = load_student(quantized(scheme))
    select(student, ["experts"])
    before = answers(student)
    # A weight has to move by half a step of its scale before anything changes, and steps of four bits are wide.
    losses = train(student.train(), tmp_path, rate=rate)
    assert losses[-1] < losses[0]
    assert (answers(student) - before).abs().max() > 1e-3


def test_gradients_pass_straight_through():
    value = torch.tensor([0.2, 0.7, -1.6], requires_grad=True)
    rounded = straight_through(value, value.detach().round())
    assert torch.equal(rounded, torch.tensor([0.0, 1.0, -2.0]))
    (rounded * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(value.grad, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_gradients_of_a_rounded_linear_are_those_of_the_rounded_product(scheme):
    torch.manual_seed(0)
    linear, values = nn.Linear(32, 16), torch.randn(1, 5, 32, requires_grad=True)
    initialize_module_for_quantization(linear, preset_name_to_scheme(scheme, ["Linear"]))
    bits = 127 if scheme == "W8A8" else 448
    linear.weight_scale.data = linear.weight.detach().abs().amax(1, keepdim=True) / bits
    fake_quantize_in_training(linear)
    output = linear(values)
    output.backward(torch.ones_like(output))

    def rounded(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if scheme == "W8A8":
            return (tensor / scale).round().clamp(-128, 127) * scale
        return (tensor / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale

    weight = rounded(linear.weight.detach(), linear.weight_scale)
    # Eight-bit integers reach from -128, and inputs get their scale from the width of that range.
    widest = values.detach().abs().amax(2, keepdim=True)
    inputs = rounded(values.detach(), widest / (127.5 if scheme == "W8A8" else 448))
    torch.testing.assert_close(output, inputs @ weight.T + linear.bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values.grad[0], torch.ones(5, 16) @ weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear.weight.grad, torch.ones(16, 5) @ inputs[0], atol=1e-4, rtol=1e-4)


def test_upstream_alone_loses_the_gradient_of_rounded_inputs(quantized):
    """Once this fails, the forward of our own can go."""
    model = load_decompressed(quantized("W8A8"))
    ids = support.token_ids(2)
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
    projection = model.model.layers[0].self_attn.q_proj
    assert not projection(hidden).requires_grad
    student = load_student(quantized("W8A8"))
    student.model.layers[0].self_attn.q_proj(hidden).sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_a_dense_student_is_loaded_and_saved(tmp_path):
    cases.dense().save_pretrained(tmp_path / "dense")
    student = load_student(tmp_path / "dense", linear_experts=True)
    select(student, ["all"])
    train(student, tmp_path)
    after = answers(student)
    save_student(student, tmp_path / "out", tmp_path / "dense")
    torch.testing.assert_close(answers(MistralForCausalLM.from_pretrained(tmp_path / "out")), after)
    assert stored(tmp_path / "out") == stored(tmp_path / "dense")


def test_a_student_may_take_the_place_of_its_source(tmp_path):
    source = support.saved("mixtral", tmp_path, num_layers=2)
    student = load_student(source)
    student.lm_head.weight.data *= 2
    after = answers(student)
    save_student(student, source, source)
    torch.testing.assert_close(answers(support.load(source)), after, atol=1e-5, rtol=1e-5)


def test_what_would_not_be_legal_is_not_written(base, tmp_path):
    student = load_student(base)
    student.lm_head = nn.Linear(64, 7, bias=False)
    with pytest.raises(IllegalCheckpointError, match=r"lm_head\.weight"):
        save_student(student, tmp_path / "out", base)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_output(base, tmp_path):
    (tmp_path / "out").write_text("something")
    with pytest.raises(OutputDirectoryError, match="is a file"):
        save_student(load_student(base), tmp_path / "out", base)
    assert (tmp_path / "out").read_text() == "something"


def test_an_unknown_dtype_is_refused(base):
    with pytest.raises(ValueError, match="dtype='int8': choose one of auto, bfloat16, float16, float32"):
        load_student(base, "int8")


def test_a_checkpoint_that_could_not_be_served_is_refused_before_it_trains(tmp_path):
    source = support.saved("mixtral", tmp_path, num_layers=2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(IllegalCheckpointError, match="is not legal to serve"):
        load_student(source)
