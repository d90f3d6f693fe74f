"""A run that is stopped goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_models
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmcompressor_moe.checkpoint.atomic import OutputDirectoryError
from llmcompressor_moe.compression import compress
from llmcompressor_moe.profile import Profile, Statistic, collect_profile
from llmcompressor_moe.profile.resumable import PassStore, ResumablePass
from llmcompressor_moe.saving import opened, shards
from llmcompressor_moe.topology import find_topology
from llmcompressor_moe.work_folder import WorkFolder, WorkFolderError, work_path


class Stopped(BaseException):
    """Ends a pass as a signal would."""


def profile(model: PreTrainedModel, kept: ResumablePass | None = None) -> Profile:
    return collect_profile(
        model, find_topology(model), support.padded_batches(), set(Statistic), run_length=2, resumable=kept
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    own = ResumablePass.block_done

    def block_done(self: ResumablePass, done: int, *args) -> None:
        own(self, done, *args)
        if done == block:
            raise Stopped

    monkeypatch.setattr(ResumablePass, "block_done", block_done)


@pytest.mark.parametrize("model_type", support.UNLIKE_FAMILIES)
def test_a_pass_goes_on_after_any_block(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    expected = profile(model)
    for block in range(len(find_topology(model).blocks)):
        with monkeypatch.context() as patch:
            stop_after(patch, block)
            with pytest.raises(Stopped):
                profile(model, PassStore(tmp_path, 0).next(f"pass-{block}", {}))
        begun: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(ResumablePass, "block_done", lambda _, done, *args: begun.append(done))  # noqa: B023
            assert profile(model, PassStore(tmp_path, 0).next(f"pass-{block}", {})) == expected
        assert 0 not in begun


RECIPE = """
default_stage:
  default_modifiers:
    LayerDropModifier: {num_drop: 1}
    ExpertDropModifier: {num_drop: 2, criterion: reap}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return support.saved("mixtral", tmp_path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"t{3 + (i * d) % 100}" for i in range(40)) for d in range(1, 5)))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompressor_moe.saving.opened._SHARD_BYTES", 100_000)


def run(model: Path, recipe: Path, text: Path | None, output: Path, **options) -> list[str]:
    """Compress; returns what was announced."""
    said: list[str] = []
    compress(
        model,
        recipe,
        text,
        output,
        **{
            "sequence_length": 16,
            "num_samples": 4,
            "snapshot_seconds": 0,
            "announce": said.append,
            **options,
        },
    )
    return said


