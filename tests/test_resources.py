"""What a run will need is known before it starts, and a disk that is too small is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support
import torch
from typer.testing import CliRunner

from llmcompressor_moe.cli import app
from llmcompressor_moe.compression import compress
from llmcompressor_moe.recipe_file import read_recipe
from llmcompressor_moe.resources import (
    IMPORTS,
    NotEnoughSpaceError,
    ResourceEstimate,
    check_disk_space,
    estimate_resources,
    model_shape,
    wave_tokens,
)
from llmcompressor_moe.work_folder import work_path

OLMOE = Path(__file__).parent / "data" / "configs" / "OLMoE-1B-7B-0924"
SHAPE = model_shape(OLMOE)
DROP = "ExpertDropModifier: {num_drop: 16, criterion: reap}"
GIB = 1024**3


def recipe(directory: Path, *modifiers: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text("default_stage: {default_modifiers: {" + ", ".join(modifiers) + "}}")
    return path


def estimate(directory: Path, *modifiers: str, **options) -> ResourceEstimate:
    settings = {
        **{
            "samples": 128,
            "tokens": 65536,
            "batch_tokens": 512,
            "wave": 16384,
            "compute_dtype": torch.float32,
        },
        **{"max_memory": 8 * GIB, **options},
    }
    return estimate_resources(OLMOE, SHAPE, read_recipe(recipe(directory, *modifiers)), **settings)


def test_drops_take_the_memory_of_a_block_an_expert_and_the_hidden_states(tmp_path: Path) -> None:
    found = estimate(tmp_path, DROP)
    hidden, head = 2048, 128
    # Attention, the router, four norms.
    block = 4 * 2048 * 2048 + 64 * 2048 + 4 * 2048
    expert = 3 * 2048 * 1024
    waiting = 65536 * (hidden + 2 * head) * 4
    # An eighth of the experts are chosen, and one may see twice its share.
    inside = 16384 * 4 * 6 * hidden + 16384 // 4 * 4 * 3 * (hidden + 1024)
    assert found.memory == IMPORTS + 4 * (block + expert) + inside + waiting
    assert found.passes == 1
    assert found.scratch == 2 * 65536 * hidden * 4
    whole = SHAPE.nbytes
    assert found.output == pytest.approx(whole - 16 * 16 * expert * 2, rel=0.001) and not found.output_at_most
    assert found.reads == whole + found.output


def test_curves_read_the_weights_once_and_keep_the_hidden_states_of_all_variants(tmp_path: Path) -> None:
    plain = estimate(tmp_path, DROP, max_memory=0)
    found = estimate(tmp_path, DROP.replace("}", ", scope: sensitivity}"), max_memory=0)
    assert found.reads - plain.reads == SHAPE.stored
    # Four variants of each of 16 layers see what eight passes allow: 1 + 4 * 16 * 17 / 32 passes for all samples.
    measured = 65536 * 8 / 35
    waiting = 65 * measured * (2048 + 2 * 128) * 4
    assert found.scratch - plain.scratch == pytest.approx(waiting - 65536 * (2048 + 2 * 128) * 4, rel=1e-3)
    logits = 2 * 512 * 50304 * 4
    assert found.memory - plain.memory == logits


def test_what_does_not_fit_in_memory_waits_in_scratch(tmp_path: Path) -> None:
    roomy, tight = estimate(tmp_path, DROP), estimate(tmp_path, DROP, max_memory=100_000_000)
    assert roomy.memory - tight.memory == tight.scratch - roomy.scratch > 0


def test_quantizing_takes_scratch_for_what_changes(tmp_path: Path) -> None:
    nearest, gptq = (
        estimate(tmp_path, f"RouterAwareQuantModifier: {{target_bits: 5, algorithm: {name}}}")
        for name in ("rtn", "gptq")
    )
    assert nearest.output_at_most and nearest.output < SHAPE.nbytes / 2
    assert nearest.scratch == nearest.output
    assert gptq.scratch == gptq.output + SHAPE.nbytes
    assert gptq.passes == nearest.passes + 1


@pytest.mark.parametrize(
    "modifiers, passes",
    [
        (["LayerDropModifier: {num_drop: 2}", DROP], 1),
        (["LayerDropModifier: {num_drop: 2}", DROP.replace("}", ", share_statistics: false}")], 2),
        (["BlockDropModifier: {num_drop: 3, search: greedy}"], 3),
        (["LayerDropModifier: {num_drop: 1, metric: kl}"], 9),
        (["ExpertDropModifier: {experts: {1: [0]}}"], 0),
        (["LayerDropModifier: {threshold: 0.99}"], 1),
        ([DROP.replace("}", ", scope: sensitivity}")], 9),
        ([DROP.replace("}", ", scope: sensitivity}").replace("reap", "weight_norm")], 8),
        (["ExpertWidthModifier: {drop_ratio: 0.25}"], 1),
        (["ExpertWidthModifier: {drop_ratio: 0.25, scope: sensitivity}"], 10),
        (["ExpertWidthModifier: {drop_ratio: 0.25, scope: sensitivity, refit: false}"], 9),
    ],
)
def test_passes(modifiers: list[str], passes: int, tmp_path: Path) -> None:
    found = estimate(tmp_path, *modifiers)
    assert found.passes == passes
    assert found.output_at_most == ("threshold" in modifiers[0])


def test_a_wave_takes_a_quarter_of_the_memory_at_most() -> None:
    assert wave_tokens(SHAPE, torch.float32, "cpu", GIB) == 4096
    assert wave_tokens(SHAPE, torch.bfloat16, "cpu", GIB) == 8192
    assert wave_tokens(SHAPE, torch.float32, "cpu", 1) == 1


def test_a_small_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    found = ResourceEstimate(memory=0, scratch=GIB, output=2 * GIB, output_at_most=False, reads=0, passes=1)
    check_disk_space(found, tmp_path / "out", lambda _: 3 * GIB)
    check_disk_space(found, tmp_path / "out", lambda _: 2 * GIB, already=GIB)
    with pytest.raises(NotEnoughSpaceError, match=r"needs 3 GiB.*has 2 GiB free.*--output.*--max-memory"):
        check_disk_space(found, tmp_path / "new" / "out", lambda _: 2 * GIB)


def test_a_run_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = support.saved("mixtral", tmp_path)
    path = recipe(tmp_path, "ExpertDropModifier: {experts: {1: [0, 3]}}")
    before = set(tmp_path.iterdir())
    with pytest.raises(NotEnoughSpaceError):
        compress(model, path, None, tmp_path / "out", free_space=lambda _: 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    result = CliRunner().invoke(app, ["compress", str(model), "-r", str(path), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "has 1000 B free" in result.output
    assert set(tmp_path.iterdir()) == before
    assert not work_path(tmp_path / "out").exists()


def test_commands_print_it(tmp_path: Path) -> None:
    path = recipe(tmp_path, "ExpertDropModifier: {experts: {1: [0, 3]}}")
    result = CliRunner().invoke(app, ["inspect", str(OLMOE), "--recipe", str(path)])
    assert "128 samples of 512 tokens" in result.output and "scratch" in result.output
    model = support.saved("mixtral", tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(model), "--recipe", str(path), "--json"])
    assert json.loads(result.stdout)["resources"]["passes"] == 0
    command = ["compress", str(model), "-r", str(path), "-o", str(tmp_path / "out"), "--max-memory"]
    result = CliRunner().invoke(app, [*command, "1GiB", "--compute-dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "memory   about" in result.output
    result = CliRunner().invoke(app, [*command, "little"])
    assert result.exit_code == 2 and "max_memory='little'" in result.output


def test_an_unknown_compute_dtype(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_dtype='int8': choose one of auto"):
        compress(tmp_path, tmp_path / "none", None, tmp_path / "out", compute_dtype="int8")
