"""The teacher's highest logits on disk: what is read is what the teacher says, and nobody else's is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.atomic import OutputDirectoryError
from llmcompressor_moe.profile.options import run_options
from llmcompressor_moe.recovery import cache as cache_module
from llmcompressor_moe.recovery.cache import (
    LogitCache,
    check_cache_target,
    has_cache,
    open_cache,
    write_cache,
)
from llmcompressor_moe.recovery.objective import LossWeights, Objective
from llmcompressor_moe.recovery.teacher import CachedTeacher, LiveTeacher

ROWS = support.token_ids(7, 10)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.saved("mixtral", tmp_path_factory.mktemp("teacher"), num_layers=2)


@pytest.fixture(scope="module")
def model(teacher: Path) -> PreTrainedModel:
    return support.load(teacher)


@pytest.fixture
def written(teacher: Path, model: PreTrainedModel, tmp_path: Path) -> Path:
    write_cache(model, ROWS, tmp_path / "cache", 4, 2)
    return tmp_path / "cache"


def test_it_holds_what_the_teacher_says(
    teacher: Path, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shards of two rows: 10 positions with 5 logits of 8 bytes each.
    monkeypatch.setattr(cache_module, "_SHARD_BYTES", 2 * 10 * 5 * 8)
    model.train()
    write_cache(model, ROWS, tmp_path / "cache", 5, 3, temperature=2.0)
    assert model.training, "the teacher's mode was changed"
    model.eval()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    cache = open_cache(tmp_path / "cache", ROWS, teacher, 2.0)
    assert (cache.k, cache.temperature) == (5, 2.0)
    wanted = torch.tensor([6, 0, 3, 3])
    top = cache.top(wanted)
    logits = support.logits(model, ROWS[wanted])
    values, indices = logits.sort(dim=-1, descending=True)
    torch.testing.assert_close(top.values, values[..., :5])
    assert top.indices.dtype == torch.int64 and torch.equal(top.indices, indices[..., :5])
    torch.testing.assert_close(top.log_normalizer, (logits / 2).exp().sum(-1).log())
    assert top.temperature == 2.0


def test_a_student_learns_from_it_what_the_teacher_would_teach(
    teacher: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    student = tiny_models.build("mixtral", num_layers=2, seed=1)
    weights = LossWeights(next_token=0.5, temperature=1.5)
    write_cache(model, ROWS, tmp_path / "cache", tiny_models.VOCAB, 4, temperature=1.5)
    chosen = torch.tensor([5, 1])
    batch = {"input_ids": ROWS[chosen], "labels": ROWS[chosen], "row": chosen}
    gradients = []
    for source in (
        CachedTeacher(open_cache(tmp_path / "cache", ROWS, teacher)),
        LiveTeacher(support.load(teacher), weights),
    ):
        student.zero_grad()
        Objective(weights)(student, batch, source.signals(batch)).total.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3)


def test_logits_keep_their_precision(teacher: Path, tmp_path: Path) -> None:
    model = support.load(teacher).bfloat16()
    # Left alone, a CPU that can only emulate bfloat16 computes in float32.
    with run_options(compute_dtype=torch.bfloat16):
        cache = write_cache(model, ROWS, tmp_path / "cache", 3, 4, teacher=teacher)
    top = cache.top(torch.arange(4))
    assert top.values.dtype == torch.bfloat16 and top.log_normalizer.dtype == torch.float32
    assert torch.equal(top.values, support.logits(model, ROWS[:4]).topk(3).values)


def test_another_cache_is_refused(written: Path, teacher: Path, tmp_path: Path) -> None:
    assert isinstance(open_cache(written, ROWS, teacher), LogitCache)
    with pytest.raises(ValueError, match="written for other text: 7 rows of 10 tokens"):
        open_cache(written, ROWS.flip(0), teacher)
    with pytest.raises(ValueError, match=r"written for other text.*\(7, 9\)"):
        open_cache(written, ROWS[:, :9], teacher)
    other = support.saved("mixtral", tmp_path, num_layers=2, seed=1)
    with pytest.raises(ValueError, match=r"written by another teacher than .*mixtral"):
        open_cache(written, ROWS, other)
    with pytest.raises(ValueError, match=r"temperature 1.0, not 2.0.*Remove .* or name another directory"):
        open_cache(written, ROWS, teacher, 2.0)
    with pytest.raises(ValueError, match=r"has no cache.json"):
        open_cache(tmp_path, ROWS, teacher)
    with pytest.raises(ValueError, match=r"row \[7\].*has 7 rows"):
        open_cache(written, ROWS, teacher).top(torch.tensor([7]))


def test_a_damaged_cache_is_refused(written: Path, teacher: Path) -> None:
    (shard,) = written.glob("*.safetensors")
    cache = open_cache(written, ROWS, teacher)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"logits-00000000.safetensors.* cannot be read"):
        cache.top(torch.tensor([0]))
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 1 files, logits-00000000\.safetensors"):
        open_cache(written, ROWS, teacher)
    index = written / "cache.json"
    for text in ("{", json.dumps({**json.loads(index.read_text()), "k": 0}), '{"format": 1}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"cache\.json.* cannot be read"):
            open_cache(written, ROWS, teacher)


def test_what_cannot_be_written(model: PreTrainedModel, tmp_path: Path) -> None:
    for k in (0, 129):
        with pytest.raises(ValueError, match=f"k is {k}; give 1 to 128"):
            write_cache(model, ROWS, tmp_path / "cache", k, 2)
    with pytest.raises(ValueError, match=r"rows has shape \(0, 10\)"):
        write_cache(model, ROWS[:0], tmp_path / "cache", 2, 2)
    with pytest.raises(ValueError, match="was not loaded from a directory"):
        write_cache(tiny_models.build("mixtral", num_layers=1), ROWS, tmp_path / "cache", 2, 2)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    with pytest.raises(ValueError, match="holds files and is not a cache"):
        write_cache(model, ROWS, tmp_path / "model", 2, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        check_cache_target(tmp_path / "file")
    assert (tmp_path / "model" / "model.safetensors").read_text() == "weights"


def test_an_interrupted_cache_leaves_nothing(
    written: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in written.iterdir()}

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    model = support.load(teacher)
    for name in ("cache", "new"):
        with pytest.raises(OutputDirectoryError, match=r"No space left.*write the cache again"):
            write_cache(model, ROWS.flip(0), tmp_path / name, 2, 2)
    assert not has_cache(tmp_path / "new") and not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_cache_takes_the_place_of_another(written: Path, teacher: Path, model: PreTrainedModel) -> None:
    write_cache(model, ROWS[:3], written, 2, 2)
    assert open_cache(written, ROWS[:3], teacher).k == 2
    check_cache_target(written)
