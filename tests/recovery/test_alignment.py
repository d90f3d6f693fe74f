"""Which parts of a teacher a student's parts are held against."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import drop_report
from transformers import MistralConfig, MistralForCausalLM

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.evaluation.history import ModelLayout, read_history
from llmcompressor_moe.recovery.alignment import Alignment, align, layout_for_alignment
from llmcompressor_moe.recovery.objective import LossWeights, Objective
from llmcompressor_moe.recovery.teacher import LiveTeacher
from llmcompressor_moe.report import DropReport

BASE = ModelLayout(5, {1: 4, 2: 4, 3: 4, 4: 4})


def test_nothing_dropped() -> None:
    everything = tuple(range(4))
    assert align(BASE, BASE) == Alignment(
        {index: index for index in range(5)}, {index: (index, everything) for index in range(1, 5)}
    )


def test_a_block_takes_over_those_dropped_behind_it() -> None:
    history = [drop_report("Block", BASE, [1, 2, 4])]
    found = align(ModelLayout(2, {1: 4}), BASE, history)
    # What enters block 3 in the teacher is what block 2 returned; what enters the last norm, what block 4 did.
    assert found == Alignment({0: 2, 1: 4}, {1: (3, (0, 1, 2, 3))})


def test_one_expert_in_place_of_all_is_none_of_the_teachers() -> None:
    merged = ModelLayout(5, {1: 1, 2: 1, 3: 1, 4: 1})
    assert align(merged, BASE) == Alignment({index: index for index in range(5)}, {})
    left = [drop_report("Expert", BASE, {index: [0, 1, 3] for index in range(1, 5)})]
    assert align(merged, BASE, left).layers == {index: (index, (2,)) for index in range(1, 5)}


def test_experts_and_layers() -> None:
    history = [
        drop_report("Expert", BASE, {1: [0], 2: [1, 3]}),
        drop_report("Layer", BASE, [4]),
        drop_report("Block", ModelLayout(5, {1: 3, 2: 2, 3: 4}), [1]),
    ]
    found = align(ModelLayout(4, {1: 2, 2: 4}), BASE, history)
    assert found == Alignment({0: 1, 1: 2, 2: 3, 3: 4}, {1: (2, (0, 2)), 2: (3, (0, 1, 2, 3))})


def test_a_teacher_that_was_trimmed_itself() -> None:
    first = drop_report("Block", BASE, [0])
    teacher = ModelLayout(4, {0: 4, 1: 4, 2: 4, 3: 4})
    second = drop_report("Block", teacher, [1])
    student = ModelLayout(3, {0: 4, 1: 4, 2: 4})
    assert align(student, teacher, [first, second], [first]).blocks == {0: 1, 1: 2, 2: 3}


def test_dense_students() -> None:
    assert align(ModelLayout(5, {}), BASE) == Alignment({index: index for index in range(5)}, {})
    shorter = align(ModelLayout(4, {}), BASE, [drop_report("Block", BASE, [2])])
    assert shorter == Alignment({0: 0, 1: 2, 2: 3, 3: 4}, {})


@given(st.integers(1, 8), st.data())
def test_blocks_by_running_them(count: int, data: st.DataObject) -> None:
    """Blocks that note who they are: a student's next block must get what ends with its teacher's output."""
    gone = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count - 1))
    base = ModelLayout(count, {index: 2 for index in range(count)})
    left = [block for block in range(count) if block not in gone]
    student = ModelLayout(len(left), {index: 2 for index in range(len(left))})
    found = align(student, base, [drop_report("Block", base, gone)] if gone else [])
    trace = list(range(count))
    for position, matched in found.blocks.items():
        behind = trace[matched + 1 :]
        assert behind[:1] == left[position + 1 : position + 2]
        assert matched >= left[position]
    assert [teacher for teacher, _ in found.layers.values()] == left


@pytest.mark.parametrize(
    ("student", "history", "message"),
    [
        (ModelLayout(4, {1: 4}), [], r"no history \(trimming.json\)"),
        (ModelLayout(4, {}), [], r"no history \(trimming.json\)"),
        (
            BASE,
            [drop_report("Block", ModelLayout(9, {}), [1])],
            "The history begins with a model of 9 blocks",
        ),
    ],
)
def test_a_student_of_another_model(student: ModelLayout, history: list[DropReport], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)cannot be laid over the teacher.*{message}.*weight 0"):
        align(student, BASE, history)


def test_layouts() -> None:
    assert layout_for_alignment(tiny_models.build("qwen2_moe", num_layers=2)) == ModelLayout(2, {0: 8, 1: 8})
    config = MistralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1, vocab_size=16
    )
    assert layout_for_alignment(MistralForCausalLM(config)) == ModelLayout(3, {})


def test_a_checkpoint_is_laid_over_its_base(tmp_path: Path) -> None:
    path = support.saved("olmoe", tmp_path)
    recipe = [
        ExpertDropModifier(experts={0: [1, 6], 3: [2]}),
        LayerDropModifier(layers=[1]),
        BlockDropModifier(blocks=[2]),
    ]
    support.trim(support.load(path), recipe, no_data=True, output_dir=str(tmp_path / "out"))
    teacher, student = support.load(path), support.load(tmp_path / "out")
    found = align(
        layout_for_alignment(student), layout_for_alignment(teacher), read_history(tmp_path / "out")
    )
    assert found == Alignment({0: 0, 1: 2, 2: 3}, {0: (0, (0, 2, 3, 4, 5, 7)), 2: (3, (0, 1, 3, 4, 5, 6, 7))})
    # Block 0 sees the same tokens in both, so its router can only have lost experts.
    weights = LossWeights(logits_kl=0, router_kl=1)
    batch = {"input_ids": support.token_ids(2, 10)}
    first = Alignment(found.blocks, {0: found.layers[0]})
    moved = Alignment(found.blocks, {0: (0, (0, 1, 3, 4, 5, 7))})
    near, far = (
        Objective(weights, alignment)(student, batch, LiveTeacher(teacher, weights, alignment).signals(batch))
        for alignment in (first, moved)
    )
    torch.testing.assert_close(near.total, torch.zeros(()), atol=1e-5, rtol=0)
    assert far.total > 0.1
