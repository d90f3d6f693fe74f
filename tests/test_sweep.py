"""Grids, choices, resumable sweeps: against brute force, recomputation, and SIGKILL."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmcompressor_moe.evaluation.latency import SpeedSettings
from llmcompressor_moe.evaluation.run import EvaluationSettings, evaluate
from llmcompressor_moe.sweep.columns import columns_of
from llmcompressor_moe.sweep.curves import trade_off_curves
from llmcompressor_moe.sweep.grid import Grid, GridError, Point, load_grid
from llmcompressor_moe.sweep.page import write_page
from llmcompressor_moe.sweep.report import SweepReport, pareto_front
from llmcompressor_moe.sweep.run import SweepError, SweepSettings, run_sweep

LENGTH = 16
GRID = {
    "points": [
        {"layers": [1, 2]},
        {"blocks": 1, "bits": [None, 6]},
        {"experts": 2, "layers": 1},
        {"bits": 7},
    ],
    "schemes": ["W4A16", "W8A16"],
    "group_size": 32,
    "scope": "global",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    support.saved("mixtral", folder)
    words = torch.randint(30, 99, (12, 2 * LENGTH + 1), generator=torch.Generator().manual_seed(3)).tolist()
    for name, rows in (("calibration", words[:8]), ("heldout", words[8:])):
        text = "\n\n".join(" ".join(f"t{token}" for token in row) for row in rows)
        (folder / f"{name}.txt").write_text(text)
    (folder / "grid.yaml").write_text(json.dumps(GRID))
    return folder


def settings(folder: Path, **fields: Any) -> SweepSettings:
    return SweepSettings(
        dataset=str(folder / "calibration.txt"),
        num_samples=6,
        sequence_length=LENGTH,
        kl_samples=2,
        evaluation=EvaluationSettings(source=str(folder / "heldout.txt"), length=LENGTH, stride=LENGTH),
        **fields,
    )


def sweep(folder: Path, output: Path, grid: dict[str, Any] = GRID, **fields: Any) -> SweepReport:
    return run_sweep(folder / "mixtral", Grid.model_validate(grid), output, settings(folder, **fields))


@pytest.fixture(scope="module")
def found(folder: Path) -> SweepReport:
    return sweep(folder, folder / "found", keep=True)


# Grids


def test_rows_are_products_and_points_are_distinct() -> None:
    grid = Grid.model_validate(GRID | {"points": [*GRID["points"], {"layers": [2, 1, 1]}]})
    assert grid.all_points() == [
        Point(),
        Point(layers=1),
        Point(layers=2),
        Point(blocks=1),
        Point(blocks=1, bits=6),
        Point(experts=2, layers=1),
        Point(bits=7),
    ]


@given(
    st.lists(st.builds(Point, blocks=st.integers(0, 30), bits=st.none() | st.floats(0.25, 32)), max_size=20)
)
def test_names_tell_points_apart(points: list[Point]) -> None:
    assert len({point.name for point in points}) == len(set(points))


def test_names_keep_all_digits() -> None:
    bits = [None, 16.0, 7.0, 7.0000001, 6.25]
    assert [Point(bits=value).name.rpartition("-")[2] for value in bits] == [
        "16bit",
        "16.0bit",
        "7bit",
        "7.0000001bit",
        "6.25bit",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("points: [", "is not YAML"),
        ("points: []", "points: List should have at least 1 item"),
        ("{}", "points: Field required"),
        ("[1]", "grid: Input should be"),
        ("points: [{blocks: -1}]", "blocks"),
        ("points: [{blocks: two}]", "points.0.blocks.0"),
        ("points: [{bits: 99}]", "bits"),
        ("points: [{heads: 1}]", "points.0.heads"),
        ("{points: [{blocks: 1}], schemes: [W9A16]}", "'W9A16' is not a preset"),
        ("{points: [{blocks: 1}], schemes: [W8A8]}", "W8A8 quantizes inputs"),
        ("{points: [{blocks: 1}], criterion: best}", "criterion"),
        ("points: [{blocks: 1}]\npoints: [{blocks: 2}]", "the key 'points' is given twice"),
        ("points: [{blocks: true}]", "points.0.blocks.0"),
        ("points: [{blocks: []}]", "points.0.blocks"),
        ("points: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("[" * 5000, "nested too deep"),
        (f"points: [{{blocks: {[1] * 101}, layers: {[1] * 100}}}]", "10100 combinations; give at most 10000"),
    ],
)
def test_grids_that_cannot_be(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "grid.yaml").write_text(content)
    with pytest.raises(GridError, match="grid") as error:
        load_grid(tmp_path / "grid.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "grids").glob("*.yaml")), ids=lambda p: p.stem
)
def test_bundled_grids(path: Path) -> None:
    assert len(load_grid(path).all_points()) > 10


def test_no_grid(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="cannot be read"):
        load_grid(tmp_path / "grid.yaml")


# The front


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_front_is_what_nothing_beats(numbers: list[tuple[int, int]]) -> None:
    front = pareto_front((str(index), *pair) for index, pair in enumerate(numbers))
    chosen = [numbers[int(name)] for name in front]

    def beaten(pair: tuple[int, int]) -> bool:
        return any(other != pair and other[0] <= pair[0] and other[1] <= pair[1] for other in numbers)

    assert sorted(set(chosen)) == chosen == sorted({pair for pair in numbers if not beaten(pair)})


# Sweeps


def test_points_are_what_their_checkpoints_are(folder: Path, found: SweepReport) -> None:
    """Each kept checkpoint, evaluated by itself, gives what the sweep says."""
    assert [result.point for result in found.points] == Grid.model_validate(GRID).all_points()
    by_hand = settings(folder).evaluation
    for result in found.points[1:]:
        path = folder / "found" / "checkpoints" / result.point.name
        (alone,) = evaluate(folder / "mixtral", [path], by_hand).compressed
        alone.path = alone.cost.path = result.point.name
        assert alone == result.found
        assert result.size == sum(file.stat().st_size for file in path.glob("*.safetensors"))
        config = json.loads((path / "config.json").read_text())
        assert config["num_hidden_layers"] == 4 - result.point.blocks
        assert ("quantization_config" in config) == (result.point.bits is not None)
        assert len(result.found.routing.dropped_layers) == result.point.layers


def test_choices_are_those_of_the_evidence(found: SweepReport) -> None:
    by_kl = sorted(found.evidence.layer_divergence, key=found.evidence.layer_divergence.get)
    one, two, block = found.points[1], found.points[2], found.points[3]
    assert one.dropped.layers == by_kl[:1]
    assert two.dropped.layers == sorted(by_kl[:2])
    assert block.dropped.blocks == [
        min(found.evidence.block_divergence, key=found.evidence.block_divergence.get)
    ]
    experts = found.points[5].dropped.experts
    left = [layer for layer in found.evidence.layers if layer not in found.points[5].dropped.layers]
    scores = {
        (layer, expert): score
        for layer in left
        for expert, score in enumerate(found.evidence.layers[layer].scores["reap"])
    }
    lowest = sorted(scores, key=scores.get)[: 2 * len(left)]
    assert sorted((layer, expert) for layer, gone in experts.items() for expert in gone) == sorted(lowest)


def test_precision_is_the_best_choice(found: SweepReport) -> None:
    """Against every assignment of the two schemes, by the evidence's errors, at most 7 bits in the mean."""
    layers = found.evidence.layers
    # Groups of 32 with float32 scales: one bit more per weight.
    bits = {"W4A16": 5.0, "W8A16": 9.0}
    best = min(
        (
            dict(zip(layers, names, strict=True))
            for names in itertools.product(bits, repeat=len(layers))
            if sum(bits[name] for name in names) / len(layers) <= 7
        ),
        key=lambda names: sum(sum(layers[layer].errors[name]) for layer, name in names.items()),
    )
    assert found.points[6].schemes == best


