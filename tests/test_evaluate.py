"""`evaluate` and limits: figures against direct computations, both ends of the command line, and bad input."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from llmcompressor_moe import (
    ExpertDropModifier,
    LayerDropModifier,
    QualityGateModifier,
    RouterAwareQuantModifier,
)
from llmcompressor_moe.calibration import documents
from llmcompressor_moe.cli import app
from llmcompressor_moe.evaluation import run as run_module
from llmcompressor_moe.evaluation.report import Evaluation
from llmcompressor_moe.evaluation.run import EvaluationSettings, evaluate
from llmcompressor_moe.limits import Limits, LimitsBrokenError
from llmcompressor_moe.loading import load_decompressed, load_model

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a text, and two models made from it."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = support.saved("mixtral", folder)
    # Words that do not begin like a special token; the first of a document is not predicted.
    words = torch.randint(30, 99, (4, 2 * LENGTH + 1), generator=torch.Generator().manual_seed(3))
    text = "\n\n".join(" ".join(f"t{token}" for token in row) for row in words.tolist())
    (folder / "text.txt").write_text(text)
    trim(base, folder / "trimmed", [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={1: [0, 3]})])
    quantize = RouterAwareQuantModifier(schemes=["W8A8", "W4A16"], group_size=32, target_bits=7.0)
    trim(base, folder / "quantized", [LayerDropModifier(layers=[0]), quantize])
    return folder


def trim(base: Path, output: Path, recipe: list[Any]) -> None:
    support.trim(support.load(base), recipe, output_dir=str(output))


def settings(folder: Path, **fields: Any) -> EvaluationSettings:
    return EvaluationSettings(
        source=str(folder / "text.txt"), length=LENGTH, stride=LENGTH, ranks=(2,), **fields
    )


@pytest.fixture(scope="module")
def found(folder: Path) -> Evaluation:
    return evaluate(folder / "mixtral", [folder / "trimmed", folder / "quantized"], settings(folder))


def rows(folder: Path) -> torch.Tensor:
    documents = (folder / "text.txt").read_text().split("\n\n")
    return torch.tensor([support.tokenizer()(document)["input_ids"] for document in documents])


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token, in windows of LENGTH that do not overlap, [documents, tokens - 1, vocabulary]."""
    parts = [
        support.logits(model, ids[:, start : start + LENGTH]) for start in range(0, ids.shape[1] - 1, LENGTH)
    ]
    return torch.cat(parts, dim=1)[:, : ids.shape[1] - 1].double().log_softmax(-1)


def test_quality_is_what_transformers_gives(folder: Path, found: Evaluation) -> None:
    ids = rows(folder)
    base = log_probabilities(support.load(folder / "mixtral"), ids)
    for model in (found.base, *found.compressed):
        ours = log_probabilities(load_decompressed(model.path), ids)
        # Inputs in eight bits: noise in the last digit puts some of them on the next step.
        exact = 1e-3 if model.path.endswith("quantized") else 1e-5
        nll = -ours.gather(-1, ids[:, 1:, None])[..., 0]
        assert model.text.tokens == nll.numel()
        assert model.text.mean_nll == pytest.approx(float(nll.mean()), rel=exact)
        assert model.text.perplexity == pytest.approx(math.exp(model.text.mean_nll))
        if model is not found.base:
            kl = (base.exp() * (base - ours)).sum(-1)
            assert model.agreement.mean_kl == pytest.approx(float(kl.mean()), rel=10 * exact)


def test_what_was_cut_is_what_is_reported(found: Evaluation) -> None:
    trimmed, quantized = found.compressed
    assert trimmed.routing.dropped_layers == [2]
    assert trimmed.routing.dropped_experts == {1: [0, 3]}
    assert quantized.routing.dropped_layers == [0]
    assert trimmed.routing.layers[0].routing.top_k_overlap == 1
    assert 0 < trimmed.routing.layers[1].routing.top_k_overlap < 1
    assert trimmed.cost.parameters < found.base.cost.parameters
    assert quantized.cost.nbytes < found.base.cost.nbytes
    (sent,) = trimmed.communication
    assert sent.after.deduplicated.bytes_per_token < sent.before.deduplicated.bytes_per_token


