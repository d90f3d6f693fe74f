"""The difference between what is demanded and what is stored, from which the rules take what they explain.

A rule that recognises a pattern (a missing block, experts under foreign names, ...) reports it once and
removes its tensors; what no rule took is reported at the end, one finding per kind of tensor.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from llmcompressor_moe.check.demand import Demand, Wanted
from llmcompressor_moe.check.report import Findings, Severity
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, TensorInfo

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kind_of(name: str) -> str:
    """A tensor name with its indices replaced, so that the same tensor of every layer and expert has one."""
    return _NUMBER.sub("*", name)


@dataclass
class Comparison:
    """What remains unexplained: names that are missing or extra, and tensors of another shape or dtype."""

    missing: dict[str, Wanted]
    extra: dict[str, TensorInfo]
    shapes: dict[str, tuple[TensorInfo, Wanted]]
    dtypes: dict[str, tuple[TensorInfo, Wanted]]

    def forget(self, names: Iterable[str]) -> None:
        """Take names that a rule has explained out of every table."""
        for name in names:
            for table in (self.missing, self.extra, self.shapes, self.dtypes):
                table.pop(name, None)

    def forget_under(self, prefixes: tuple[str, ...]) -> None:
        """Take all names below module paths (each ending in a dot) out of every table."""
        tables = (self.missing, self.extra, self.shapes, self.dtypes)
        self.forget([name for table in tables for name in table if name.startswith(prefixes)])


def compare(layout: CheckpointLayout, demand: Demand) -> Comparison:
    """Compare by name, then shape, then dtype. One element is one element: () and (1,) are the same shape."""
    stored = layout.tensors
    known = demand.tensors | demand.optional
    shapes, dtypes = {}, {}
    for name, wanted in known.items():
        tensor = stored.get(name)
        if tensor is None:
            continue
        single = tensor.numel == 1 and all(dim == 1 for dim in wanted.shape)
        if tensor.shape != wanted.shape and not single:
            shapes[name] = (tensor, wanted)
        elif tensor.dtype not in wanted.dtypes:
            dtypes[name] = (tensor, wanted)
    return Comparison(
        {name: wanted for name, wanted in demand.tensors.items() if name not in stored},
        {name: tensor for name, tensor in stored.items() if name not in known},
        shapes,
        dtypes,
    )


class PerLayer:
    """Collects the same finding over layers, so that it is reported once with all of them."""

    def __init__(self, findings: Findings):
        self._findings = findings
        self._layers: dict[tuple[Severity, str, str, str], list[int]] = defaultdict(list)

    def error(self, code: str, layer: int, message: str, way_out: str = "") -> None:
        """Add an error about a layer."""
        self._layers[(Severity.ERROR, code, message, way_out)].append(layer)

    def warning(self, code: str, layer: int, message: str, way_out: str = "") -> None:
        """Add a warning about a layer."""
        self._layers[(Severity.WARNING, code, message, way_out)].append(layer)

    def report(self) -> None:
        """Hand everything to the findings."""
        for (severity, code, message, way_out), layers in self._layers.items():
            add = self._findings.error if severity is Severity.ERROR else self._findings.warning
            add(code, f"layer {ranges(layers)}", message, way_out)
        self._layers.clear()


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[kind_of(name)].append(name)
    return kinds


def _alike(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def report_rest(comparison: Comparison, findings: Findings) -> None:
    """Report whatever no rule explained."""
    for names in _by_kind(comparison.missing).values():
        findings.error(
            "tensor-missing",
            names[0],
            f"config.json demands it, no file holds it{_alike(names)}: readers fill it with random or "
            "uninitialised values",
            "save the model again, or correct config.json",
        )
    for names in _by_kind(comparison.extra).values():
        findings.error(
            "tensor-extra",
            names[0],
            f"stored, but config.json describes no such tensor{_alike(names)}: transformers leaves it out, "
            "vLLM fails",
            "save the model again, or correct config.json",
        )
    for names in _by_kind(comparison.shapes).values():
        tensor, wanted = comparison.shapes[names[0]]
        findings.error(
            "tensor-shape",
            names[0],
            f"stored as {list(tensor.shape)}, config.json demands {list(wanted.shape)}{_alike(names)}",
            "save the model again, or correct config.json",
        )
    for names in _by_kind(comparison.dtypes).values():
        tensor, wanted = comparison.dtypes[names[0]]
        findings.error(
            "tensor-dtype",
            names[0],
            f"stored as {tensor.dtype}, readers take {', '.join(wanted.dtypes)}{_alike(names)}",
            "save the model again, or correct quantization_config",
        )