def test_a_finished_sweep_is_only_read(
    folder: Path, found: SweepReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "found" / "points").iterdir()}
    monkeypatch.setattr("llmcompressor_moe.sweep.run.recorded", None)
    assert sweep(folder, folder / "found", keep=True).model_dump() == found.model_dump()
    assert {path: path.stat().st_mtime_ns for path in (folder / "found" / "points").iterdir()} == before


def test_points_can_be_added(folder: Path, tmp_path: Path, found: SweepReport) -> None:
    first = sweep(folder, tmp_path / "out", GRID | {"points": [{"layers": 1}]})
    assert first.points[1] == found.points[1]
    more = sweep(folder, tmp_path / "out", GRID | {"points": [{"layers": 1}, {"bits": 7}]})
    assert more.points[:2] == first.points
    assert more.points[2] == found.points[6]


def test_speed_is_measured_where_asked(folder: Path, tmp_path: Path, found: SweepReport) -> None:
    speed = SpeedSettings(prompt_lengths=(8,), new_tokens=3, rounds=1, memory=False)
    plain = settings(folder)
    asked = replace(plain, evaluation=replace(plain.evaluation, speed=speed))
    grid = Grid.model_validate(GRID | {"points": [{"layers": 1}]})
    timed = run_sweep(folder / "mixtral", grid, tmp_path / "out", asked)
    base, dropped = timed.points
    (compared,) = dropped.speed
    assert dropped.model_copy(update={"speed": []}) == found.points[1]
    assert timed.timed and not found.timed
    assert (base.decode_time, dropped.decode_time) == (1, 1 / compared.reached_ratio)
    assert compared.bytes_ratio > 1
    curve = trade_off_curves(timed)[2]
    assert [point.x for point in curve.points] == [1, dropped.decode_time]
    assert [column.title for column in columns_of(timed) if column not in columns_of(found)].count(
        "Decode time"
    ) == 1
    assert len(trade_off_curves(found)) == 2
    assert SweepReport.model_validate_json(timed.model_dump_json()).model_dump() == timed.model_dump()


