"""Training events reach modifiers at the right steps, and pruned weights stay zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_models
import torch
from datasets import Dataset
from llmcompressor.core import State, active_session, create_session
from llmcompressor.core.events import Event, EventType
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import ConstantPruningModifier, MagnitudePruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from pydantic import Field
from torch import nn
from transformers import Trainer, TrainingArguments

from llmcompressor_moe import ExpertDropModifier
from llmcompressor_moe.recipe_file import RecipeError
from llmcompressor_moe.recovery.lifecycle import (
    SessionCallback,
    constant_masks,
    sparse_linears,
    training_modifiers,
)

EXPERTS = "re:.*experts.*_proj$"


class _Witness(Modifier):
    """Writes down what reaches it."""

    log: list[tuple[str, float, int]] = Field(default_factory=list)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        assert active_session().lifecycle.recipe.modifiers[-1] is self
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        assert (event.type_ is EventType.LOSS_CALCULATED) == ("loss" in kwargs and kwargs["loss"] is not None)
        self.log.append((event.type_.value, event.current_index, event.global_step))

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self.log.append(("start", event.current_index, event.global_step))

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.log.append(("end", event.current_index, event.global_step))


class _Keeping(SessionCallback):
    """Keeps the modifiers that were driven."""

    def close(self) -> None:
        if self.session is not None:
            self.kept = self.session.lifecycle.recipe.modifiers
        super().close()


class _Trainer(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.session.loss_calculated(loss)
        return loss


def tiny(zeros: float = 0.5) -> nn.Module:
    """A Mixtral of linearized experts, whose smallest weights are zero."""
    model = tiny_models.build("mixtral", num_layers=2, num_experts=4)
    linearize_moe(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "experts" in path and zeros:
            weight = module.weight.data
            weight[weight.abs() <= weight.abs().flatten().kthvalue(int(zeros * weight.numel())).values] = 0
    return model


def train(
    model: nn.Module,
    callback: SessionCallback | None,
    directory: Path,
    *,
    steps: int = 4,
    accumulate: int = 1,
    resume: str | None = None,
    **options: Any,
) -> _Trainer:
    ids = support.token_ids(8).tolist()
    settings = {"max_steps": steps, "save_strategy": "no", "learning_rate": 1e-2, **options}
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulate,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[callback] if callback else [],
    )
    trainer.session = callback or SessionCallback([_Witness(start=0)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sparsity(model: nn.Module) -> float:
    """Share of zeros in the experts."""
    weights = [value for name, value in model.named_parameters() if "experts" in name]
    return sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value == 0 for name, value in model.named_parameters() if "experts" in name}


def test_zeros_stay_where_they_are_and_the_rest_learns(tmp_path):
    model = tiny()
    before, places = copy.deepcopy(model.state_dict()), zeros(model)
    assert sum(sparse_linears(model).values()) == sum(int(place.sum()) for place in places.values()) > 0
    train(model, SessionCallback(constant_masks(model)), tmp_path)
    after = zeros(model)
    assert all(torch.equal(after[name], place) for name, place in places.items())
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert set(places) <= set(moved)
    # Masks are gone: the model is saved as it came.
    assert set(model.state_dict()) == set(before)


def test_without_masks_zeros_would_be_lost(tmp_path):
    model = tiny()
    train(model, None, tmp_path)
    assert sparsity(model) < 0.1


def test_a_dense_model_needs_no_masks():
    assert constant_masks(tiny(zeros=0)) == []


def test_a_magnitude_schedule_moves_and_its_end_comes(tmp_path):
    seen = []

    class Watch(SessionCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            seen.append(round(sparsity(kwargs["model"]), 2))

    schedule = MagnitudePruningModifier(
        targets=EXPERTS, start=0, end=4, init_sparsity=0, final_sparsity=0.4, update_scheduler="linear"
    )
    # The mask that took over holds what the schedule reached in its last step.
    constant = ConstantPruningModifier(targets=EXPERTS, start=4)
    model = tiny(zeros=0)
    train(model, Watch([schedule, constant]), tmp_path, steps=6)
    assert seen == [0.0, 0.1, 0.2, 0.3, 0.3, 0.3]
    assert not any("mask" in name for name, _ in model.named_buffers())


def test_events_of_upstream_alone_stand_still():
    """Once this fails, the lifecycle of our own can go."""
    with create_session() as session:
        session.initialize(recipe=[_Witness(start=0)], model=tiny(zeros=0))
        session.event(EventType.BATCH_START, global_step=7)
        (witness,) = session.lifecycle.recipe.modifiers
        assert ("batch_start", 0, 0) in witness.log


def test_events_come_in_order_with_their_step_whatever_is_accumulated(tmp_path):
    witness = _Witness(start=1, end=2)
    callback = _Keeping([witness])
    train(tiny(zeros=0), callback, tmp_path, steps=3, accumulate=2)

    def step(number: int) -> list[tuple[str, float, int]]:
        kinds = ["batch_start", "loss_calculated", "loss_calculated", "optim_pre_step", "optim_post_step"]
        return [*((kind, number, number) for kind in kinds), ("batch_end", number + 1, number + 1)]

    expected = step(0) + step(1)[:1] + [("start", 1, 1)] + step(1)[1:] + [("end", 2, 2)] + step(2)
    assert callback.kept[0].log == expected
    assert callback.kept[0].finalized
    assert callback.session is None
    # The recipe that was given is untouched, so that a trainer can train again.
    assert witness.log == [] and not witness.initialized


def test_a_recipe_may_count_epochs(tmp_path):
    # Eight rows in batches of two, two of them to a step: two steps an epoch.
    callback = _Keeping([_Witness(start=0.5, end=1.5)], schedule="epochs")
    train(tiny(zeros=0), callback, tmp_path, steps=-1, num_train_epochs=2, accumulate=2)
    marks = [entry for entry in callback.kept[0].log if entry[0] in ("start", "end")]
    assert marks == [("start", 0.5, 1), ("end", 1.5, 3)]


def test_a_run_that_goes_on_ends_as_the_unbroken_one(tmp_path):
    def callback() -> SessionCallback:
        return SessionCallback(
            [
                MagnitudePruningModifier(
                    targets=EXPERTS, start=0, end=3, init_sparsity=0.1, final_sparsity=0.5
                ),
                ConstantPruningModifier(targets=EXPERTS, start=3),
            ]
        )

    unbroken = tiny(zeros=0)
    train(unbroken, callback(), tmp_path / "unbroken", steps=5)
    # save_pretrained gives experts the family's names, so the state is carried over here by hand.
    for at in (2, 4):
        trained = tiny(zeros=0)
        first = train(
            trained, callback(), tmp_path / f"broken-{at}", steps=at, save_strategy="steps", save_steps=at
        )
        checkpoint = next((tmp_path / f"broken-{at}").glob("checkpoint-*"))
        resumed = tiny(zeros=0)
        state = copy.deepcopy(trained.state_dict())

        class _Resuming(_Trainer):
            weights = state

            def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                self.model.load_state_dict(self.weights)

        second = _Resuming(
            model=resumed,
            args=copy.deepcopy(first.args),
            train_dataset=first.train_dataset,
            callbacks=[callback()],
        )
        second.session = SessionCallback([_Witness(start=0)])
        second.args.max_steps = 5
        second.train(resume_from_checkpoint=str(checkpoint))
        for name, value in unbroken.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (at, name)


def test_losses_outside_of_steps_and_a_second_end_are_nothing():
    callback = SessionCallback([_Witness(start=0)])
    callback.loss_calculated(torch.ones(()))
    callback.close()
    callback.close()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            [QuantizationModifier(scheme="FP8_DYNAMIC", targets="Linear")],
            "QuantizationModifier works by calibration",
        ),
        ([ExpertDropModifier(num_drop=1)], "works by calibration"),
        ([ConstantPruningModifier(targets=EXPERTS)], "ConstantPruningModifier: start is missing"),
        (
            [MagnitudePruningModifier(targets=EXPERTS, start=0, init_sparsity=0, final_sparsity=0.5)],
            "MagnitudePruningModifier: end is missing",
        ),
    ],
)
def test_modifiers_that_training_cannot_drive_are_refused(recipe, message):
    with pytest.raises(RecipeError, match=message):
        SessionCallback(recipe)


def test_a_recipe_is_a_file_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "train_stage:\n  pruning_modifiers:\n    ConstantPruningModifier:\n      targets: Linear\n      start: 0\n"
    )
    (modifier,) = training_modifiers(path)
    assert isinstance(modifier, ConstantPruningModifier)
    with pytest.raises(RecipeError, match=r"nothing\.yaml' cannot be read"):
        training_modifiers(tmp_path / "nothing.yaml")


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule='tokens': choose one of steps, epochs"):
        SessionCallback([_Witness(start=0)], schedule="tokens")
