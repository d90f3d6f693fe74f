"""The command `llmcompressor-moe check`."""

import json

from breaking import drop, set_config
from typer.testing import CliRunner

from llmcompressor_moe.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "160"})


def test_legal(good):
    result = run(str(good()))
    assert result.exit_code == 0
    assert "legal to serve" in result.output
    assert "experts per MoE layer: 8 x 4" in result.output


def test_illegal_names_what_and_the_way_out(good):
    path = good()
    drop(path, "lm_head")
    result = run(str(path))
    assert result.exit_code == 1
    for word in ("not legal to serve: 1 error", "lm_head.weight", "tensor-missing", "save the model again"):
        assert word in result.output


def test_json_is_the_report(good):
    path = good()
    result = run(str(path), "--tensor-parallel", "4", "--json")
    assert result.exit_code == 1
    assert [f["code"] for f in json.loads(result.stdout)["findings"] if f["severity"] == "error"] == [
        "parallel-heads"
    ]


def test_nothing_to_check(tmp_path):
    result = run(str(tmp_path / "absent"))
    assert result.exit_code == 2
    assert "not a directory" in result.output


def test_impossible_option(good):
    assert run(str(good()), "-tp", "0").exit_code == 2


def test_names_from_the_checkpoint_are_not_taken_for_markup(good):
    path = good()
    set_config(path, per_layer_config={"[red]x[/red]": {}})
    assert "[red]x[/red]" in run(str(path)).output