def test_a_model_against_itself(folder: Path) -> None:
    base = folder / "mixtral"
    limits = Limits(
        max_perplexity_increase=0, max_kl=0, min_top1_agreement=1, min_routing_overlap=1, max_replaced=0
    )
    found = evaluate(base, [base], settings(folder, limits=limits))
    (same,) = found.compressed
    assert found.ok
    assert same.text == found.base.text
    assert (same.agreement.mean_kl, same.agreement.top1_agreement) == (0, 1)
    assert same.routing.mean.top_k_overlap == same.routing.mean.top_k_overlap_kept == 1
    assert same.routing.mean.router_kl == same.routing.mean.replaced == 0


def test_the_base_is_let_go_before_others_are_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, alive = run_module.open_as_served, []

    def watched(*arguments: Any) -> torch.nn.Module:
        gc.collect()
        assert not any(reference() is not None for reference in alive), "two models in memory"
        model = load(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run_module, "open_as_served", watched)
    evaluate(folder / "mixtral", [folder / "trimmed", folder / "trimmed"], settings(folder))
    assert len(alive) == 3


def test_json_comes_back(found: Evaluation) -> None:
    written = found.model_dump_json()
    assert Evaluation.model_validate_json(written).model_dump_json() == written


# Limits in recipes


def gate(folder: Path, **limits: float) -> QualityGateModifier:
    return QualityGateModifier(text=str(folder / "text.txt"), length=LENGTH, stride=LENGTH, **limits)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_recipe_judges_what_evaluate_finds(folder: Path, tmp_path: Path, quantized: bool) -> None:
    """A gate measures the model in memory, `evaluate` what was saved."""
    recipe = [LayerDropModifier(layers=[2])]
    if quantized:
        recipe.append(RouterAwareQuantModifier(schemes=["W8A8", "W4A16"], group_size=32, target_bits=7.0))
    out = tmp_path / "out"
    limits = {"max_kl": 0.0, "min_top1_agreement": 1.0, "max_perplexity_increase": 10.0}
    with pytest.raises(LimitsBrokenError, match=r"max_kl=0: .*min_top1_agreement=1: .* kept apart") as error:
        trim(folder / "mixtral", out, [*recipe, gate(folder, **limits)])
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    (saved,) = evaluate(folder / "mixtral", [tmp_path / "out.rejected"], settings(folder)).compressed
    values = {broken.limit: broken.value for broken in error.value.broken}
    assert values["max_kl"] == pytest.approx(saved.agreement.mean_kl, rel=1e-3)
    assert values["min_top1_agreement"] == pytest.approx(saved.agreement.top1_agreement)


def test_limits_that_are_kept_change_nothing(folder: Path, tmp_path: Path) -> None:
    recipe = [
        LayerDropModifier(layers=[2]),
        ExpertDropModifier(experts={1: [0, 3]}),
        gate(folder, max_kl=100),
    ]
    trim(folder / "mixtral", tmp_path / "out", recipe)
    with_gate, without = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / "trimmed")
    )
    assert with_gate.keys() == without.keys()
    assert all(torch.equal(with_gate[name], without[name]) for name in without)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no limit; give at least one of max_perplexity_increase"),
        ({"max_kl": 1, "plan_path": "plan.json"}, "plan_path='plan.json'"),
        ({"max_kl": -1}, "greater than or equal to 0"),
    ],
)
def test_gates_that_cannot_be(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(folder, **fields)


def test_a_gate_stands_at_the_end(folder: Path, tmp_path: Path) -> None:
    recipe = [gate(folder, max_kl=1), LayerDropModifier(layers=[2])]
    with pytest.raises(ValueError, match=r"LayerDropModifier comes after it: put it at the end"):
        trim(folder / "mixtral", tmp_path / "out", recipe)


# The command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_evaluate_prints_tables_and_writes_json(folder: Path, tmp_path: Path, found: Evaluation) -> None:
    models = [folder / name for name in ("mixtral", "trimmed", "quantized")]
    options = ["--text", folder / "text.txt", "--length", LENGTH, "--stride", LENGTH, "--ranks", 2]
    result = run("evaluate", *models, *options, "--output", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "found.json").read_text())
    assert written == found.model_dump(mode="json")
    assert [written["base"]["path"], *(model["path"] for model in written["compressed"])] == [
        model.name for model in models
    ]
    assert not support.files_that_tell(tmp_path)
    for expected in ("Quality", "Routing against the base", "MoE layer dropped", "Cost", "all-to-all"):
        assert expected in result.output
    as_json = run("evaluate", *models, *options, "--json")
    assert json.loads(as_json.stdout) == written


