"""The commands `inspect` and `compress`: what they print, what they write, how they end."""

import json
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from llmcompressor_moe.cli import app
from llmcompressor_moe.inspection import inspect_model

CONFIGS = Path(__file__).parent / "data" / "configs"

LAYER_DROP = "default_stage: {default_modifiers: {LayerDropModifier: {num_drop: 1}}}"
EXPLICIT = "default_stage: {default_modifiers: {ExpertDropModifier: {experts: {1: [0, 3]}}}}"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def model(tmp_path):
    return support.saved("mixtral", tmp_path)


@pytest.fixture
def text(tmp_path):
    """Four documents of 40 words that the tiny tokenizer knows."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"t{3 + (i * d) % 100}" for i in range(40)) for d in range(1, 5)))
    return path


def recipe(directory: Path, content: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(content)
    return path


def compress(model: Path, content: str, output: Path, *options: object):
    path = recipe(output.parent, content)
    return run("compress", model, "--recipe", path, "--output", output, "--sequence-length", 16, *options)


# Totals and active parameters as published: 46.7 B and 12.9 B, 30.5 B and 3.3 B, 15.7 B, 6.9 B and 1.3 B,
# 20.9 B.
@pytest.mark.parametrize(
    "name, parameters, active",
    [
        ("Mixtral-8x7B-v0.1", 46_702_792_704, 12.9e9),
        ("Qwen3-30B-A3B", 30_532_122_624, 3.35e9),
        ("DeepSeek-V2-Lite", 15_706_484_224, 2.66e9),
        ("OLMoE-1B-7B-0924", 6_919_161_856, 1.28e9),
        ("gpt-oss-20b", 20_914_757_184, 4.19e9),
    ],
)
def test_inspect_counts_real_models_from_their_config_alone(name, parameters, active):
    inspection = inspect_model(CONFIGS / name)
    assert inspection.parameters == parameters == sum(part.parameters for part in inspection.parts)
    assert inspection.active_parameters == pytest.approx(active, rel=0.005)
    assert inspection.nbytes == 2 * parameters
    assert inspection.on_disk is None


def test_inspect_reads_layers_as_the_config_says():
    inspection = inspect_model(CONFIGS / "DeepSeek-V2-Lite")
    assert [layer.index for layer in inspection.moe_layers] == list(range(1, 27))
    assert {(layer.experts, layer.top_k, layer.shared_experts) for layer in inspection.moe_layers} == {
        (64, 6, True)
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_savings_are_what_the_drops_take(family):
    """Each saving equals the difference to a model that was built with one part less."""
    options = {"num_layers": 4, "tie_word_embeddings": False}

    def size(**changes):
        model = tiny_models.build(family, **{**options, **changes})
        return sum(parameter.numel() for parameter in model.parameters()), model.config

    whole, config = size()
    fewer_blocks, _ = size(num_layers=3)
    fewer_experts, _ = size(num_experts=6)
    from llmcompressor_moe.check.config import ReadConfig
    from llmcompressor_moe.inspection import _inspection
    from llmcompressor_moe.topology import find_topology

    model = tiny_models.build(family, **options)
    raw = config.to_dict()
    inspection = _inspection(Path("nowhere"), ReadConfig(raw, raw, config), model, find_topology(model))
    block, layer, expert = (saving.parameters for saving in inspection.savings)
    assert inspection.parameters == whole
    assert block == whole - fewer_blocks
    assert 2 * expert == whole - fewer_experts
    assert layer < block
    active = [saving.active_parameters for saving in inspection.savings]
    # Dropping experts leaves top_k as it is: a token passes the router's missing row less, no expert less.
    assert active[0] > active[1] > active[2]


def test_four_bit_experts_take_a_quarter_and_their_scales():
    inspection = inspect_model(CONFIGS / "Mixtral-8x7B-v0.1")
    experts = next(part for part in inspection.parts if part.part == "experts")
    four_bit = inspection.schemes[0]
    shapes = 32 * 8 * 3 * 2 * 8  # every packed matrix carries its shape, two integers
    assert four_bit.nbytes == experts.parameters // 2 + experts.parameters // 64 + shapes
    assert inspection.nbytes_in(four_bit) == inspection.nbytes - experts.nbytes + four_bit.nbytes


def test_sizes_at_mean_bits_meet_those_of_schemes():
    inspection = inspect_model(CONFIGS / "Qwen3-30B-A3B", ["W4A16", "W8A16", "UNQUANTIZED"])
    for size in inspection.schemes:
        assert inspection.nbytes_at(size.bits) == pytest.approx(inspection.nbytes_in(size), rel=1e-4)
        assert inspection.bits_at(inspection.nbytes_in(size)) == pytest.approx(size.bits, rel=1e-3)


def test_inspect_says_which_schemes_do_not_fit():
    result = run("inspect", CONFIGS / "gpt-oss-20b", "--scheme", "W4A16", "--scheme", "MXFP4A16")
    assert result.exit_code == 0
    for words in ("W4A16 does not fit: group size 128 does not divide its 2880 inputs", "4.25", "12.8 GiB"):
        assert words in result.output, words
    result = run("inspect", CONFIGS / "gpt-oss-20b", "--scheme", "W4A61")
    assert result.exit_code == 2
    assert "'W4A61' is not a preset" in result.output


def test_inspect_sizes_a_mean():
    targets = ("--target-bits", 4.5, "--target-size", "20GiB")
    result = run("inspect", CONFIGS / "Mixtral-8x7B-v0.1", *targets, "--group-size", 64)
    assert result.exit_code == 0
    for words in ("mean of 4.5 bits", "26.6 GiB", "4.25", "mean of 3.24 bits", "20 GiB"):
        assert words in result.output, words


def test_inspect_prints_tables():
    result = run("inspect", CONFIGS / "Qwen3-30B-A3B")
    assert result.exit_code == 0
    for words in ("30.5 B parameters", "3.35 B active", "0-47", "128", "29 B", "Layer Drop: one MoE layer"):
        assert words in result.output, words


def test_inspect_of_the_bundled_model_as_json():
    result = run("inspect", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["blocks"] == 8


def test_inspect_takes_a_text_part_and_a_file_name():
    assert run("inspect", CONFIGS / "gpt-oss-20b" / "config.json").exit_code == 0


def test_a_dense_model_is_refused(tmp_path):
    LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    path = recipe(tmp_path, LAYER_DROP)
    for command in (("inspect", tmp_path), ("compress", tmp_path, "-r", path, "-o", tmp_path / "out")):
        result = run(*command)
        assert result.exit_code == 2
        assert "has no MoE layer" in result.output


def test_inspect_without_a_config(tmp_path):
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert "config.json" in result.output


def test_compress_writes_model_and_tokenizer_and_says_what_happened(model, text, tmp_path):
    output, report = tmp_path / "out", tmp_path / "layers.json"
    reporting = LAYER_DROP.replace("num_drop: 1", f"num_drop: 1, report_path: {report}")
    result = compress(model, reporting, output, "--dataset", text, "--num-samples", 4)
    assert result.exit_code == 0, result.output
    said = ("LayerDropModifier: 1 of 4 MoE layers", "check: legal", f"vllm serve {output}", "./serving")
    for words in said:
        assert words in result.output, words
    assert support.load(output).config.num_hidden_layers == 4
    assert (output / "tokenizer.json").exists()
    assert not support.files_that_tell(output, report)
    again = run("inspect", output)
    assert "dropped" in again.output


def test_compress_again_and_as_json(model, text, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert compress(model, EXPLICIT, once).exit_code == 0
    result = compress(once, LAYER_DROP, twice, "--dataset", text, "--json")
    summary = json.loads(result.stdout)
    assert summary["needs_plugin"]
    assert summary["parameters_after"] < summary["parameters_before"]
    ids = support.token_ids(2)
    assert torch.isfinite(support.logits(support.load(twice), ids)).all()


def test_python_and_command_line_do_the_same(model, text, tmp_path):
    from llmcompressor_moe.compression import compress as function

    summary = function(model, recipe(tmp_path, LAYER_DROP), text, tmp_path / "a", sequence_length=16)
    compress(model, LAYER_DROP, tmp_path / "b", "--dataset", text)
    assert summary.check.ok
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "content, words",
    [
        ("a: [", "is not YAML"),
        ("- LayerDropModifier", "holds list, no mapping"),
        ("{}", "names no modifier"),
        (LAYER_DROP.replace("num_drop: 1", "num_drop: 2, num_drop: 1"), "the key 'num_drop' is given twice"),
        ("default: {default_modifiers: {}}", "'default' is not a stage"),
        ("default_stage: {LayerDropModifier: {num_drop: 1}}", "LayerDropModifier is not a group"),
        ("default_stage: {default_modifiers: {LayerDropModifier: }}", "LayerDropModifier=None has no fields"),
        (LAYER_DROP.replace("Modifier:", ":"), "no modifier 'LayerDrop'; there are"),
        (LAYER_DROP.replace("1", "0"), "num_drop=0 must be at least 1"),
        (LAYER_DROP.replace("1", "two"), "num_drop='two'"),
        ("default_stage: {default_modifiers: {LayerDropModifier: {number: 2}}}", "number=2"),
        ("default_stage: {default_modifiers: {LayerDropModifier: {}}}", "exactly one of num_drop"),
    ],
)
def test_recipes_are_refused_before_the_model_is_read(content, words, tmp_path):
    """The model does not even exist."""
    result = compress(tmp_path / "absent", content, tmp_path / "out", "--dataset", "demo")
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.count("\n") == 1


def test_a_missing_recipe(tmp_path):
    result = run("compress", "--recipe", tmp_path / "none.yaml", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot be read" in result.output


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "t3 t4", "less than one sample of 16 tokens"),
        ("a.jsonl", "{}", 'line 1: no "text"'),
        ("a.jsonl", '{"text": "t3"}\n{', "line 2: no JSON"),
        ("a.csv", "t3", "unknown kind of file"),
    ],
)
def test_data_is_refused_before_the_weights_are_read(model, name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    (model / "model.safetensors").unlink()
    result = compress(model, LAYER_DROP, tmp_path / "out", "--dataset", tmp_path / name)
    assert result.exit_code == 2
    assert words in result.output


def test_data_that_is_not_there(model, tmp_path):
    result = compress(model, LAYER_DROP, tmp_path / "out", "--dataset", "no/such-dataset")
    assert result.exit_code == 2
    assert "is not a file and cannot be fetched" in result.output


def test_no_data_where_some_is_needed(model, tmp_path):
    result = compress(model, LAYER_DROP, tmp_path / "out")
    assert result.exit_code == 2
    assert "LayerDropModifier needs calibration data" in result.output


def test_every_kind_of_data_gives_the_same_samples(text, tmp_path):
    from datasets import Dataset

    from llmcompressor_moe.calibration import calibration_samples

    documents = text.read_text().split("\n\n")
    lines = tmp_path / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "saved")
    samples = [
        calibration_samples(source, support.tokenizer(), 5, 16)["input_ids"]
        for source in (text, lines, tmp_path / "saved")
    ]
    assert samples[0] == samples[1] == samples[2]
    assert [len(row) for row in samples[0]] == [16] * 5
    Dataset.from_dict({"input_ids": [list(range(20)), [1]]}).save_to_disk(tmp_path / "ids")
    ids = calibration_samples(tmp_path / "ids", support.tokenizer(), 5, 16)["input_ids"]
    assert ids == [list(range(16)), [1]]


def test_output_that_cannot_be_written(model, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = compress(model, EXPLICIT, blocked)
    assert result.exit_code == 2
    assert "is a file" in result.output
    assert compress(model, EXPLICIT, model).exit_code == 2


def test_a_drop_that_does_not_fit_leaves_nothing_behind(model, text, tmp_path):
    content = "default_stage: {default_modifiers: {ExpertDropModifier: {num_drop: 7}}}"
    result = compress(model, content, tmp_path / "out", "--dataset", text)
    assert result.exit_code == 2
    assert "it needs at least 2. Drop at most 6." in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "recipe", "said"),
    [
        ("gptq", EXPLICIT, "gptq"),
        (
            "fp8",
            "default_stage: {default_modifiers: {RouterAwareQuantModifier: {target_bits: 5}}}",
            "--requantize",
        ),
    ],
)
def test_what_is_stored_quantized_is_refused_before_it_is_read(model, tmp_path, method, recipe, said):
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": method}}))
    result = compress(model, recipe, tmp_path / "out", "--dataset", "demo")
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, value", [("--pipeline", "both"), ("--dtype", "int3")])
def test_impossible_options(model, option, value, tmp_path):
    result = compress(model, EXPLICIT, tmp_path / "out", option, value)
    assert result.exit_code == 2
    assert f"'{value}': choose one of" in result.output
