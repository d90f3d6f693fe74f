"""Two ranks with half of the data each make the plan and the checkpoint that one rank makes with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file

from llmcompressor_moe.report import DropReport

SCRIPT = Path(__file__).parent / "one_rank.py"


def run(base: Path, out: Path, ranks: int) -> None:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    )
    command = [sys.executable, *launcher, str(SCRIPT), str(base), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)


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
