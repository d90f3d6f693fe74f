"""A run that is stopped goes on where it was, and ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
import tiny_models
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import PreTrainedModel

from llmcompressor_moe.profile import Profile, Statistic, collect_profile
from llmcompressor_moe.profile.resumable import PassStore, ResumablePass
from llmcompressor_moe.topology import find_topology

FAMILIES = [
    "qwen3_moe",
    "llama4_text",
    "gpt_oss",
    "deepseek_v4",
    "zaya",
    "granitemoehybrid",
    "qwen3_next",
    "gemma4_text",
]


class Stopped(BaseException):
    """Ends a pass as a signal would."""


def batches() -> list[dict]:
    """One sequence each, the second one padded."""
    found = []
    for index, row in enumerate(support.token_ids(3, 12, 1)):
        mask = torch.ones_like(row)[None]
        if index == 1:
            mask[:, 9:] = 0
        found.append({"input_ids": row[None] * mask, "attention_mask": mask})
    return found


def profile(model: PreTrainedModel, kept: ResumablePass | None = None) -> Profile:
    return collect_profile(
        model, find_topology(model), batches(), set(Statistic), run_length=2, resumable=kept
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    own = ResumablePass.block_done

    def block_done(self: ResumablePass, done: int, *args) -> None:
        own(self, done, *args)
        if done == block:
            raise Stopped

    monkeypatch.setattr(ResumablePass, "block_done", block_done)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pass_goes_on_after_any_block(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    expected = profile(model)
    for block in range(len(find_topology(model).blocks)):
        with monkeypatch.context() as patch:
            stop_after(patch, block)
            with pytest.raises(Stopped):
                profile(model, PassStore(tmp_path, 0).next(f"pass-{block}", {}))
        begun: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(ResumablePass, "block_done", lambda _, done, *args: begun.append(done))  # noqa: B023
            assert profile(model, PassStore(tmp_path, 0).next(f"pass-{block}", {})) == expected
        assert 0 not in begun
