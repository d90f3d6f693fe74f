"""Ratios that follow from statistics against one ratio for all experts, on the bundled demo model."""

from __future__ import annotations

from pathlib import Path

import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor_moe.demo import DEMO_MODEL, calibration_dataset, heldout_rows
from llmcompressor_moe.evaluation import perplexity
from llmcompressor_moe.sparsity.report import SparsityReport


def test_sensitivity_beats_uniform_on_the_demo_model(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    heldout = torch.tensor(heldout_rows(tokenizer)[::8])
    results, zeros = {}, {}
    for ratios in ("uniform", "sensitivity"):
        recipe = f"""
        prune_stage:
          prune_modifiers:
            ExpertSparsityModifier:
              sparsity: {0.6875 if ratios == "uniform" else 0.692}
              algorithm: wanda
              ratios: {ratios}
              report_path: {tmp_path / ratios}.json
        """
        model = oneshot(
            model=AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32),
            tokenizer=tokenizer,
            recipe=recipe,
            dataset=calibration_dataset(tokenizer, 8),
            num_calibration_samples=8,
            max_seq_length=256,
        )
        results[ratios] = perplexity(model, heldout)
        zeros[ratios] = SparsityReport.load(tmp_path / f"{ratios}.json").mean
    # Wanda rounds down to whole columns; what is asked for makes up for it, so that as many weights are gone.
    assert zeros["sensitivity"] >= zeros["uniform"] == 0.6875
    assert results["sensitivity"] < 0.97 * results["uniform"]
