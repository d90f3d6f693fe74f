"""`make demo`, from the bundled model to the table, with real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
