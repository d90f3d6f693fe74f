"""Two ranks with half of the data each make the plan and the checkpoint that one rank makes with all of it."""

from __future__ import annotations

import json
from pathlib import Path

import one_rank
import pytest
import support
import torch
from safetensors.torch import load_file

from llmcompressor_moe.report import DropReport


def run(base: Path, out: Path, ranks: int, kind: str = "trim") -> None:
    assert support.run_forked(one_rank.main, base, out, kind, ranks=ranks) == [0] * ranks


def found(base: Path, out: Path, ranks: int, kind: str) -> list[dict]:
    """What each rank found."""
    run(base, out, ranks, kind)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(ranks)]


def flat(report: DropReport) -> torch.Tensor:
    values = report.scores.values()
    return torch.tensor(
        [value for score in values for value in (score if isinstance(score, list) else [score])]
    )


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    run(base, one, 1)
    run(base, two, 2)
    for part in ("layer", "block", "expert"):
        ours, theirs = (DropReport.load(f"{out}-{part}.json") for out in (one, two))
        assert ours.dropped == theirs.dropped
        assert ours.calibration == theirs.calibration
        assert flat(theirs).tolist() == pytest.approx(flat(ours).tolist(), rel=1e-6)
    first, second = (load_file(out / "model.safetensors") for out in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    first, second = (load_file(f"{out}-opened/model.safetensors") for out in (one, two))
    assert first.keys() == second.keys()
    # Ranks add up in another order; a code that lay between two goes the other way, and GPTQ makes up for it.
    codes = [name for name in first if first[name].dtype == torch.int8]
    assert len(codes) == 3 * 3 * 6
    for name in first:
        if name in codes:
            assert (first[name] != second[name]).float().mean() < 0.1
        else:
            torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=0)


def test_two_ranks_choose_the_precision_that_one_chooses(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    (one,) = found(base, tmp_path / "one", 1, "plan")
    first, second = found(base, tmp_path / "two", 2, "plan")
    assert first == second
    assert first["calibration"] == one["calibration"] == {"tokens": 8 * 24, "samples": 8}
    for index, ours in first["layers"].items():
        theirs = one["layers"][index]
        assert ours["scheme"] == theirs["scheme"]
        assert ours["routed_tokens"] == theirs["routed_tokens"]
        assert ours["candidates"] == pytest.approx(theirs["candidates"], rel=1e-5)
    assert {plan["scheme"] for plan in first["layers"].values()} == {"W4A16", "W8A16"}


def test_two_ranks_calibrate_routers_alike(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    first, second = found(base, tmp_path / "two", 2, "calibrate")
    assert first["sums"] == second["sums"]
    assert first["report"]["layers"] == second["report"]["layers"]
    assert first["report"]["divergence_after"] <= first["report"]["divergence_before"]
    dropped, before = {0: [0, 1], 2: [3]}, dict(support.load(base).named_parameters())
    for index, layer in first["report"]["layers"].items():
        name = f"model.layers.{index}.mlp.experts.down_proj"
        kept = [e for e in range(len(before[name])) if e not in dropped.get(int(index), [])]
        factors = torch.tensor(layer["factors"] or [1.0] * len(kept))
        # Weights that ranks share are multiplied once.
        expected = (before[name][kept].double().sum((1, 2)) * factors).sum().item()
        assert first["sums"][name] == pytest.approx(expected, rel=1e-4, abs=1e-3)
