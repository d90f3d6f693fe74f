"""Scores on tasks of lm-eval, the Language Model Evaluation Harness (Gao et al., 10.5281/zenodo.12608602)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.evaluation.likelihood import evaluation_mode
from llmcompressor_moe.evaluation.task_selection import TaskSelection, selected_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TaskScore", "check_task_options", "check_tasks", "run_tasks", "scores_of"]

# What stands in lm-eval's results beside metrics.
_NO_METRICS = ("alias", "name", "sample_len", "sample_count")
# What lm-eval's tasks read that are files on this machine, not repositories of a hub.
_LOCAL_LOADERS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml")


class TaskScore(BaseModel):
    """One metric of one task or group.

    :param task: lm-eval's name
    :param metric: what was measured, for example ``acc``, ``acc_norm``, ``word_perplexity``
    :param filter: what was done to the answers before, ``none`` for most tasks
    :param value: as lm-eval gives it; accuracies are shares of 1
    :param stderr: lm-eval's standard error of ``value``; None where it has none
    :param higher_is_better: None where lm-eval does not know
    :param samples: items scored (after ``limit``); None for groups
    :param num_fewshot: examples in each prompt; None for groups
    :param version: the task's
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None
    samples: int | None = None
    num_fewshot: int | None = None
    version: str | None = None


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path],
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    *,
    apply_chat_template: bool = False,
) -> list[TaskScore]:
    """Run tasks on a loaded model, by ``lm_eval.simple_evaluate`` with its own seeds (which it sets globally).

    :param model: any model of transformers; one loaded by `load_trimmed_moe` as well
    :param tasks: names of tasks, groups, tags or patterns; YAML files; folders of these (see
        `task_selection.selected_tasks`)
    :param include_path: a folder whose tasks can be named beside lm-eval's own
    :param limit: items per task: a number, or a share below 1; None for all
    :param num_fewshot: examples in each prompt; None for what each task says
    :param apply_chat_template: let the tokenizer's chat template write the prompts
    :raises ValueError: lm-eval or the tokenizer is missing; a task is unknown, its YAML or its data cannot be
        read, or its data are on a hub that cannot be reached; a number is out of range
    """
    if tokenizer is None:
        raise ValueError(
            "tokenizer is None; give the tokenizer of the base model, which tasks are written with"
        )
    check_task_options(limit, num_fewshot, batch_size)
    with selected_tasks(tasks, include_path) as selection:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        built = _built(selection)
        with evaluation_mode(model):
            # lm-eval gives the tokenizer a padding token, which is not ours to change.
            harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            results = simple_evaluate(
                model=harness,
                tasks=built,
                task_manager=selection.manager,
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                apply_chat_template=apply_chat_template,
                log_samples=False,
            )
    return scores_of(results)


def check_task_options(limit: float | None, num_fewshot: int | None, batch_size: int | str) -> None:
    """Refuse numbers that lm-eval would stumble over late or not at all.

    :raises ValueError: names the option and its value
    """
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise ValueError(f"limit is {limit}; give a whole number of items, or a share between 0 and 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot is {num_fewshot}; give 0 or more")
    if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; give at least 1")


def check_tasks(
    tasks: Sequence[str | Path], include_path: str | Path | None, limit: float | None, *, served: bool
) -> None:
    """Refuse tasks that cannot be run.

    :param served: another environment runs them, which may have data that this one does not
    :raises ValueError: see `run_tasks`
    """
    check_task_options(limit, None, 1)
    with selected_tasks(tasks, include_path) as selection:
        if not served:
            _built(selection)


def scores_of(results: Mapping[str, Any]) -> list[TaskScore]:
    """Scores in the order of lm-eval's results, as `simple_evaluate` returns them and its command writes them."""
    return [
        _score(results, task, key, value)
        for task, metrics in results["results"].items()
        for key, value in metrics.items()
        if key not in _NO_METRICS and "_stderr" not in key and isinstance(value, int | float)
    ]


def _score(results: Mapping[str, Any], task: str, key: str, value: float) -> TaskScore:
    metric, _, name = key.partition(",")
    error = results["results"][task].get(f"{metric}_stderr,{name}")
    version = results["versions"].get(task)
    return TaskScore(
        task=task,
        metric=metric,
        filter=name or "none",
        value=value,
        stderr=error if isinstance(error, int | float) else None,
        higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
        samples=results["n-samples"].get(task, {}).get("effective"),
        num_fewshot=results["n-shot"].get(task),
        version=None if version is None else str(version),
    )


def _built(selection: TaskSelection) -> list[Any]:
    """Tasks and groups with their data, which lm-eval takes in the place of names."""
    built: list[Any] = []
    for asked, specs in selection.names.items():
        for spec in specs:
            try:
                loaded = selection.manager.load([spec])
            # Whatever a task's YAML or its Python code makes of wrong fields.
            except Exception as error:
                raise ValueError(_reason(asked, spec, selection, error)) from error
            children = {name for names in loaded.get("group_map", {}).values() for name in names}
            groups = [group for name, group in loaded["groups"].items() if name not in children]
            built += groups or list(loaded["tasks"].values())
    return built


def _reason(asked: str, spec: str, selection: TaskSelection, error: Exception) -> str:
    cause = " ".join(str(error).split())
    entry = selection.manager.task_index.get(spec)
    source = (entry.cfg or {}).get("dataset_path") if entry else None
    if isinstance(error, ConnectionError) or (
        isinstance(error, OSError) and source not in _LOCAL_LOADERS and source
    ):
        return (
            f"task {asked!r} needs the dataset {source or 'of its members'}, which is not on this machine, and "
            f"the hub cannot be reached ({cause}); fetch it where there is a network and set HF_HOME to it, or "
            "give a YAML file whose dataset_path is json with local data_files"
        )
    return (
        f"task {asked!r} cannot be set up ({type(error).__name__}: {cause}); mend its YAML file or its data"
    )