def test_killed_and_started_again(folder: Path, tmp_path: Path, found: SweepReport) -> None:
    """SIGKILL while it calibrates, and again and again while a point is being made, after some are finished."""
    output = tmp_path / "out"
    for finished in (0, 1, 3):
        (process,) = support.forked(sweep, folder, output)
        deadline = time.monotonic() + 300
        try:
            while process.is_alive() and time.monotonic() < deadline:
                done = list((output / "points").glob("*.json")) if (output / "points").exists() else []
                busy = list(output.glob("making-*")) if finished else [*output.glob("settings.json")]
                if len(done) >= finished and busy:
                    break
                time.sleep(0.01)
            assert process.is_alive(), "it ended before it could be killed"
        finally:
            process.kill()
            process.join()
    assert not (output / "sweep.json").exists()
    assert sweep(folder, output).model_dump() == found.model_dump()
    assert not list(output.glob("making-*")), "what the killed run left is cleared away"
    assert (output / "sweep.json").read_text() == (folder / "found" / "sweep.json").read_text()


def test_no_file_tells_where_it_was_made(folder: Path, found: SweepReport) -> None:
    write_page(found, folder / "found" / "report.html")
    assert "mixtral" in (folder / "found" / "report.html").read_text()
    assert not support.files_that_tell(folder / "found")


# What is refused


