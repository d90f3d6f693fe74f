"""What `evaluate` tells of a recovery."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from llmcompressor_moe.cli.evaluate import _recovery
from llmcompressor_moe.evaluation.recovered import RECOVERY_FILE, read_recovery
from llmcompressor_moe.recovery.progress import LogEntry
from llmcompressor_moe.recovery.run import RecoveryReport
from llmcompressor_moe.recovery.settings import RecoverySettings


def report() -> RecoveryReport:
    log = [
        LogEntry(step=1, tokens=10, seconds=1.0, loss=2.0),
        LogEntry(step=2, tokens=20, seconds=2.0, heldout_nll=3.5),
    ]
    return RecoveryReport(
        student="s",
        teacher="t",
        output="o",
        settings=RecoverySettings(),
        ranks=1,
        trained_parameters=1,
        total_parameters=2,
        moe_layers=1,
        train_rows=3,
        heldout_rows=1,
        steps=2,
        tokens=20,
        seconds=2.0,
        start_nll=4.0,
        end_nll=3.5,
        teacher_nll=3.0,
        gap_closed=0.5,
        log=log,
    )


def test_reads_what_recover_writes(tmp_path: Path) -> None:
    assert read_recovery(tmp_path) is None
    (tmp_path / RECOVERY_FILE).write_text(report().model_dump_json())
    curve = read_recovery(tmp_path)
    assert (curve.start_nll, curve.end_nll, curve.teacher_nll, curve.gap_closed) == (4.0, 3.5, 3.0, 0.5)
    assert [(look.tokens, look.heldout_nll) for look in curve.log] == [(20, 3.5)]


@pytest.mark.parametrize("text", ["{", "[]", '{"tokens": 3}'])
def test_refuses_what_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / RECOVERY_FILE).write_text(text)
    with pytest.raises(ValueError, match="not a record of a recovery"):
        read_recovery(tmp_path)


def test_shows_the_gap(tmp_path: Path) -> None:
    (tmp_path / RECOVERY_FILE).write_text(report().model_dump_json())

    class Model:
        path = "models/back"
        recovery = read_recovery(tmp_path)

    class Found:
        compressed = (Model,)

    console = Console(record=True, width=120)
    console.print(_recovery(Found))
    shown = console.export_text()
    assert "back" in shown and "50.0%" in shown and "3.5000" in shown
