"""From what a user names to tasks that lm-eval finds; what it cannot find is refused before any model runs.

YAML files of tasks may name Python functions (``!function``), which lm-eval imports from the file's folder: treat
the folder of a task like a program.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmcompressor_moe.compat.lm_eval import yaml_loader

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["INSTALL", "TaskSelection", "selected_tasks"]

INSTALL = "pip install 'llmcompressor-moe[eval]'"
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskSelection:
    """Tasks that lm-eval finds.

    :param manager: lm-eval's index of tasks
    :param names: what the user named -> what lm-eval takes for it, names or YAML files
    """

    manager: TaskManager
    names: dict[str, list[str]]

    @property
    def specs(self) -> list[str]:
        """What lm-eval takes, each once."""
        return list(dict.fromkeys(spec for specs in self.names.values() for spec in specs))


@contextlib.contextmanager
def selected_tasks(
    tasks: Sequence[str | Path], include_path: str | Path | None = None
) -> Iterator[TaskSelection]:
    """Find tasks by lm-eval's names, groups, tags and patterns (``mmlu_*``), YAML files, and folders of these.

    A folder stands for every task in it. In tasks named by file or folder, relative ``data_files`` are taken from
    the task's folder where they are there, so that they work from anywhere; lm-eval alone takes them from the
    working directory. The context holds the temporary files that tell lm-eval so.

    :param include_path: a folder whose tasks can be named beside lm-eval's own, as with its ``--include_path``
    :raises ValueError: lm-eval is not installed; there is no task; a name is unknown (tells the closest); a YAML
        file is not there or is none (names file and cause)
    """
    if not tasks or isinstance(tasks, str):
        raise ValueError(
            f"tasks is {tasks!r}; give a list of names or of YAML files, for example ['arc_easy']"
        )
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(
            f"include_path is {str(include_path)!r}, which is not a folder; name a folder of YAML files"
        )
    files = {str(task): _files(Path(task)) for task in tasks if _is_path(task)}
    names = [str(task) for task in tasks if str(task) not in files]
    if include_path is not None:
        for file in sorted(Path(include_path).glob("**/*.yaml")):
            _config(file)
    with tempfile.TemporaryDirectory(prefix="tasks-") as folder:
        found = {
            name: [
                _wrapped(file, Path(folder, f"{index}-{number}.yaml")) for number, file in enumerate(paths)
            ]
            for index, (name, paths) in enumerate(files.items())
        }
        manager = _manager(names, include_path)
        found |= {name: manager.match_tasks([name]) for name in names}
        unknown = [name for name in names if not found[name]]
        if unknown:
            raise ValueError("; ".join(_unknown(name, manager.all_tasks) for name in unknown))
        yield TaskSelection(manager, {str(task): found[str(task)] for task in tasks})


def _is_path(task: str | Path) -> bool:
    return isinstance(task, Path) or task.endswith(_YAML) or "/" in task


def _files(path: Path) -> list[Path]:
    if path.is_file():
        kind = _config(path)
        if "task" not in kind or "group" in kind:
            raise ValueError(
                f"task file {str(path)!r} is not a task (its fields are {', '.join(map(str, kind)) or 'none'}); "
                "give a file with `task: NAME`, or for a group its folder as include_path and its name"
            )
        return [path]
    if path.is_dir():
        configs = {file: _config(file) for file in sorted(path.glob("*.yaml"))}
        files = [file for file, config in configs.items() if "task" in config and "group" not in config]
        if files:
            return files
        raise ValueError(f"task folder {str(path)!r} holds no .yaml file with `task: NAME`")
    raise ValueError(f"task file {str(path)!r} is not there; give a YAML file, a folder of them, or a name")


def _config(file: Path) -> dict[str, Any]:
    try:
        return _library().load_yaml(file, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"task file {str(file)!r} cannot be read: {' '.join(str(error).split())}") from error


def _wrapped(file: Path, target: Path) -> str:
    """A file that includes another and finds its data."""
    content: dict[str, Any] = {"include": str(file.resolve())}
    options = _config(file).get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        content["dataset_kwargs"] = options | {
            "data_files": _absolute(options["data_files"], file.resolve().parent)
        }
    target.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(target)


def _absolute(data_files: Any, folder: Path) -> Any:
    if isinstance(data_files, dict):
        return {split: _absolute(names, folder) for split, names in data_files.items()}
    if isinstance(data_files, list):
        return [_absolute(name, folder) for name in data_files]
    return str(folder / data_files) if (folder / data_files).exists() else data_files


def _manager(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    # lm-eval's own 14,000 tasks take it ten seconds to index; most local tasks do without them.
    own = _library().TaskManager(include_path=include_path, include_defaults=False)
    if set(names) <= set(own.all_subtasks):
        return own
    return _everything() if include_path is None else _library().TaskManager(include_path=include_path)


@functools.cache
def _everything() -> TaskManager:
    return _library().TaskManager()


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    advice = f"the closest names are {', '.join(close)}" if close else "`lm-eval ls tasks` lists all names"
    return f"task {name!r} is unknown; {advice}; a local task is named by its YAML file"


@dataclass(frozen=True)
class _Library:
    TaskManager: Any
    load_yaml: Any


def _library() -> _Library:
    try:
        from lm_eval.tasks import TaskManager

        load_yaml = yaml_loader()
    except ImportError as error:
        raise ValueError(f"tasks need lm-eval, which is not installed ({error}); {INSTALL}") from error
    return _Library(TaskManager, load_yaml)
