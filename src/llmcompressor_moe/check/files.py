"""Rules about the files themselves."""

from collections import defaultdict
from pathlib import Path

from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, LayoutProblem

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
)
# More of the same kind are counted, not listed.
_SHOWN = 3


def check_files(layout: CheckpointLayout, findings: Findings) -> bool:
    """Report what the layout found; False if the table of tensors cannot be relied on."""
    by_code: dict[str, list[LayoutProblem]] = defaultdict(list)
    for problem in layout.problems:
        by_code[problem.code].append(problem)
    for problems in by_code.values():
        for position, problem in enumerate(problems[:_SHOWN]):
            hidden = len(problems) - _SHOWN
            more = f" (and {hidden} more like it)" if position == _SHOWN - 1 and hidden > 0 else ""
            add = findings.warning if problem.warning else findings.error
            add(problem.code, problem.subject, problem.message + more, problem.way_out)
    whole = ("file-missing", "file-truncated", "file-corrupt", "file-unreadable", "index-unreadable")
    return bool(layout.tensors) and not any(code in by_code for code in whole)


def check_tokenizer(path: Path, findings: Findings) -> None:
    """A checkpoint without tokenizer can only be served with one from elsewhere."""
    if not any((path / name).is_file() for name in _TOKENIZERS):
        findings.warning(
            "tokenizer-missing",
            path.name,
            f"none of {', '.join(_TOKENIZERS[:3])} is there",
            "save the tokenizer too, or serve with --tokenizer",
        )
