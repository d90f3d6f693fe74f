"""Interrupted training: killed, broken off by a NaN, and what may go on from where it stopped."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from pathlib import Path

import pytest
import recovery_cases as cases
import support
import torch

from llmcompressor_moe.recovery import RecoverySettings, recover, trainer
from llmcompressor_moe.recovery.objective import LossParts, Objective
from llmcompressor_moe.recovery.trainer import TrainingDivergedError, last_checkpoint


@pytest.fixture(autouse=True)
def one_thread():
    """As in the process that is killed: more add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wanted(text: Path, **changes) -> dict:
    # Dropout, so that random numbers have to go on where they were.
    adapters = {"train": ["lora", "router", "norms"], "lora": {"rank": 2, "dropout": 0.5}}
    return {**cases.BASICS, **adapters, "data": str(text), "steps": 8, "save_every": 2, **changes}


def test_killed_and_resumed_is_unbroken(models, tmp_path: Path) -> None:
    student, base, text = models
    settings = wanted(text)
    recover(student, tmp_path / "unbroken", teacher=base, settings=RecoverySettings(**settings))
    out, training = tmp_path / "out", tmp_path / "out.training"
    killed = functools.partial(cases.in_a_process, killed_at=5)
    assert support.run_forked(killed, student, out, base, settings) == [-signal.SIGKILL]
    assert not out.exists()
    assert last_checkpoint(training).name == "checkpoint-4"
    # As if it had been killed while it wrote the next one.
    shutil.copytree(training / "checkpoint-4", training / "checkpoint-6")
    (training / "checkpoint-6" / "progress.json").unlink()
    (training / "checkpoint-6" / "weights.safetensors").write_bytes(b"half")
    recover(student, out, teacher=base, settings=RecoverySettings(**settings), resume=True)
    assert cases.same(out, tmp_path / "unbroken")
    assert not cases.same(out, student)
    assert not training.exists()
    log, unbroken = (
        json.loads((path / "recovery.json").read_text())["log"] for path in (out, tmp_path / "unbroken")
    )
    for entry in [*log, *unbroken]:
        del entry["seconds"]
    assert log == unbroken


def test_a_schedule_of_masks_goes_on(models, tmp_path: Path) -> None:
    student, base, text = models
    recipe = tmp_path / "schedule.yaml"
    recipe.write_text(
        "default_stage: {default_modifiers: {MagnitudePruningModifier: {targets: ['re:.*q_proj$'], init_sparsity: "
        "0.1, final_sparsity: 0.5, start: 0, end: 8}}}"
    )
    settings = RecoverySettings(**wanted(text, train=["all"], lora=None, recipe=recipe))
    recover(student, tmp_path / "unbroken", teacher=base, settings=settings)
    with pytest.raises(Interrupted):
        recover(student, tmp_path / "out", teacher=base, settings=settings, report=interrupt_at(5))
    recover(student, tmp_path / "out", teacher=base, settings=settings, resume=True)
    assert cases.same(tmp_path / "out", tmp_path / "unbroken")


class Interrupted(Exception):
    pass


def interrupt_at(step: int):
    def report(entry) -> None:
        if entry.step == step:
            raise Interrupted

    return report


@pytest.fixture
def interrupted(models, tmp_path: Path) -> Path:
    """An output whose training stopped after five steps, with a checkpoint of the fourth."""
    student, base, text = models
    with pytest.raises(Interrupted):
        recover(
            student,
            tmp_path / "out",
            teacher=base,
            settings=RecoverySettings(**wanted(text)),
            report=interrupt_at(5),
        )
    return tmp_path / "out"


