"""Which parts of the teacher a student's parts are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from llmcompressor_moe.evaluation.history import KeptParts, ModelLayout, kept_parts, layout_of, match_layouts
from llmcompressor_moe.report import DropReport
from llmcompressor_moe.topology import NotAnMoEError, text_config

__all__ = ["Alignment", "align", "layout_for_alignment"]


@dataclass(frozen=True)
class Alignment:
    """A student's parts and the teacher's.

    A student's block is held against the last teacher block before the next one that is left, and the last block
    against the teacher's last. So the next block (at the end, the final norm) gets what it was trained on, and a
    block takes over the work of the dropped ones behind it.

    :param blocks: student's block -> the teacher's block whose output it should have
    :param layers: student's block with an MoE layer -> the teacher's block it comes from, and the teacher's
        index of each of its experts
    """

    blocks: dict[int, int]
    layers: dict[int, tuple[int, tuple[int, ...]]]


def layout_for_alignment(model: PreTrainedModel) -> ModelLayout:
    """`layout_of`, of dense models, too: they have blocks and no experts."""
    try:
        return layout_of(model)
    except NotAnMoEError:
        return ModelLayout(text_config(model.config).num_hidden_layers, {})


def align(
    student: ModelLayout,
    teacher: ModelLayout,
    student_history: Sequence[DropReport] = (),
    teacher_history: Sequence[DropReport] = (),
) -> Alignment:
    """Find the teacher's part for each of the student's.

    A student without any MoE layer, or with one expert in each, may also be a dense model that was made from the
    teacher, or from what its history leaves of the teacher: its blocks are those, its experts none of them.

    :param student_history: what was dropped from the student; begins with the teacher's or is empty
    :raises ValueError: the student was not made from the teacher by the drops that its history tells
    """
    try:
        kept = _kept(student, teacher, student_history, teacher_history)
    except ValueError as error:
        raise ValueError(
            f"The student ({student}) cannot be laid over the teacher ({teacher}), which comparing routers, "
            f"expert outputs or hidden states of the two takes: {error} Name the model that the student was made "
            "from as teacher, or give router_kl, expert_output and hidden the weight 0."
        ) from error
    following = [*kept.blocks[1:], teacher.num_blocks]
    layers = {
        position: (block, kept.experts[block])
        for position, block in enumerate(kept.blocks)
        if student.num_experts.get(position) == len(kept.experts.get(block, ()))
    }
    return Alignment({position: block - 1 for position, block in enumerate(following)}, layers)


def _kept(
    student: ModelLayout,
    teacher: ModelLayout,
    student_history: Sequence[DropReport],
    teacher_history: Sequence[DropReport],
) -> KeptParts:
    if max(student.num_experts.values(), default=1) == 1:
        kept = kept_parts(student_history[len(teacher_history) :], teacher)
        if len(kept.blocks) == student.num_blocks:
            return kept
    return match_layouts(teacher, student, student_history, teacher_history)
