"""Every kind of bad input gives an error that names the field, the value and the way out.

It comes before calibration where that can be.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
import torch
from datasets import Dataset
from loguru import logger
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.checkpoint import atomic
from llmcompressor_moe.report import PlanFileError


class Watched:
    """A model whose forward passes are counted."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.passes = 0
        model.model.layers[0].register_forward_pre_hook(self._count)

    def _count(self, _module, _args) -> None:
        self.passes += 1

    def shape(self) -> tuple:
        """Blocks, and experts per block that has them."""
        layers = self.model.model.layers
        routers = [layer.mlp.gate.weight.shape[0] for layer in layers if hasattr(layer.mlp, "gate")]
        return len(layers), tuple(routers), self.model.config.to_json_string()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def mixtral(directory: Path) -> Watched:
    return Watched(support.load(support.saved("mixtral", directory)))


@pytest.fixture
def deepseek(directory: Path) -> Watched:
    """Group-limited router: 8 experts in 2 groups, 1 group per token, top-2; block 0 is dense."""
    return Watched(support.load(support.saved("deepseek_v2", directory)))


def refused_before_calibration(watched: Watched, recipe, message: str, tmp_path: Path, **options) -> None:
    output = tmp_path / "out"
    before = watched.shape()
    with pytest.raises(Exception, match=message):
        support.trim(watched.model, recipe, output_dir=str(output), **options)
    assert watched.passes == 0, "the error must come before calibration"
    assert watched.shape() == before and not output.exists()


# Fields


@pytest.mark.parametrize("modifier", [LayerDropModifier, BlockDropModifier, ExpertDropModifier])
def test_no_amount_and_two_amounts(modifier) -> None:
    with pytest.raises(ValueError, match=rf"{modifier.__name__} takes exactly one of num_drop, .*; got none"):
        modifier()
    with pytest.raises(ValueError, match="got num_drop and drop_ratio"):
        modifier(num_drop=1, drop_ratio=0.5)