def test_another_sweep_in_the_same_place(folder: Path, tmp_path: Path) -> None:
    sweep(folder, tmp_path / "out", GRID | {"points": [{"layers": 1}]})
    with pytest.raises(SweepError, match=r"grid\.criterion differ"):
        sweep(folder, tmp_path / "out", GRID | {"criterion": "frequency"})
    (tmp_path / "out" / "points" / "0b-1l-0e-16bit.json").write_text("{}")
    with pytest.raises(SweepError, match=r"0b-1l-0e-16bit.json.*delete it"):
        sweep(folder, tmp_path / "out", GRID | {"points": [{"layers": 1}]})


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"blocks": 4}, "4 blocks dropped: no block would be left"),
        ({"layers": 4}, "4 MoE layers dropped: no MoE layer would be left"),
        ({"layers": 5}, "5 MoE layers dropped: .*only 4"),
        ({"experts": 7}, "7 experts per layer dropped: .*floors allow"),
        ({"bits": 4}, "4 bits: target_bits=4.0 is impossible .* 5 bits per expert weight"),
    ],
)
def test_points_that_cannot_be(folder: Path, tmp_path: Path, point: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(folder, tmp_path / "out", GRID | {"points": [{"layers": 1}, point]})
    assert not (tmp_path / "out" / "points").exists()


def test_what_is_wrong_is_found_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompressor_moe.evidence.gather.open_model", None)
    plain, grid = settings(folder), Grid.model_validate(GRID)
    measured = plain.evaluation
    for asked, message in (
        (replace(plain, dataset="none.txt"), "none.txt"),
        (replace(plain, sequence_length=999), "sequence_length=999: the model has 256 positions"),
        (replace(plain, evaluation=replace(measured, source="none.txt")), "none.txt"),
        (replace(plain, evaluation=replace(measured, stride=17)), "stride is 17"),
        (replace(plain, evaluation=replace(measured, device="nonsense")), "device='nonsense'"),
        (replace(plain, evaluation=replace(measured, dtype="int8")), "dtype='int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            run_sweep(folder / "mixtral", grid, tmp_path / "out", asked)
    with pytest.raises(ValueError, match="8 experts per layer dropped"):
        sweep(folder, tmp_path / "out", GRID | {"points": [{"experts": 8}]})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="lies in the model"):
        run_sweep(folder / "mixtral", grid, folder / "mixtral" / "out", plain)


def test_nothing_of_another_sweep_is_taken(folder: Path, tmp_path: Path) -> None:
    """Another model of the same shape, a text that was edited, files without settings, files that were damaged."""
    output, grid = tmp_path / "out", GRID | {"points": [{"layers": 1}]}
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("mixtral", "calibration.txt", "heldout.txt"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, mine / name)
    sweep(mine, output, grid)
    weights = load_file(mine / "mixtral" / "model.safetensors")
    before = (mine / "mixtral" / "model.safetensors").read_bytes()
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"] + 1}, mine / "mixtral/model.safetensors"
    )
    with pytest.raises(SweepError, match="other settings: model differ"):
        sweep(mine, output, grid)
    (mine / "mixtral" / "model.safetensors").write_bytes(before)
    text = (mine / "heldout.txt").read_text()
    (mine / "heldout.txt").write_text(text.replace("t30", "t31"))
    with pytest.raises(SweepError, match=r"text in evaluation\.source differ"):
        sweep(mine, output, grid)
    (mine / "heldout.txt").write_text(text)
    said = (output / "settings.json").read_text()
    (output / "settings.json").unlink()
    with pytest.raises(SweepError, match=r"points, base\.json, evidence\.json, but no settings\.json"):
        sweep(mine, output, grid)
    (output / "settings.json").write_text("{")
    with pytest.raises(SweepError, match=r"settings\.json' is not what a sweep wrote"):
        sweep(mine, output, grid)
    (output / "settings.json").write_text(said)
    point = output / "points" / "0b-1l-0e-16bit.json"
    (output / "points" / "0b-2l-0e-16bit.json").write_bytes(point.read_bytes())
    with pytest.raises(SweepError, match="holds the point 1 MoE layer dropped, not 2 MoE layers dropped"):
        sweep(mine, output, GRID | {"points": [{"layers": [1, 2]}]})


def test_a_quantized_model(folder: Path, tmp_path: Path, found: SweepReport) -> None:
    path = folder / "found" / "checkpoints" / "0b-0l-0e-7bit"
    with pytest.raises(ValueError, match="is quantized already"):
        run_sweep(path, Grid.model_validate(GRID), tmp_path / "out", settings(folder))
    assert load_file(path / "model.safetensors")