def test_a_broken_limit_is_named_and_ends_with_1(folder: Path) -> None:
    models = [folder / "mixtral", folder / "trimmed"]
    result = run("evaluate", *models, "--text", folder / "text.txt", "--length", LENGTH, "--max-kl", 0)
    assert result.exit_code == 1
    assert "limit broken by trimmed: max_kl=0: the model has" in result.output


def test_compress_with_limits(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "default_stage: {default_modifiers: {LayerDropModifier: {layers: [2]}}}"
    )
    command = [
        "compress",
        folder / "mixtral",
        "--recipe",
        tmp_path / "recipe.yaml",
        "--output",
        tmp_path / "out",
    ]
    text = ["--text", folder / "text.txt"]
    result = run(*command, "--max-kl", 0)
    assert result.exit_code == 2
    assert "limits need --text" in result.output
    result = run(*command, "--max-kl", 0, *text)
    assert result.exit_code == 1, result.output
    assert "max_kl=0" in result.output
    assert (tmp_path / "out.rejected" / "tokenizer.json").exists()
    assert not (tmp_path / "out").exists()
    assert run(*command, "--max-kl", 100, *text).exit_code == 0
    assert (tmp_path / "out" / "config.json").exists()


# Bad input


def test_text_shorter_than_a_window(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("t3 t4 t5")
    result = run(
        "evaluate", folder / "mixtral", folder / "trimmed", "--text", tmp_path / "short.txt", "--length", 16
    )
    assert result.exit_code == 2
    assert "less than one window of 16 tokens" in result.output


@pytest.mark.parametrize("text", ["", "t3", "\n\n\n"])
def test_no_text(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "none.txt").write_text(text)
    result = run("evaluate", folder / "mixtral", folder / "trimmed", "--text", tmp_path / "none.txt")
    assert result.exit_code == 2
    assert "none.txt" in result.output


def test_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((folder / "mixtral" / name).read_bytes())
    result = run("evaluate", base, folder / "trimmed", "--text", folder / "text.txt")
    assert result.exit_code == 2
    assert "tokenizer cannot be loaded" in result.output


def test_nan(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (folder / "trimmed").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = run("evaluate", folder / "mixtral", broken, "--text", folder / "text.txt", "--length", LENGTH)
    assert result.exit_code == 2
    assert "NaN" in result.output


def test_a_model_made_from_another(folder: Path, tmp_path: Path) -> None:
    other = support.saved("mixtral", tmp_path, num_layers=3)
    result = run("evaluate", other, folder / "trimmed", "--text", folder / "text.txt", "--length", LENGTH)
    assert result.exit_code == 2


def test_output_that_cannot_be_written(folder: Path) -> None:
    result = run("evaluate", folder / "mixtral", folder / "trimmed", "--output", folder)
    assert result.exit_code == 2
    assert "is a directory; name a file" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "dtype='int8': choose one of auto"),
        (["--dispatch-format", "fp9"], "dispatch_format='fp9': choose one of 16-bit"),
        (["--vllm-python", "/nope", "--speed"], "vllm_python='/nope' is not an interpreter"),
        (["--task", "nope.yaml"], "nope.yaml"),
        (["--include-path", "tests"], "include_path='tests' is about tasks, but there is none"),
        (["--limit", 3], "limit='3' is about tasks, but there is none"),
        (["--device", "nonsense"], "device='nonsense' cannot be used"),
        (["--device", "meta"], "device='meta' cannot be used"),
        (["--ranks", 9], "ranks=9: a layer of"),
        (["--length", 999], "length is 999, but the model has 256 positions"),
        (["--length", 16, "--stride", 17], "stride is 17 at length 16"),
        (["--speed", "--prompt-length", 999], "make 1063 tokens"),
        (["--max-kl", "inf"], "max_kl=inf: Input should be a finite number"),
    ],
)
def test_options_that_cannot_be_end_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("llmcompressor_moe.evaluation.run.recorded_figures", None)
    text = ["--text", folder / "text.txt"]
    result = run("evaluate", folder / "mixtral", folder / "trimmed", *text, *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def copied(path: Path, target: Path, **weights: torch.Tensor | None) -> Path:
    """A copy of a model with other weights; None: without."""
    shutil.copytree(path, target)
    changed = load_file(target / "model.safetensors") | weights
    kept = {name: value for name, value in changed.items() if value is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


NORM = "model.norm.weight"


def test_compressed_models_are_looked_at_before_the_base_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompressor_moe.evaluation.run.open_as_served", None)
    trimmed = folder / "trimmed"
    cut = copied(trimmed, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((trimmed / "model.safetensors").read_bytes()[:-9])
    unsaid = copied(trimmed, tmp_path / "unsaid")
    (unsaid / "trimming.json").unlink()
    garbage = copied(trimmed, tmp_path / "garbage")
    (garbage / "trimming.json").write_text("garbage")
    small = support.saved("mixtral", tmp_path, vocab_size=120)
    for model, message in (
        (cut, "the tensors end at byte"),
        (
            copied(trimmed, tmp_path / "lacking", **{NORM: None}),
            f"{NORM}: config.json demands it, no file holds",
        ),
        (copied(trimmed, tmp_path / "wrong", **{NORM: torch.ones(3)}), f"{NORM}: stored as [3], config.json"),
        (unsaid, "no history (trimming.json) beside it"),
        (garbage, "trimming.json is not JSON"),
        (support.saved("qwen2_moe", tmp_path), "is of model_type 'qwen2_moe', the base"),
        (small, "a vocabulary of 128 tokens, the other model one of 120"),
    ):
        result = run("evaluate", folder / "mixtral", model, "--text", folder / "text.txt", "--length", LENGTH)
        assert result.exit_code == 2, (model, result.output, result.exception)
        assert message in " ".join(result.output.split()), (model, result.output)


def test_weights_that_are_not_there_are_never_made_up(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lack 1 weights that its config demands, model\.norm\.weight"):
        load_model(copied(folder / "mixtral", tmp_path / "lacking", **{NORM: None}))
    with pytest.raises(ValueError, match="its weights cannot be loaded"):
        load_model(copied(folder / "mixtral", tmp_path / "wrong", **{NORM: torch.ones(3)}))


def test_broken_tasks_end_before_anything_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompressor_moe.evaluation.run.open_as_served", None)
    (tmp_path / "task.yaml").write_text(
        "{task: x, dataset_path: json, dataset_kwargs: {data_files: none.jsonl}}"
    )
    models = [folder / "mixtral", folder / "trimmed"]
    result = run("evaluate", *models, "--text", folder / "text.txt", "--task", tmp_path / "task.yaml")
    assert result.exit_code == 2, result.output
    assert "cannot be set up (FileNotFoundError" in result.output


def test_what_is_read_is_not_replaced(folder: Path) -> None:
    for path in (folder / "mixtral" / "config.json", folder / "text.txt"):
        before = path.read_bytes()
        models = [folder / "mixtral", folder / "trimmed"]
        result = run("evaluate", *models, "--text", folder / "text.txt", "--output", path)
        assert result.exit_code == 2
        assert "would replace a file that is read" in result.output
        assert path.read_bytes() == before


def test_a_missing_model_ends_before_the_others_are_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompressor_moe.evaluation.run.recorded_figures", None)
    for models in (
        [folder / "nope", folder / "trimmed"],
        [folder / "mixtral", folder / "trimmed", folder / "nope"],
    ):
        result = run("evaluate", *models)
        assert result.exit_code == 2
        assert "nope' has no config.json" in result.output


def test_texts_as_editors_write_them(tmp_path: Path) -> None:
    """A byte order mark is no text, and a line separator within JSON does not end its line."""
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert documents(str(tmp_path / "text.txt"), 1) == ["one", "two"]
    (tmp_path / "text.jsonl").write_text('\ufeff{"text": "one\u2028two"}\n', encoding="utf-8")
    assert documents(str(tmp_path / "text.jsonl"), 1) == ["one\u2028two"]
