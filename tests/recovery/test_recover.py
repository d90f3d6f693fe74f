"""`recover` on small models: what it trains, writes and says, against plain loops and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recovery_cases as cases
import torch
from torch import nn
from transformers import AutoModelForCausalLM, get_scheduler

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.demo import DEMO_MODEL, heldout_texts, token_rows
from llmcompressor_moe.evaluation.likelihood import mean_negative_log_likelihood
from llmcompressor_moe.loading import load_decompressed, load_tokenizer
from llmcompressor_moe.recovery import RecoveryReport, RecoverySettings, recover
from llmcompressor_moe.recovery.data import RecoveryRows, RowStream, recovery_rows
from llmcompressor_moe.recovery.dense import to_dense


def settings(text: Path, **changes) -> RecoverySettings:
    return RecoverySettings.model_validate({**cases.BASICS, "data": str(text), **changes})


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory) -> tuple[RecoveryReport, Path]:
    """What comes of the basic settings, and where it is."""
    student, base, text = models
    out = tmp_path_factory.mktemp("plain") / "out"
    return recover(student, out, teacher=base, settings=settings(text)), out


def curve(report: RecoveryReport) -> list[float]:
    return [entry.loss for entry in report.log if entry.loss is not None]


def rows_of(text: Path, student: Path) -> RecoveryRows:
    return recovery_rows(
        str(text),
        None,
        load_tokenizer(student),
        length=16,
        wanted_rows=1,
        heldout_share=0.1,
        max_heldout_tokens=32768,
    )


def test_the_bundled_model_wins_back_what_it_lost(tmp_path: Path) -> None:
    student = cases.student(
        tmp_path,
        DEMO_MODEL,
        "default_stage: {default_modifiers: {ExpertDropModifier: {experts: {2: [0, 1, 2, 3], 5: [4, 5]}}}}",
    )
    out, heldout = tmp_path / "out", tmp_path / "heldout.txt"
    heldout.write_text("\n\n".join(heldout_texts()[:5]))
    found = recover(
        student,
        out,
        teacher=DEMO_MODEL,
        settings=RecoverySettings(
            heldout=str(heldout), steps=10, length=128, batch_size=8, learning_rate=5e-4, use_cpu=True
        ),
    )
    assert found.teacher_nll < found.end_nll < found.start_nll
    assert found.gap_closed == pytest.approx(
        (found.start_nll - found.end_nll) / (found.start_nll - found.teacher_nll)
    )
    assert found.tokens == 10 * 8 * 128
    # Measured by others, on what was written: in bfloat16, while training was in float32.
    rows = torch.tensor(token_rows(load_tokenizer(out), heldout_texts()[:5], 128))
    for path, nll in ((student, found.start_nll), (out, found.end_nll), (DEMO_MODEL, found.teacher_nll)):
        assert mean_negative_log_likelihood(load_decompressed(path), rows) == pytest.approx(nll, rel=2e-3)
    assert json.loads((out / "recovery.json").read_text()) == found.model_dump(mode="json")
    assert (out / "recovery.png").read_bytes().startswith(b"\x89PNG")
    assert found.describe() in (out / "README.md").read_text()
    assert (out / "trimming.json").read_text() == (student / "trimming.json").read_text()
    assert check_checkpoint(out).ok
    assert cases.tensors(out).keys() == cases.tensors(student).keys()
    assert not (tmp_path / "out.training").exists()


def test_trains_as_a_plain_loop_does(models, tmp_path: Path) -> None:
    """Loss by transformers, AdamW by torch, rows in the order of the stream."""
    student, base, text = models
    wanted = settings(
        text, weights={"next_token": 1, "logits_kl": 0}, accumulate=2, warmup=0.5, keep_zeros=False
    )
    recover(student, tmp_path / "out", teacher=base, settings=wanted)

    stream = RowStream(rows_of(text, student).train, 6 * 8, wanted.seed)
    model = load_decompressed(student, "float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=6)
    for step in range(6):
        ids = torch.stack([stream[index]["input_ids"] for index in range(8 * step, 8 * step + 8)])
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trained = load_decompressed(tmp_path / "out", "float32")
    before = dict(load_decompressed(student, "float32").named_parameters())
    for name, value in trained.named_parameters():
        expected = model.get_parameter(name)
        moved = (expected - before[name]).abs().max()
        assert moved > 1e-3, name
        assert (value - expected).abs().max() < 0.02 * moved, name


def test_accumulated_batches_are_one_batch(models, plain, tmp_path: Path) -> None:
    student, base, text = models
    whole, _ = plain
    parts = recover(
        student, tmp_path / "parts", teacher=base, settings=settings(text, batch_size=1, accumulate=4)
    )
    assert curve(parts) == pytest.approx(curve(whole), rel=1e-4)
    assert parts.tokens == whole.tokens
    assert parts.end_nll == pytest.approx(whole.end_nll, rel=1e-5)


def test_every_loss_at_once_with_checkpointed_gradients(models, tmp_path: Path) -> None:
    """Checkpointing saves memory and changes nothing."""
    student, base, text = models
    weights = dict.fromkeys(
        ("next_token", "logits_kl", "router_kl", "expert_output", "hidden", "load_balancing"), 0.5
    )
    plain = recover(student, tmp_path / "plain", teacher=base, settings=settings(text, weights=weights))
    kept = settings(text, weights=weights, gradient_checkpointing=True)
    again = recover(student, tmp_path / "again", teacher=base, settings=kept)
    assert set(plain.log[-1].parts) == set(weights)
    for entry in plain.log[1:]:
        assert entry.loss == pytest.approx(0.5 * sum(entry.parts.values()), rel=1e-5)
    assert curve(again) == pytest.approx(curve(plain), rel=1e-4)


@pytest.mark.parametrize(("train", "marks"), [(["router"], ["gate.weight"]), (["norms"], ["norm.weight"])])
def test_trains_the_named_set_alone(models, tmp_path: Path, train: list[str], marks: list[str]) -> None:
    student, base, text = models
    found = recover(student, tmp_path / "out", teacher=base, settings=settings(text, train=train))
    before, after = cases.tensors(student), cases.tensors(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if any(name.endswith(mark) for mark in marks)} | {
        name for name in moved if train == ["norms"] and "norm" in name
    }
    assert found.trained_parameters == sum(before[name].numel() for name in moved)


def test_adapters_are_merged(models, tmp_path: Path) -> None:
    student, base, text = models
    lora = {"rank": 2, "alpha": 4, "targets": ["attention", "experts", "router"]}
    found = recover(
        student, tmp_path / "out", teacher=base, settings=settings(text, train=["lora", "norms"], lora=lora)
    )
    before, after = cases.tensors(student), cases.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in moved) and any("gate" in name for name in moved)
    assert not any("embed" in name or "lm_head" in name for name in moved)
    assert found.trained_parameters < found.total_parameters == sum(t.numel() for t in before.values())
    rows = rows_of(text, student).heldout
    merged = load_decompressed(tmp_path / "out", "float32")
    assert mean_negative_log_likelihood(merged, rows) == pytest.approx(found.end_nll, rel=1e-5)


def pruned(student: Path, directory: Path) -> Path:
    """The student with every third weight of its experts' and attention's matrices gone."""
    model = load_decompressed(student, "float32")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "experts" in name or "q_proj" in name:
                value.view(-1)[::3] = 0
    from llmcompressor_moe.recovery.students import load_student, save_student

    again = load_student(student, "float32")
    again.load_state_dict(model.state_dict())
    save_student(again, directory, student)
    return directory


def zeros(checkpoint: Path) -> dict[str, int]:
    return {name: int((value == 0).sum()) for name, value in cases.tensors(checkpoint).items()}


def test_pruned_weights_stay_zero(models, tmp_path: Path) -> None:
    student, base, text = models
    sparse = pruned(student, tmp_path / "sparse")
    before = zeros(sparse)
    assert sum(before.values()) > 10_000
    recover(sparse, tmp_path / "kept", teacher=base, settings=settings(text))
    assert zeros(tmp_path / "kept") == before
    assert not cases.same(sparse, tmp_path / "kept")
    recover(sparse, tmp_path / "filled", teacher=base, settings=settings(text, keep_zeros=False))
    assert sum(zeros(tmp_path / "filled").values()) < sum(before.values()) / 10
    with pytest.raises(ValueError, match=r"the student is pruned .*adapters would fill its zeros"):
        recover(sparse, tmp_path / "lora", teacher=base, settings=settings(text, train=["lora"]))
    assert not (tmp_path / "lora").exists()


def test_a_recipe_prunes_while_it_trains(models, tmp_path: Path) -> None:
    student, base, text = models
    recipe = tmp_path / "schedule.yaml"
    recipe.write_text(
        "default_stage: {default_modifiers: {MagnitudePruningModifier: {targets: ['re:.*q_proj$'], init_sparsity: "
        "0.1, final_sparsity: 0.5, start: 0, end: 5}, ConstantPruningModifier: {targets: ['re:.*q_proj$'], "
        "start: 5}}}"
    )
    recover(student, tmp_path / "out", teacher=base, settings=settings(text, recipe=recipe, steps=8))
    after = cases.tensors(tmp_path / "out")
    for name, count in zeros(tmp_path / "out").items():
        expected = 0.5 if "q_proj" in name else 0
        assert count / after[name].numel() == pytest.approx(expected, abs=0.01), name


def test_a_cache_of_all_logits_is_the_teacher(models, plain, tmp_path: Path) -> None:
    student, base, text = models
    live, _ = plain
    kept = settings(text, cache=tmp_path / "cache", cache_top=cases.tiny_models.VOCAB)
    first = recover(student, tmp_path / "first", teacher=base, settings=kept)
    told: list[str] = []
    second = recover(student, tmp_path / "second", teacher=base, settings=kept, announce=told.append)
    assert curve(first) == pytest.approx(curve(live), rel=1e-4)
    assert first.teacher_nll == second.teacher_nll == pytest.approx(live.teacher_nll)
    assert cases.same(tmp_path / "first", tmp_path / "second")
    assert not any("teacher" in line for line in told)


def test_a_quantized_student_stays_quantized(models, tmp_path: Path) -> None:
    text = models[2]
    base = cases.teacher(tmp_path, "qwen3_moe")
    recipe = (
        "default_stage: {default_modifiers: {ExpertDropModifier: {experts: {1: [0, 3], 2: [5, 6]}}, "
        "QuantizationModifier: {ignore: ['lm_head', 're:.*gate$'], config_groups: {all: {targets: [Linear], "
        "weights: {num_bits: 8, type: int, strategy: group, group_size: 32}}}}}}"
    )
    student = cases.student(tmp_path, base, recipe, "quantized")
    found = recover(
        student, tmp_path / "out", teacher=base, settings=settings(text, learning_rate=1e-3, steps=12)
    )
    before, after = cases.tensors(student), cases.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert any(
        name.endswith("weight_packed") and not torch.equal(before[name], after[name]) for name in before
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"]
    assert check_checkpoint(tmp_path / "out").ok
    rows = rows_of(text, student).heldout
    for path, nll in ((student, found.start_nll), (tmp_path / "out", found.end_nll)):
        assert mean_negative_log_likelihood(load_decompressed(path), rows) == pytest.approx(nll, rel=1e-5)
    assert found.start_nll != found.end_nll


def test_without_a_teacher_there_is_no_gap(models, tmp_path: Path) -> None:
    student, _, text = models
    rows = len(rows_of(text, student).train)
    found = recover(
        student,
        tmp_path / "out",
        settings=settings(text, weights={"next_token": 1, "logits_kl": 0}, steps=None, epochs=2),
    )
    assert found.teacher_nll is None and found.gap_closed is None
    assert found.steps == 2 * rows // 4
    # Random words are not to be predicted, but to be remembered.
    assert max(curve(found)[-5:]) < min(curve(found)[:5])


def test_rows_are_taken_once_per_epoch_whatever_the_batch() -> None:
    rows = torch.arange(12).view(6, 2)
    stream = RowStream(rows, 18, seed=5)
    taken = [int(stream[index]["row"]) for index in range(18)]
    assert [sorted(taken[start : start + 6]) for start in (0, 6, 12)] == [list(range(6))] * 3
    assert taken[:6] != taken[6:12]
    assert [int(stream[index]["row"]) for index in (17, 3, 9)] == [taken[index] for index in (17, 3, 9)]


def test_heldout_documents_are_not_trained_on(tmp_path: Path) -> None:
    text = cases.text(tmp_path, documents=10, words=31)
    tokenizer = cases.support.tokenizer()
    rows = recovery_rows(
        str(text), None, tokenizer, length=32, wanted_rows=1, heldout_share=0.2, max_heldout_tokens=10**6
    )
    # Each document and its end are one row.
    assert (len(rows.train), len(rows.heldout)) == (8, 2)
    every = {tuple(row) for row in torch.cat([rows.train, rows.heldout]).tolist()}
    assert len(every) == 10


def test_a_dense_student_learns_from_its_experts(models, tmp_path: Path) -> None:
    _, base, text = models
    dense = tmp_path / "dense"
    to_dense(base, dense, method="average", refit=False, dataset=text, sequence_length=16, num_samples=4)
    weights = {"logits_kl": 1, "hidden": 0.5}
    found = recover(dense, tmp_path / "out", teacher=base, settings=settings(text, weights=weights))
    assert set(found.log[-1].parts) == set(weights)
    assert curve(found)[-1] < curve(found)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    rows = rows_of(text, dense).heldout
    assert mean_negative_log_likelihood(model, rows) == pytest.approx(found.end_nll, rel=1e-5)
    with pytest.raises(ValueError, match="router_kl"):
        recover(dense, tmp_path / "no", teacher=base, settings=settings(text, weights={"router_kl": 1}))


def test_autocast_is_as_good_as_float32(models, plain, tmp_path: Path) -> None:
    student, base, text = models
    exact = plain[0]
    found = recover(student, tmp_path / "out", teacher=base, settings=settings(text, precision="bf16"))
    assert found.start_nll == pytest.approx(exact.start_nll, abs=0.02)
    assert found.end_nll == pytest.approx(exact.end_nll, abs=0.02)
    assert curve(found) != curve(exact)
    # Experts near a tie are chosen otherwise in bfloat16.
    assert curve(found) == pytest.approx(curve(exact), rel=0.2)


def test_a_single_step_trains(models, tmp_path: Path) -> None:
    """A warm-up begins at a rate of zero."""
    student, base, text = models
    found = recover(student, tmp_path / "out", teacher=base, settings=settings(text, steps=1))
    assert found.end_nll != found.start_nll
