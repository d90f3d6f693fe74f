"""The command `recover`: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support
from typer.testing import CliRunner

from llmcompressor_moe.cli import app
from llmcompressor_moe.recovery import RecoveryReport


def recover(models: tuple[Path, Path, Path], output: Path, *options: object):
    student, base, text = models
    arguments = ["recover", student, "--teacher", base, "--data", text, "--output", output, "--length", 16]
    every = [*arguments, "--steps", 2, "--cpu", *options]
    return CliRunner().invoke(app, [str(argument) for argument in every], env={"COLUMNS": "200"})


def test_recovers_and_says_so(models, tmp_path: Path) -> None:
    ended = recover(
        models, tmp_path / "out", "--loss", "logits_kl=1", "--loss", "router_kl=0.5", "--train", "router",
        "--train", "lora", "--lora-rank", 2, "--log-every", 1,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    found = RecoveryReport.model_validate_json((tmp_path / "out" / "recovery.json").read_text())
    assert not support.files_that_tell(tmp_path)
    assert found.settings.weights.used == ("logits_kl", "router_kl")
    assert found.settings.train == ("router", "lora")
    assert found.settings.lora.rank == 2
    assert f"gap closed: {found.gap_closed:.1%}" in ended.stdout
    assert "step 2  128 tokens  loss" in ended.stderr and "router_kl" in ended.stderr
    assert f"llmcompressor-moe evaluate {models[1]} {tmp_path / 'out'}" in ended.stdout


def test_json(models, tmp_path: Path) -> None:
    ended = recover(models, tmp_path / "out", "--json")
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout) == json.loads((tmp_path / "out" / "recovery.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "kl=1"], "--loss 'kl=1': there is no loss 'kl'; choose some of next_token"),
        (["--loss", "logits_kl"], "--loss 'logits_kl': give a number as weight, such as logits_kl=1"),
        (["--train", "gates"], "train='gates': choose some of router"),
        (["--lora-rank", "4"], "lora is given, but train=['all'] leaves the adapters out"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--temperature", "0"], "temperature=0"),
        (["--text", "nowhere.txt"], "dataset 'nowhere.txt' cannot be read"),
    ],
)
def test_errors_are_one_line(models, tmp_path: Path, options: list[str], message: str) -> None:
    ended = recover(models, tmp_path / "out", *options)
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