@pytest.mark.parametrize(
    ("modifier", "fields", "message"),
    [
        (LayerDropModifier, {"num_drop": 0}, "num_drop=0 must be at least 1"),
        (BlockDropModifier, {"num_drop": -2}, "num_drop=-2 must be at least 1"),
        (ExpertDropModifier, {"num_drop": 0}, "num_drop=0 must be at least 1"),
        (LayerDropModifier, {"drop_ratio": 1.0}, "drop_ratio=1.0 must lie between 0 and 1"),
        (ExpertDropModifier, {"drop_ratio": 0.0}, "drop_ratio=0.0 must lie between 0 and 1"),
        (LayerDropModifier, {"layers": []}, r"layers=\[\] must name at least one index"),
        (LayerDropModifier, {"layers": [1, 1]}, r"layers=\[1, 1\] must name .*only once"),
        (BlockDropModifier, {"blocks": [2, 0, 2]}, r"blocks=\[2, 0, 2\] must name .*only once"),
        (BlockDropModifier, {"blocks": [2], "protect": [2]}, r"blocks=\[2\] and protect=\[2\] name the same"),
        (ExpertDropModifier, {"experts": {}}, "experts={} names no expert"),
        (ExpertDropModifier, {"experts": {0: [1, 1]}}, r"experts\[0\]=\[1, 1\] must name .*only once"),
        (ExpertDropModifier, {"experts": {0: []}}, r"experts\[0\]=\[\] must name at least one"),
        (ExpertDropModifier, {"experts": {0: [1]}, "protect": [0]}, r"experts\[0\] and protect=\[0\]"),
        (
            LayerDropModifier,
            {"num_drop": 1, "metric": "cosin"},
            "metric='cosin' is unknown; choose one of cosine, kl",
        ),
        (
            ExpertDropModifier,
            {"num_drop": 1, "criterion": "gut"},
            "criterion='gut' is unknown; choose one of frequency",
        ),
        (
            LayerDropModifier,
            {"threshold": 0.9, "metric": "random"},
            "threshold=0.9 means nothing for metric='random'",
        ),
        (
            BlockDropModifier,
            {"threshold": 3.0, "metric": "last"},
            "threshold=3.0 means nothing for metric='last'",
        ),
        (
            LayerDropModifier,
            {"num_drop": 1, "protect": [-1]},
            r"protect=\[-1\] must be distinct block indices",
        ),
        (LayerDropModifier, {"num_drop": 1, "protect": [2, 2]}, r"protect=\[2, 2\] must be distinct"),
        (
            LayerDropModifier,
            {"num_drop": 1, "report_path": "r.txt"},
            "report_path='r.txt' must end with .json",
        ),
        (ExpertDropModifier, {"num_drop": 1, "min_experts": 0}, "min_experts=0 must be at least 1"),
        (
            BlockDropModifier,
            {"num_drop": 1, "pattern": "consecutive", "search": "greedy"},
            "pattern='consecutive' .*use search='one_shot'",
        ),
        (LayerDropModifier, {"num_drop": 1, "search": "beam"}, "one_shot.*greedy"),
        (ExpertDropModifier, {"num_drop": 1, "scope": "block"}, "layer.*global"),
        (LayerDropModifier, {"num_dorp": 1}, "num_dorp"),
    ],
)
def test_bad_fields(modifier, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        modifier(**fields)


# Fields that do not fit the model


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            LayerDropModifier(layers=[1, 9]),
            r"LayerDropModifier: \[9\] cannot be dropped; the model's layers are \[0, 1, 2, 3\]",
        ),
        (
            BlockDropModifier(blocks=[4]),
            r"BlockDropModifier: \[4\] cannot be dropped; the model's blocks are \[0, 1, 2, 3\]",
        ),
        (BlockDropModifier(blocks=[-1]), r"\[-1\] cannot be dropped"),
        (ExpertDropModifier(experts={7: [0]}), r"experts\[7\]: block 7 has no MoE layer; .*\[0, 1, 2, 3\]"),
        (
            ExpertDropModifier(experts={1: [3, 8]}),
            r"experts\[1\]=\[3, 8\]: \[8\] are not among the layer's experts",
        ),
        (LayerDropModifier(layers=[0, 1, 2, 3]), "would drop every layer; one must stay"),
        (BlockDropModifier(blocks=[0, 1, 2, 3]), "would drop every block; one must stay"),
        (LayerDropModifier(num_drop=4), "num_drop=4 would drop all 4 layers"),
        (BlockDropModifier(num_drop=9), "num_drop=9 would drop all 4 blocks"),
        (LayerDropModifier(drop_ratio=0.2), "drop_ratio=0.2 of 4 layers drops none; use at least 0.25"),
        (
            LayerDropModifier(num_drop=3, protect=[0, 1]),
            "3 layers are to be dropped, but only 2 of 4 are not protected",
        ),
        (ExpertDropModifier(num_drop=8), "num_drop=8 would drop all 8 experts"),
        (
            ExpertDropModifier(num_drop=7),
            "num_drop=7 would leave layer 0 with 1 of 8 experts; it needs at least 2. Drop at most 6",
        ),
        (
            ExpertDropModifier(num_drop=7, scope="global"),
            "28 experts are to be dropped in all, but the floors allow 24",
        ),
        (ExpertDropModifier(num_drop=4, min_experts=6), "needs at least 6. Drop at most 2"),
        (ExpertDropModifier(drop_ratio=0.1), "drop_ratio=0.1 of 8 experts of layer 0 drops none"),
        (
            ExpertDropModifier(experts={2: [0, 1, 2, 3, 4, 5, 6]}),
            r"would leave 1 of 8 experts; at least 2 must stay",
        ),
        (
            LayerDropModifier(num_drop=1, protect=[4]),
            r"protect=\[4\]: the model has 4 blocks; \[4\] do not exist",
        ),
        (ExpertDropModifier(num_drop=1, protect=[0, 1, 2, 3]), r"protect=\[0, 1, 2, 3\] leaves no MoE layer"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_does_not_fit_the_model(recipe, message: str, mixtral: Watched, tmp_path: Path) -> None:
    refused_before_calibration(mixtral, recipe.model_copy(deep=True), message, tmp_path)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LayerDropModifier(layers=[0]), r"\[0\] cannot be dropped; the model's layers are \[1, 2, 3\]"),
        (BlockDropModifier(blocks=[1, 2, 3]), "would leave no MoE layer"),
        (ExpertDropModifier(num_drop=3), r"num_drop=3 in layer 1: .*2 groups.*multiple of 2"),
        (ExpertDropModifier(num_drop=1, scope="global"), r"3 experts .*2 groups.*multiple of 2"),
        (
            ExpertDropModifier(experts={1: [0, 1]}),
            r"experts\[1\]=\[0, 1\]: the router is group-limited; each of its 2 groups",
        ),
        (ExpertDropModifier(num_drop=6), "needs at least 4"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_does_not_fit_a_group_limited_model(recipe, message: str, deepseek: Watched, tmp_path: Path) -> None:
    refused_before_calibration(deepseek, recipe.model_copy(deep=True), message, tmp_path)


@pytest.mark.parametrize(
    "recipe", [LayerDropModifier(num_drop=1), BlockDropModifier(num_drop=1), ExpertDropModifier(num_drop=1)]
)
def test_dense_model(recipe, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    model = Watched(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"))
    message = "LlamaForCausalLM .*'llama'.* has no MoE layer.*llm-compressor's own modifiers"
    refused_before_calibration(model, recipe.model_copy(deep=True), message, tmp_path)


# Data


@pytest.mark.parametrize(
    "recipe",
    [
        LayerDropModifier(num_drop=1),
        LayerDropModifier(num_drop=1, metric="kl"),
        BlockDropModifier(num_drop=1),
        ExpertDropModifier(num_drop=1),
    ],
)
def test_no_dataset_where_one_is_needed(recipe, mixtral: Watched, tmp_path: Path) -> None:
    message = f"{type(recipe).__name__} needs calibration data: pass `dataset=` to oneshot, or name"
    refused_before_calibration(mixtral, recipe.model_copy(deep=True), message, tmp_path, no_data=True)


def test_empty_dataset(mixtral: Watched, tmp_path: Path) -> None:
    empty = Dataset.from_dict({"input_ids": [], "attention_mask": []})
    before = mixtral.shape()
    with pytest.raises(Exception, match=r"(?i)empty|num_samples|Cannot infer"):
        from llmcompressor import oneshot

        oneshot(
            model=mixtral.model,
            recipe=LayerDropModifier(num_drop=1),
            dataset=empty,
            tokenizer=support.tokenizer(),
            output_dir=str(tmp_path / "out"),
        )
    assert mixtral.passes == 0 and mixtral.shape() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        LayerDropModifier(num_drop=1),
        LayerDropModifier(num_drop=1, metric="kl"),
        BlockDropModifier(num_drop=2, pattern="consecutive"),
        ExpertDropModifier(num_drop=1),
        ExpertDropModifier(num_drop=1, criterion="reap"),
        ExpertDropModifier(num_drop=1, criterion="redundancy"),
        ExpertDropModifier(num_drop=1, criterion="weight_norm"),
    ],
    ids=lambda recipe: (
        f"{type(recipe).__name__}-{getattr(recipe, 'metric', getattr(recipe, 'criterion', ''))}"
    ),
)
def test_nan_activations(recipe, mixtral: Watched, tmp_path: Path) -> None:
    with torch.no_grad():
        # The MoE layer of the last block, so that nothing after it can hide the block's name.
        for parameter in mixtral.model.model.layers[3].mlp.experts.parameters():
            parameter.fill_(float("nan"))
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    before = mixtral.shape()
    with pytest.raises(
        FloatingPointError, match=r"block [0-3]: .*NaN or infinite.*No part\s+was dropped"
    ) as caught:
        support.trim(mixtral.model, recipe.model_copy(deep=True), output_dir=str(output))
    if getattr(recipe, "metric", "") != "kl":
        assert "block 3" in str(caught.value) or "block 2" in str(caught.value)
    assert mixtral.shape() == before
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_the_next_recipe_runs_after_a_refused_one(mixtral: Watched, directory: Path, tmp_path: Path) -> None:
    refused_before_calibration(mixtral, LayerDropModifier(layers=[9]), r"\[9\] cannot be dropped", tmp_path)
    model = support.load(support.saved("mixtral", directory))
    assert len(support.trim(model, BlockDropModifier(blocks=[1]), no_data=True).model.layers) == 3


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


def test_experts_that_see_no_token_go_first_and_have_no_score(
    mixtral: Watched, warnings: list[str], tmp_path: Path
) -> None:
    with torch.no_grad():
        gate = mixtral.model.model.layers[2].mlp.gate.weight
        # Opposite rows: whatever a token says, one of the other experts says more.
        gate[[3, 6]] = 0
        gate[1] = -gate[0] * 3
        gate[4] = gate[0] * 3
        gate[5] = -gate[2] * 3
        gate[7] = gate[2] * 3
    report = tmp_path / "report.json"
    support.trim(mixtral.model, ExpertDropModifier(num_drop=2, criterion="reap", report_path=str(report)))
    written = json.loads(report.read_text())
    assert written["dropped"]["2"] == [3, 6]
    assert written["scores"]["2"][3] is None and written["scores"]["2"][6] is None
    assert sum(score is None for score in written["scores"]["2"]) == 2
    assert any("2 experts saw no calibration token" in text and "{2: 2}" in text for text in warnings)


# Output


def test_output_is_a_file(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("mine")
    model = support.trim(
        support.load(support.saved("mixtral", directory)), BlockDropModifier(blocks=[1]), no_data=True
    )
    with pytest.raises(OSError, match=r"output '.*file' is a file; name a directory"):
        model.save_pretrained(target)
    with pytest.raises(OSError, match=r"output '.*'.*cannot be written|is a file|Not a directory"):
        model.save_pretrained(target / "below")
    assert target.read_text() == "mine"


def test_read_only_output(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = support.trim(
        support.load(support.saved("mixtral", directory)), BlockDropModifier(blocks=[1]), no_data=True
    )
    touch = Path.touch

    def refuse(self: Path, *args, **kwargs) -> None:
        # chmod does not stop root.
        if tmp_path in self.parents:
            raise OSError(errno.EROFS, "Read-only file system")
        touch(self, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(
        atomic.OutputDirectoryError, match=r"output '.*out': .* cannot be written \(Read-only file system\)"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_disk_full_while_saving(
    existing: bool, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = support.trim(
        support.load(support.saved("mixtral", directory)), BlockDropModifier(blocks=[1]), no_data=True
    )
    output = tmp_path / "out"
    if existing:
        output.mkdir()
        (output / "config.json").write_text("{}")
        (output / "model.safetensors").write_bytes(b"old")
    before = {path.name: path.read_bytes() for path in output.iterdir()} if existing else None

    def full(*_args, **_kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        # The weights are on disk already; the model card no longer fits.
        patch.setattr("llmcompressor_moe.saving.save.write_model_card", full)
        with pytest.raises(
            atomic.OutputDirectoryError, match=r"Saving to '.*out' failed .*No space left.*as it was before"
        ):
            model.save_pretrained(output)
    after = {path.name: path.read_bytes() for path in output.iterdir()} if output.exists() else None
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else []), (
        "nothing temporary stays behind"
    )
    model.save_pretrained(output)
    assert len(support.load(output).model.layers) == 3


def test_report_that_cannot_be_written(mixtral: Watched, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = LayerDropModifier(num_drop=1, report_path=str(tmp_path / "file" / "report.json"))
    refused_before_calibration(mixtral, recipe, r"report_path='.*report.json' cannot be written", tmp_path)


# Plans


def plan(mixtral: Watched, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    support.trim(mixtral.model, LayerDropModifier(layers=[1], report_path=str(path)), no_data=True)
    return path


def test_plan_of_another_model_or_modifier(
    mixtral: Watched, deepseek: Watched, directory: Path, tmp_path: Path
) -> None:
    path = plan(mixtral, tmp_path)
    message = "made for another model or modifier: its model_type is 'mixtral', here it is 'deepseek_v2'"
    refused_before_calibration(
        deepseek, LayerDropModifier(plan_path=str(path)), message, tmp_path, no_data=True
    )
    fresh = Watched(support.load(support.saved("mixtral", directory)))
    message = "its modifier is 'LayerDropModifier', here it is 'BlockDropModifier'"
    refused_before_calibration(fresh, BlockDropModifier(plan_path=str(path)), message, tmp_path, no_data=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "plan_path='.*' cannot be read: .*No such file"),
        ("{", "plan_path='.*' is not a saved plan: .*EOF"),
        ("[1, 2]", "is not a saved plan"),
        ('{"modifier": "LayerDropModifier"}', "is not a saved plan: .*scores"),
        (
            '{"modifier": "LayerDropModifier", "scores": {}, "dropped": ["a"], "kept": []}',
            "is not a saved plan: .*dropped",
        ),
        (
            '{"modifier": "LayerDropModifier", "scores": {}, "dropped": [1], "kept": [], "extra": 1}',
            "is not a saved plan: .*extra",
        ),
        (
            '{"modifier": "LayerDropModifier", "scores": {}, "dropped": [7], "kept": []}',
            r"\[7\] cannot be dropped",
        ),
        (
            '{"modifier": "LayerDropModifier", "scores": {}, "dropped": [], "kept": []}',
            "must be a list of block indices, with at least one",
        ),
        (
            '{"modifier": "LayerDropModifier", "scores": {}, "dropped": {"1": [2]}, "kept": []}',
            "must be a list of block",
        ),
    ],
)
def test_broken_plan(text: str | None, message: str, mixtral: Watched, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    recipe = LayerDropModifier(plan_path=str(path))
    refused_before_calibration(mixtral, recipe, re.compile(message, re.DOTALL), tmp_path, no_data=True)


def test_plan_errors_are_value_errors() -> None:
    assert issubclass(PlanFileError, ValueError)
