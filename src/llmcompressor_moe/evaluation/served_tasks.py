"""Tasks of lm-eval on vLLM, which lives in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcompressor_moe.evaluation.task_selection import selected_tasks
from llmcompressor_moe.evaluation.tasks import TaskScore, check_task_options, scores_of

__all__ = ["run_served_tasks"]

_LM_EVAL = "lm-eval>=0.4.9"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json")
# Prints which distributions hold lm_eval and vllm; the CPU build of vLLM is not called vllm.
_LOOK = """
import importlib.metadata as metadata, json
holders = metadata.packages_distributions()
print(json.dumps({
    module: [holders[module][0], metadata.version(holders[module][0])]
    for module in ("lm_eval", "vllm") if module in holders
}))
"""
_LOG_CHARACTERS = 3000


def run_served_tasks(
    checkpoint: str | Path,
    tasks: Sequence[str | Path],
    python: str | Path,
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    *,
    model_args: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> list[TaskScore]:
    """Run tasks on a checkpoint with vLLM, by ``PYTHON -m lm_eval run --model vllm`` in another environment.

    Tasks are looked up by the lm-eval of this environment first, so that mistakes end before vLLM starts. A
    checkpoint whose layers differ needs this project's plugin there.

    :param checkpoint: directory of the model with its tokenizer
    :param python: the interpreter of vLLM's environment, which needs lm-eval too
    :param model_args: further arguments of ``vllm.LLM``, for example ``{"max_model_len": 4096}``
    :param environment: variables over those of this process
    :param timeout: seconds until it is given up; None waits
    :param tasks: these and the others as `tasks.run_tasks` takes them
    :raises ValueError: ``checkpoint`` is not a directory with model and tokenizer; ``python`` is not an
        interpreter or lacks vLLM or lm-eval (gives the command that installs it); a task is unknown; lm-eval
        failed (gives the end of its log) or took too long
    """
    checkpoint = Path(checkpoint)
    arguments = dict(model_args or {})
    _check_checkpoint(checkpoint, needs_tokenizer="tokenizer" not in arguments)
    check_task_options(limit, num_fewshot, batch_size)
    with (
        selected_tasks(tasks, include_path) as selection,
        tempfile.TemporaryDirectory(prefix="lm-eval-") as folder,
    ):
        command = [str(python), "-m", "lm_eval", "run", "--model", "vllm"]
        command += ["--model_args", json.dumps({"pretrained": str(checkpoint.resolve()), **arguments})]
        command += [
            "--tasks",
            *selection.specs,
            "--batch_size",
            str(batch_size),
            "--output_path",
            f"{folder}/out",
        ]
        command += [] if include_path is None else ["--include_path", str(Path(include_path).resolve())]
        command += [] if limit is None else ["--limit", str(limit)]
        command += [] if num_fewshot is None else ["--num_fewshot", str(num_fewshot)]
        command += ["--apply_chat_template"] if apply_chat_template else []
        variables = {**os.environ, **(environment or {})}
        # vLLM 0.32 divides by the time that its progress bar shows.
        variables.pop("TQDM_DISABLE", None)
        variables = _with_vllm_metadata(variables, _vllm_of(Path(python), variables), Path(folder))
        log = _run(command, variables, timeout)
        written = sorted(Path(folder, "out").rglob("results_*.json"))
        if not written:
            raise ValueError(f"lm-eval wrote no results; the end of its log:\n{log}")
        return scores_of(json.loads(written[-1].read_text(encoding="utf-8")))


def _check_checkpoint(checkpoint: Path, needs_tokenizer: bool) -> None:
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"checkpoint {str(checkpoint)!r} has no config.json; name the directory of a model")
    if needs_tokenizer and not any((checkpoint / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the base "
            "model's tokenizer files into it, or name them by model_args={'tokenizer': PATH}"
        )


def _vllm_of(python: Path, variables: Mapping[str, str]) -> tuple[str, str]:
    """Name and version of the distribution that holds vLLM."""
    try:
        looked = subprocess.run(
            [str(python), "-c", _LOOK], env=variables, capture_output=True, text=True, check=True
        )
        found = json.loads(looked.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ValueError(
            f"python {str(python)!r} cannot be run ({error}); name the interpreter of vLLM's environment, for "
            "example .venv-vllm/bin/python"
        ) from error
    if "vllm" not in found:
        raise ValueError(f"vLLM is not installed for {python}; name the interpreter of vLLM's environment")
    if "lm_eval" not in found:
        raise ValueError(f"lm-eval is not installed for {python}; {python} -m pip install '{_LM_EVAL}'")
    name, version = found["vllm"]
    return name, version


def _with_vllm_metadata(variables: Mapping[str, str], vllm: tuple[str, str], folder: Path) -> dict[str, str]:
    """Let lm-eval, which asks for the version of a distribution called vllm, find that of vLLM's CPU build."""
    name, version = vllm
    if name == "vllm":
        return dict(variables)
    stub = folder / "metadata" / f"vllm-{version}.dist-info"
    stub.mkdir(parents=True)
    # vLLM itself tells by the local version that it runs on a CPU.
    local = f"{version}+cpu" if "cpu" in name and "+" not in version else version
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {local}\n", encoding="utf-8")
    paths = [str(stub.parent), *filter(None, [variables.get("PYTHONPATH")])]
    return dict(variables) | {"PYTHONPATH": os.pathsep.join(paths)}


def _run(command: Sequence[str], variables: Mapping[str, str], timeout: float | None) -> str:
    """The end of the log of a command that went well."""
    try:
        run = subprocess.run(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"lm-eval took more than {timeout} s; give more, or fewer items by limit") from error
    log = run.stdout[-_LOG_CHARACTERS:]
    if run.returncode:
        raise ValueError(f"lm-eval ended with code {run.returncode}; the end of its log:\n{log}")
    return log