def killed(model: Path, recipe: Path, text: Path, output: Path, moment: str, count: int) -> None:
    """Compress in a process that kills itself with a signal that nobody can catch.

    :param moment: what is done the ``count``-th time then
    """

    def dies(own: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count(1)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def compress_until_then() -> None:
        if moment == "piece":
            write = opened.write_shards
            opened.write_shards = lambda directory, tensors, size, on_bytes: write(
                directory, tensors, size, dies(on_bytes)
            )
        else:
            holder, name = {
                "block": (ResumablePass, "block_done"),
                "decision": (WorkFolder, "decided"),
                "shard": (shards, "write_file"),
            }[moment]
            setattr(holder, name, dies(getattr(holder, name)))
        run(model, recipe, text, output)

    assert support.run_forked(compress_until_then) == [-signal.SIGKILL]


def digests(directory: Path) -> dict[str, str]:
    return {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file()
    }


def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(
    model: Path, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of this process, whose ``passes`` are its own, is killed."""
    run(model, recipe, text, tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 3
    passes: list[int] = []
    own = ResumablePass.block_done
    monkeypatch.setattr(
        ResumablePass,
        "block_done",
        lambda self, block, *rest: (passes.append(block), own(self, block, *rest)),
    )
    # Which blocks the resumed run still passes.
    moments = {("block", 2): [2, 3], ("decision", 1): [], ("shard", 2): [], ("piece", 40): []}
    for number, ((moment, count), left) in enumerate(moments.items()):
        output = tmp_path / f"out{number}"
        killed(model, recipe, text, output, moment, count)
        assert not output.exists() and work_path(output).exists()
        passes.clear()
        run(model, recipe, text, output, resume=True)
        assert passes == left
        assert digests(output) == expected
        assert not list(tmp_path.glob(f".{output.name}*"))


def stopped(monkeypatch: pytest.MonkeyPatch, *arguments, **options) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run(*arguments, **options)


def test_another_run_is_not_continued(
    model: Path, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    stopped(monkeypatch, model, recipe, text, output)
    assert not list((work_path(output) / "scratch").glob("*"))
    with pytest.raises(WorkFolderError, match="batch_size was 1, now 2"):
        run(model, recipe, text, output, resume=True, batch_size=2)
    with pytest.raises(WorkFolderError, match="dataset differs"):
        run(model, recipe, text, output, resume=True, num_samples=3)
    recipe.write_text(RECIPE.replace("num_drop: 2", "num_drop: 1"))
    with pytest.raises(WorkFolderError, match="recipe differs"):
        run(model, recipe, text, output, resume=True)
    recipe.write_text(RECIPE)
    changed = model / "config.json"
    before = changed.read_text()
    changed.write_text(before.replace('"mixtral"', '"mixtral" '))
    with pytest.raises(WorkFolderError, match="weights differs"):
        run(model, recipe, text, output, resume=True)
    changed.write_text(before)
    assert "Going on" in run(model, recipe, text, output, resume=True)


def test_without_resume_a_run_starts_over_and_says_so(
    model: Path, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    stopped(monkeypatch, model, recipe, text, output)
    assert any("Starting over" in line for line in run(model, recipe, text, output))
    assert not work_path(output).exists()
    assert any("Nothing to continue" in line for line in run(model, recipe, text, output, resume=True))


def test_a_greedy_search_goes_on_between_its_passes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "greedy.yaml"
    path.write_text(
        "default_stage: {default_modifiers: {BlockDropModifier: {num_drop: 2, search: greedy}, "
        "LayerDropModifier: {num_drop: 1, metric: kl}}}"
    )
    run(model, path, text, tmp_path / "whole")
    finished = ResumablePass.finish

    def finish(self: ResumablePass, result: object) -> None:
        finished(self, result)
        if "-1" in self._result.name:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(ResumablePass, "finish", finish)
        with pytest.raises(Stopped):
            run(model, path, text, tmp_path / "out")
    run(model, path, text, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_ctrl_c_prints_the_command_that_goes_on(
    model: Path, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompressor_moe.cli import app

    def interrupted(*_args) -> None:
        raise KeyboardInterrupt

    command = ["compress", str(model), "-r", str(recipe), "-d", str(text), "-o", str(tmp_path / "out")]
    command += ["--sequence-length", "16", "--num-samples", "4"]
    with monkeypatch.context() as patch:
        patch.setattr("llmcompressor_moe.saving.opened.update_and_save_recipe", interrupted)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 130, result.output
    assert not (tmp_path / "out").exists()
    (line,) = [line for line in result.output.splitlines() if "To go on: " in line]
    assert "--resume" in line and "--batch-size" not in line
    again = shlex.split(line.partition("To go on: ")[2])
    result = CliRunner().invoke(app, again[again.index("compress") :])
    assert result.exit_code == 0, result.output
    assert "Going on" in result.output


def test_a_full_disk_leaves_what_was_written_for_later(
    model: Path, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    own = shards.write_file

    def full(path: Path, *args, **kwargs) -> None:
        if "00003" in path.name:
            raise OSError(28, "No space left on device")
        own(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_file", full)
        with pytest.raises(OutputDirectoryError, match=r"No space left.*--resume"):
            run(model, recipe, text, output)
    assert not output.exists()
    assert len(list((work_path(output) / "unfinished").glob("*.safetensors"))) == 2
    run(model, recipe, text, output, resume=True)
    run(model, recipe, text, tmp_path / "whole")
    assert digests(output) == digests(tmp_path / "whole")


@pytest.mark.parametrize("vanishes", [True, False])
def test_a_source_that_changes_meanwhile_ends_the_run_in_one_line(
    vanishes: bool, model: Path, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompressor_moe.cli import app

    own = WorkFolder.decided
    (shard,) = model.glob("*.safetensors")

    def decided(*args):
        if vanishes:
            shard.unlink(missing_ok=True)
        else:
            os.utime(shard, (1, 1))
        return own(*args)

    monkeypatch.setattr(WorkFolder, "decided", decided)
    command = ["compress", str(model), "-r", str(recipe), "-d", str(text), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--sequence-length", "16"])
    assert result.exit_code == 2
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and ("cannot be read" if vanishes else "changed while it was in use") in errors[0]
    assert not (tmp_path / "out").exists()


def test_nobody_else_may_write_to_the_same_output(
    model: Path, recipe: Path, text: Path, tmp_path: Path
) -> None:
    work = WorkFolder(work_path(tmp_path / "out"), 60)
    with work.locked(), pytest.raises(WorkFolderError, match="another process"):
        run(model, recipe, text, tmp_path / "out")


def test_a_read_only_source_is_enough(model: Path, recipe: Path, text: Path, tmp_path: Path) -> None:
    for path in [*model.iterdir(), model]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = digests(model)
    try:
        run(model, recipe, text, tmp_path / "out")
    finally:
        model.chmod(0o755)
    assert digests(model) == before
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").iterdir())
    run(model, recipe, text, tmp_path / "out")


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_precision_that_was_chosen_is_taken_over(
    algorithm: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "precision.yaml"
    path.write_text(
        "default_stage: {default_modifiers: {ExpertDropModifier: {num_drop: 2}, RouterAwareQuantModifier: "
        f"{{target_bits: 6.5, group_size: 32, algorithm: {algorithm}}}}}}}"
    )
    run(model, path, text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("llmcompressor_moe.saving.opened.carried_files", _stop)
        with pytest.raises(Stopped):
            run(model, path, text, tmp_path / "out")
    monkeypatch.setattr("llmcompressor_moe.quantization.planner.Planner.plan", None)
    run(model, path, text, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def _stop(*_args) -> None:
    raise Stopped
