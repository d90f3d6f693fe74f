"""`make demo`, from the bundled model to the table and the drawn sweep, with real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmcompressor_moe.sweep.report import SweepReport

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"

pytestmark = pytest.mark.serving


def test_demo_serves_what_transformers_measures(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, env=os.environ, timeout=1800
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "check: legal to serve" in run.stdout
    original, drops, quantized = json.loads((tmp_path / "table.json").read_text())
    assert original["nbytes"] > drops["nbytes"] > quantized["nbytes"]
    assert original["parameters"] > drops["parameters"] == quantized["parameters"]
    for column in (original, drops):
        # Both in bfloat16: kernels round differently.
        assert column["served_perplexity"] == pytest.approx(column["perplexity"], rel=0.005)
        assert column["tokens_per_second"] > 0
    assert quantized["perplexity"] < 1.1 * drops["perplexity"]
    sweep = SweepReport.model_validate_json((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(sweep.points) == 11 and all(result.found is not None for result in sweep.points[1:])
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert all(str(result.point) in page for result in sweep.points)
    assert {path.name for path in (tmp_path / "sweep").glob("*.png")} == {
        "trade-off-size.png",
        "trade-off-reads.png",
    }
