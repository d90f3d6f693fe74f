"""vLLM in an environment and a process of its own, asked from here."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcompressor_moe.evaluation.turns import Turn

__all__ = ["VllmError", "VllmProcess", "check_interpreter"]

_RUNNER = Path(__file__).with_name("vllm_runner.py")
# The user's environment wins over these. An engine in the runner's own process can be timed step by step, and its
# memory read.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
_SHOWN_LINES = 25


class VllmError(RuntimeError):
    """vLLM could not load a checkpoint, or stopped."""


def check_interpreter(python: str | Path, field: str) -> None:
    """Refuse what cannot be vLLM's interpreter.

    :param field: its name in the message
    :raises ValueError: it is no file that can be run
    """
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise ValueError(
            f"{field}={str(python)!r} is not an interpreter; name the one of an environment that has vLLM, "
            "such as /path/to/vllm-env/bin/python (docs/serving.md)."
        )


class VllmProcess:
    """One checkpoint, loaded by vLLM.

    :param path: checkpoint directory
    :param python: the interpreter of an environment that has vLLM
    :param options: for ``vllm.LLM``
    :param timeout: seconds that loading, or one answer, may take
    :raises ValueError: there is no such interpreter
    :raises VllmError: it does not load; with the end of its log
    """

    def __init__(
        self,
        path: str | Path,
        python: str | Path,
        options: Mapping[str, Any] | None = None,
        timeout: float = 1800,
    ):
        check_interpreter(python, "python")
        self.path, self.timeout = Path(path), timeout
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (close() does)
        self._process = subprocess.Popen(
            [str(python), str(_RUNNER), str(path), json.dumps(dict(options or {}))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_ENVIRONMENT | os.environ,
        )
        try:
            self._answer("load")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def turn(self, rows: Sequence[Sequence[int]], new_tokens: int) -> Turn:
        """Continue rows of token ids, equally long, greedily by ``new_tokens`` each.

        :raises VllmError: it stopped
        """
        return Turn(**self._ask({"turn": [list(row) for row in rows], "new_tokens": new_tokens}))

    def negative_log_likelihood(self, rows: Sequence[Sequence[int]]) -> float:
        """Mean, in nats, over every token but the first of its row.

        :raises VllmError: it stopped
        """
        return self._ask({"score": [list(row) for row in rows]})["negative_log_likelihood"]

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended, as reading the answer will tell
        return self._answer("answer")

    def _answer(self, what: str) -> dict[str, Any]:
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.timeout, stop)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        code = self._process.wait()
        reason = f"took more than {self.timeout:g} s" if late.is_set() else f"ended with code {code}"
        self._log.seek(0)
        end = "\n".join(self._log.read().strip().splitlines()[-_SHOWN_LINES:])
        raise VllmError(f"vLLM did not {what} {str(self.path)!r}: it {reason}. The end of its log:\n{end}")