def test_only_its_own_run_goes_on(models, interrupted: Path, tmp_path: Path) -> None:
    student, base, text = models
    other = cases.student(
        tmp_path,
        base,
        "default_stage: {default_modifiers: {ExpertDropModifier: {experts: {1: [1, 2], 2: [6]}}}}",
        "other",
    )
    for model, changes, differing in (
        (other, {}, "student"),
        (student, {"seed": 1}, "seed"),
        (student, {"batch_size": 2}, "batch_size"),
        (student, {"data": str(cases.text(tmp_path, words=50))}, "text, held-out text"),
    ):
        with pytest.raises(ValueError, match=rf"other settings, text or models \({differing} *differ\)"):
            recover(
                model,
                interrupted,
                teacher=base,
                settings=RecoverySettings(**wanted(text, **changes)),
                resume=True,
            )
    with pytest.raises(ValueError, match="holds an interrupted training, up to checkpoint-4; resume it"):
        recover(student, interrupted, teacher=base, settings=RecoverySettings(**wanted(text)))
    assert last_checkpoint(tmp_path / "out.training").name == "checkpoint-4"
    assert not interrupted.exists()
    # A lower rate is what one goes on with after a NaN.
    settings = RecoverySettings(**wanted(text, learning_rate=1e-4))
    found = recover(student, interrupted, teacher=base, settings=settings, resume=True)
    assert [entry.step for entry in found.log] == list(range(9))
    rates = [entry.learning_rate for entry in found.log[1:]]
    assert rates[4] / rates[3] == pytest.approx(0.05 * _cosine(4) / _cosine(3))


def _cosine(step: int) -> float:
    """What the rate of a step is multiplied with: one of eight steps is warm-up."""
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 1) / 7)).item())


def test_resuming_nothing_begins(models, tmp_path: Path) -> None:
    student, base, text = models
    settings = RecoverySettings(**wanted(text, steps=2))
    found = recover(student, tmp_path / "out", teacher=base, settings=settings, resume=True)
    assert found.log[0].step == 0


class Exploding(Objective):
    """The loss of the sixth batch is NaN."""

    calls = 0

    def __call__(self, *arguments) -> LossParts:
        found = super().__call__(*arguments)
        Exploding.calls += 1
        return LossParts(found.total * float("nan"), found.parts) if Exploding.calls == 6 else found


def test_nan_stops_and_keeps_the_last_good_checkpoint(models, tmp_path: Path, monkeypatch) -> None:
    student, base, text = models
    monkeypatch.setattr("llmcompressor_moe.recovery.run.Objective", Exploding)
    settings = RecoverySettings(**wanted(text))
    message = r"Step 6: the loss is NaN or infinite .*the checkpoint of step 4 is kept in '.*checkpoint-4'"
    with pytest.raises(TrainingDivergedError, match=message):
        recover(student, tmp_path / "out", teacher=base, settings=settings)
    assert not (tmp_path / "out").exists()
    saved = cases.tensors(last_checkpoint(tmp_path / "out.training"))
    assert saved and all(value.isfinite().all() for value in saved.values())
    # It does not happen again.
    found = recover(student, tmp_path / "out", teacher=base, settings=settings, resume=True)
    assert found.log[-1].step == 8


def test_a_gradient_that_is_no_number_stops_before_weights_move(models, tmp_path: Path, monkeypatch) -> None:
    student, base, text = models
    before = trainer.RecoveryTrainer.compute_loss

    def broken(self, model, inputs, *arguments, **options):
        loss = before(self, model, inputs, *arguments, **options)
        loss.register_hook(
            lambda gradient: gradient * float("inf") if self.state.global_step == 1 else gradient
        )
        return loss

    monkeypatch.setattr(trainer.RecoveryTrainer, "compute_loss", broken)
    with pytest.raises(
        TrainingDivergedError, match=r"Step 2: the gradient is NaN .*no checkpoint was written"
    ):
        recover(student, tmp_path / "out", teacher=base, settings=RecoverySettings(**wanted(text)))


def test_old_checkpoints_go(models, tmp_path: Path) -> None:
    student, base, text = models
    training = tmp_path / "out.training"
    seen: dict[int, list[str]] = {}
    recover(
        student,
        tmp_path / "out",
        teacher=base,
        settings=RecoverySettings(**wanted(text, save_every=1, keep_checkpoints=2)),
        report=lambda entry: seen.update(
            {entry.step: sorted(path.name for path in training.glob("checkpoint-*"))}
        ),
    )
    assert seen[7] == ["checkpoint-5", "checkpoint-6"]
    lines = [0, *range(1, 9)]
    assert sorted(seen) == lines
