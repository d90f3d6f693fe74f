"""Bad input to `recover`: a clear error before any model is loaded, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import recovery_cases as cases
import support
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmcompressor_moe.recovery import RecoverySettings, recover, run


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """Student, teacher, text, and the directory they are in."""
    directory = tmp_path_factory.mktemp("models")
    base = cases.teacher(directory)
    return {
        "teacher": base,
        "student": cases.student(directory, base),
        "text": cases.text(directory),
        "directory": directory,
    }


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch) -> None:
    def loading(*arguments, **options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(run, "load_student", loading)
    monkeypatch.setattr(run, "load_decompressed", loading)
    monkeypatch.setattr(run, "open_as_served", loading)


def refused(message: str, tmp_path: Path, given: dict[str, Path], **changes) -> None:
    places = {name: changes.pop(name, given.get(name)) for name in ("student", "teacher")}
    out = changes.pop("output", tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        settings = RecoverySettings.model_validate({**cases.BASICS, "data": str(given["text"]), **changes})
        recover(places["student"], out, teacher=places["teacher"], settings=settings)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["routers"]}, r"train='routers': choose some of router, norms"),
        ({"train": []}, "train names no parameters"),
        ({"weights": {"logits_kl": 0}}, "all weights are 0"),
        ({"weights": {"kl": 1}}, "kl"),
        ({"weights": {"logits_kl": -1}}, "logits_kl"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"schedule": "stairs"}, "schedule"),
        ({"dtype": "float16"}, "(?s)dtype.*choose one of auto, bfloat16, float32"),
        ({"lora": {"rank": 4}}, r"lora is given, but train=\['all'\] leaves the adapters out; add 'lora'"),
        ({"lora": {"rank": 0}, "train": ["lora"]}, "rank"),
        ({"precision": "fp16"}, "precision='fp16' needs an accelerator; on a CPU use bf16"),
        ({"precision": "fp16", "dtype": "bfloat16"}, "weights in float32, not dtype='bfloat16'"),
        ({"cache": "c", "weights": {"router_kl": 1}}, "router_kl need the teacher itself, and a cache holds"),
        ({"cache": "c", "weights": {"next_token": 1, "logits_kl": 0}}, "cache='c' serves logits_kl"),
        ({"teacher": None}, "logits_kl: a teacher to compare with is missing; name the"),
        ({"length": 512}, "length=512, but the student has 256 positions"),
        (
            {"batch_size": 400},
            r"one step takes 400 \(batch_size=400 x accumulate=1 x 1 ranks\); give more text",
        ),
        ({"data": "nowhere.txt"}, "dataset 'nowhere.txt' cannot be read"),
        ({"heldout": "nowhere.txt"}, "dataset 'nowhere.txt' cannot be read"),
        ({"recipe": "nowhere.yaml"}, "recipe 'nowhere.yaml' cannot be read"),
        ({"student": "nowhere"}, "nowhere"),
        ({"teacher": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: json.dumps(value, default=str) if isinstance(value, dict) else "",
)
def test_refused(changes: dict, message: str, tmp_path: Path, given) -> None:
    refused(message, tmp_path, given, **changes)


def test_output_is_an_input(tmp_path: Path, given) -> None:
    refused("is the student itself; name another directory", tmp_path, given, output=given["student"])
    refused("is the teacher; name another directory", tmp_path, given, output=given["teacher"])
    refused("is the cache", tmp_path, given, output=tmp_path / "c", cache=tmp_path / "c")
    refused("is a model's directory", tmp_path, given, cache=given["teacher"])


def test_output_is_a_file(tmp_path: Path, given) -> None:
    (tmp_path / "file").write_text("")
    refused("is a file; name a directory", tmp_path, given, output=tmp_path / "file")


def test_no_text(tmp_path: Path, given) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    refused("is empty; give at least one document", tmp_path, given, data=str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("t30 t31 t32")
    refused("holds 4 tokens, too few for one row of 16", tmp_path, given, data=str(tmp_path / "short.txt"))
    refused("heldout=.* less than one row of 16", tmp_path, given, heldout=str(tmp_path / "short.txt"))


def _copy(base: Path, directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    shutil.copytree(base, directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_teacher_with_another_tokenizer(tmp_path: Path, given) -> None:
    swapped = {f"t{i}": i for i in range(support.VOCAB)} | {"t40": 41, "t41": 40}
    words = Tokenizer(models.WordLevel(swapped, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2")
    base = _copy(given["teacher"], tmp_path / "other", other)
    refused(
        "another tokenizer .*'t40' is token 40 of the student and token 41 of the teacher",
        tmp_path,
        given,
        teacher=base,
    )


def test_teacher_that_cuts_text_otherwise(tmp_path: Path, given) -> None:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(support.VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Digits()
    other = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", pad_token="t0", bos_token="t1", eos_token="t2"
    )
    base = _copy(given["teacher"], tmp_path / "other", other)
    refused("the two cut 't.*' into different tokens", tmp_path, given, teacher=base)


def test_student_of_another_teacher(tmp_path: Path, given) -> None:
    """Where parts are compared; logits may come from anybody with the same tokens."""
    larger = tmp_path / "larger"
    larger.mkdir()
    base = support.saved("mixtral", larger, num_layers=6)
    refused(
        "cannot be laid over the teacher .*Name the model that the student was made from",
        tmp_path,
        given,
        teacher=base,
        weights={"router_kl": 1},
    )


def test_cache_of_another_text(tmp_path: Path, given, monkeypatch) -> None:
    from llmcompressor_moe.loading import load_decompressed
    from llmcompressor_moe.recovery.cache import write_cache

    rows = support.token_ids(4, 16)
    write_cache(load_decompressed(given["teacher"]), rows, tmp_path / "cache", 4, 2, teacher=given["teacher"])
    refused("was written for other text: 4 rows", tmp_path, given, cache=tmp_path / "cache")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    refused("holds files and is not a cache", tmp_path, given, cache=tmp_path / "full")


def test_calibrating_modifiers(tmp_path: Path, given) -> None:
    recipe = tmp_path / "drop.yaml"
    recipe.write_text(cases.DROPS)
    refused("recipe: ExpertDropModifier works by calibration", tmp_path, given, recipe=recipe)
    refused(
        "modifiers work on weights, adapters are", tmp_path, given, recipe=recipe, train=["lora", "router"]
    )


def test_ranks_that_share_a_model(tmp_path: Path, given, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("ACCELERATE_USE_FSDP is set, but .*every rank needs the", tmp_path, given)


def test_somebody_elses_files_where_checkpoints_go(tmp_path: Path, given) -> None:
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "notes.txt").write_text("mine")
    refused("out.training' is where checkpoints would go, and holds files", tmp_path, given)
