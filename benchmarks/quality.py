"""What each drop costs on the bundled demo model: held-out perplexity per number of dropped parts and method.

    python benchmarks/quality.py            # measures, then writes docs/quality.json, docs/quality.md and plots
    python benchmarks/quality.py --render   # writes the page and the plots again from docs/quality.json

Parts are scored by the package on calibration text, dropped by its plans and surgery in memory, and the model is
measured on held-out text. `random` is the mean over three seeds; the others are repeated on three disjoint sets of
calibration samples.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmcompressor_moe.criteria import METRICS, expert_criterion
from llmcompressor_moe.criteria.experts import EXPERT_CRITERIA, ScoreInput
from llmcompressor_moe.demo import DEMO_MODEL, calibration_texts, heldout_rows, token_rows
from llmcompressor_moe.evaluation import perplexity
from llmcompressor_moe.plan import ExpertRoom, experts_to_drop, parts_to_drop, run_to_drop
from llmcompressor_moe.profile import Profile, Statistic, collect_profile, divergence_without
from llmcompressor_moe.surgery.bypass import bypassed, pass_through, silence
from llmcompressor_moe.surgery.repack import repack_experts
from llmcompressor_moe.surgery.session import TrimSession
from llmcompressor_moe.topology import find_topology

DOCS = Path(__file__).resolve().parent.parent / "docs"
SEEDS = (0, 1, 2)
LENGTH = 256
CALIBRATION = 24
KL_SEQUENCES = 6
STATISTICS = {Statistic.BLOCK, Statistic.LAYER, Statistic.ROUTING, Statistic.OUTPUT, Statistic.REDUNDANCY}
# method -> number of dropped parts -> perplexities, one per seed
Curves = dict[str, dict[int, list[float]]]


@dataclass
class Bench:
    """The intact model (fused experts for speed, linearized ones for scores) and its texts."""

    model: PreTrainedModel
    linear: PreTrainedModel
    heldout: torch.Tensor
    calibration: list[list[dict[str, torch.Tensor]]]

    @classmethod
    def load(cls, sequences: int) -> Bench:
        """Read the demo model; measure on ``sequences`` held-out sequences, taken evenly from the text."""
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
        heldout = heldout_rows(tokenizer, LENGTH)
        count = min(sequences, len(heldout))
        chosen = [heldout[i * len(heldout) // count] for i in range(count)]
        rows = token_rows(tokenizer, calibration_texts(), LENGTH)
        sets = [rows[seed :: len(SEEDS)][:CALIBRATION] for seed in SEEDS]
        batches = [
            [
                {
                    "input_ids": torch.tensor([row]),
                    "attention_mask": torch.ones(1, len(row), dtype=torch.long),
                }
                for row in rows_
            ]
            for rows_ in sets
        ]
        return cls(model, linearize_moe(copy.deepcopy(model)), torch.tensor(chosen), batches)

    def profile(
        self, seed: int, without: tuple[set[int], set[int]] = (set(), set()), run: int | None = None
    ) -> Profile:
        """Statistics on one calibration set of the model without some blocks and MoE layers."""
        wanted = {Statistic.RUN} if run else STATISTICS
        topology = find_topology(self.linear)
        with self.without_parts(self.linear, *without):
            return collect_profile(
                self.linear,
                topology,
                self.calibration[seed],
                wanted,
                run_length=run,
                skip_blocks=without[0],
                skip_layers=without[1],
            )

    def perplexity_without(self, blocks: set[int] = frozenset(), layers: set[int] = frozenset()) -> float:
        """Held-out perplexity without whole blocks or MoE layers."""
        with self.without_parts(self.model, blocks, layers):
            return perplexity(self.model, self.heldout)

    def perplexity_without_experts(self, dropped: dict[int, list[int]]) -> float:
        """Held-out perplexity after real surgery on a copy."""
        model = copy.deepcopy(self.linear)
        session = TrimSession.begin(model)
        for layer, experts in dropped.items():
            session.drop_experts(layer, experts)
        repack_experts(model)
        return perplexity(model, self.heldout)

    @staticmethod
    @contextlib.contextmanager
    def without_parts(model: PreTrainedModel, blocks: set[int], layers: set[int]) -> Iterator[None]:
        """For a while the model computes as if these parts were gone."""
        topology = find_topology(model)
        with contextlib.ExitStack() as stack:
            for index in blocks:
                block = model.get_submodule(topology.blocks[index].name)
                stack.enter_context(bypassed(block, pass_through(block)))
            for index in layers:
                moe = model.get_submodule(topology.blocks[index].moe.module)
                stack.enter_context(bypassed(moe, silence(moe)))
            yield


class Memo:
    """Perplexity per set of dropped parts: methods often agree."""

    def __init__(self, measure: Callable[[Any], float]) -> None:
        self._measure = measure
        self._known: dict[str, float] = {}

    def __call__(self, dropped: Any) -> float:
        """Perplexity without these parts."""
        key = repr(sorted(dropped.items()) if isinstance(dropped, dict) else sorted(dropped))
        if key not in self._known:
            self._known[key] = self._measure(dropped)
            print(f"{self._known[key]:10.2f}  without {key}", flush=True)
        return self._known[key]


def parts_curves(bench: Bench, part: str) -> Curves:
    """All ways of choosing blocks or MoE layers."""
    topology = find_topology(bench.linear)
    indices = [block.index for block in topology.blocks] if part == "block" else list(topology.moe_layers)
    counts = range(1, len(indices))

    def split(dropped: set[int]) -> tuple[set[int], set[int]]:
        return (dropped, set()) if part == "block" else (set(), dropped)

    measure = Memo(lambda dropped: bench.perplexity_without(*split(set(dropped))))

    def cosine(seed: int, dropped: set[int]) -> dict[int, float]:
        profile = bench.profile(seed, split(dropped))
        return profile.block_similarity if part == "block" else profile.layer_similarity

    def kl(seed: int, dropped: set[int]) -> dict[int, float]:
        left = [(index,) for index in indices if index not in dropped]
        with bench.without_parts(bench.linear, *split(dropped)):
            return divergence_without(
                bench.linear, topology, bench.calibration[seed][:KL_SEQUENCES], left, part
            )

    curves: Curves = {}
    for name, score in (("cosine", cosine), ("kl", kl)):
        highest = METRICS[name].drop_highest
        for seed in SEEDS:
            once = score(seed, set())
            dropped: set[int] = set()
            now = once
            for count in counts:
                chosen = parts_to_drop(once, count=count, drop_highest=highest)
                curves.setdefault(name, {}).setdefault(count, []).append(measure(chosen))
                if seed == SEEDS[0]:
                    dropped |= set(parts_to_drop(now, count=1, drop_highest=highest))
                    curves.setdefault(f"{name}, greedy", {})[count] = [measure(dropped)]
                    now = score(seed, dropped) if count < counts[-1] else {}
    if part == "block":
        for count in counts:
            runs = bench.profile(SEEDS[0], run=count).run_similarity
            chosen = run_to_drop(runs, indices, count, drop_highest=True, protect=())
            curves.setdefault("cosine, consecutive", {})[count] = [measure(chosen)]
    for name, seeds in (("random", SEEDS), ("last", SEEDS[:1])):
        for count in counts:
            picks = [parts_to_drop(METRICS[name].score(indices, seed), count=count) for seed in seeds]
            curves.setdefault(name, {})[count] = [measure(pick) for pick in picks]
    return curves


def expert_curves(bench: Bench, scope: str) -> Curves:
    """All criteria; the number of dropped experts is per layer (its mean, in global scope)."""
    topology = find_topology(bench.linear)
    layers = topology.moe_layers
    rooms = {index: ExpertRoom(moe.num_experts, moe.min_experts) for index, moe in layers.items()}
    most = min(room.num_experts - room.floor for room in rooms.values())
    profiles = [bench.profile(seed) for seed in SEEDS]
    weights = {
        index: [
            [p.detach() for p in expert.parameters() if p.ndim == 2]
            for expert in TrimSession.begin(bench.linear).experts(index)
        ]
        for index in layers
    }
    measure = Memo(bench.perplexity_without_experts)
    curves: Curves = {}
    for name in EXPERT_CRITERIA:
        for seed in SEEDS if name != "weight_norm" else SEEDS[:1]:
            scores = {
                index: expert_criterion(name).score(
                    ScoreInput(
                        profiles[seed].experts[index], profiles[seed].num_samples, weights[index], index, seed
                    )
                )
                for index in layers
            }
            for count in range(1, most + 1):
                dropped = experts_to_drop(scores, rooms, count, scope)
                curves.setdefault(name, {}).setdefault(count, []).append(measure(dropped))
    by_index = {
        index: [float(-expert) for expert in range(room.num_experts)] for index, room in rooms.items()
    }
    for count in range(1, most + 1):
        curves.setdefault("last", {})[count] = [measure(experts_to_drop(by_index, rooms, count, "layer"))]
    return curves


def measure_all(sequences: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    bench = Bench.load(sequences)
    results = {
        "intact": bench.perplexity_without(),
        "evaluation": {"sequences": len(bench.heldout), "length": LENGTH},
        "calibration": {
            "sequences": len(bench.calibration[0]),
            "length": LENGTH,
            "kl_sequences": KL_SEQUENCES,
        },
        "seeds": list(SEEDS),
        "layer": parts_curves(bench, "layer"),
        "block": parts_curves(bench, "block"),
        "expert, scope layer": expert_curves(bench, "layer"),
        "expert, scope global": expert_curves(bench, "global"),
    }
    results["seconds"] = round(time.perf_counter() - started, 1)
    return results


# The page

TITLES = {
    "layer": ("Layer Drop", "MoE layers dropped"),
    "block": ("Block Drop", "blocks dropped"),
    "expert, scope layer": ("Expert Drop, scope layer", "experts dropped per layer"),
    "expert, scope global": ("Expert Drop, scope global", "experts dropped per layer (mean)"),
}


def render(results: dict[str, Any]) -> None:
    """Write docs/quality.md and one plot per kind of drop."""
    intact = results["intact"]
    evaluation, calibration = results["evaluation"], results["calibration"]
    lines = [
        "# What each drop costs on the demo model",
        "",
        f"Held-out perplexity of the bundled demo model ({evaluation['sequences']} sequences of "
        f"{evaluation['length']} tokens) after dropping parts, without any finetuning. The intact model has "
        f"**{intact:.2f}**. Scores come from {calibration['sequences']} calibration sequences of "
        f"{calibration['length']} tokens (`kl`: {calibration['kl_sequences']} of them).",
        "",
        "A number with ± is the mean and half the range over three seeds: for `random` three random choices, for the "
        "others three disjoint calibration sets (greedy and consecutive: one set); no ± where the seeds choose the "
        "same parts. The lowest value of a column is bold.",
        "",
        f"Generated by `python benchmarks/quality.py --sequences {evaluation['sequences']}`; do not edit.",
        "",
        *_findings(results),
        "",
        "How often a method is better than the mean of `random`, and than `last`, over all numbers of dropped parts:",
        "",
        *_wins(results),
        "",
    ]
    for key, (title, unit) in TITLES.items():
        curves = results[key]
        plot = f"quality-{key.replace(', scope ', '-')}.png"
        _plot(curves, intact, title, unit, DOCS / plot)
        lines += [
            f"## {title}",
            "",
            f"![{title}: perplexity over {unit}]({plot})",
            "",
            *_table(curves, unit),
            "",
        ]
    (DOCS / "quality.md").write_text("\n".join(lines).rstrip() + "\n")


def _findings(results: dict[str, Any]) -> list[str]:
    lines = ["| drop | best scored | random | last |", "|---|---|---|---|"]
    for key, (title, _unit) in TITLES.items():
        curves = results[key]
        for count in sorted({str(c) for c in (1, 2, 4)} & set(curves["random"]), key=int):
            scored = {
                name: statistics.mean(c[count])
                for name, c in curves.items()
                if name not in ("random", "last")
            }
            best = min(scored, key=scored.get)
            random, last = (statistics.mean(curves[name][count]) for name in ("random", "last"))
            lines.append(f"| {title}, {count} | {scored[best]:.2f} (`{best}`) | {random:.2f} | {last:.2f} |")
    return lines


def _wins(results: dict[str, Any]) -> list[str]:
    lines = ["| drop | method | better than random | better than last |", "|---|---|---|---|"]
    for key, (title, _unit) in TITLES.items():
        curves = {name: [statistics.mean(v) for v in curve.values()] for name, curve in results[key].items()}
        for name, means in curves.items():
            if name in _BASELINES:
                continue
            wins = [
                f"{sum(ours < theirs for ours, theirs in zip(means, curves[base], strict=True))} of {len(means)}"
                for base in _BASELINES
            ]
            lines.append(f"| {title} | `{name}` | {' | '.join(wins)} |")
    return lines


def _table(curves: dict[str, dict[str, list[float]]], unit: str) -> list[str]:
    counts = sorted(curves["random"], key=int)
    means = {name: {c: statistics.mean(curve[c]) for c in counts} for name, curve in curves.items()}
    lowest = {c: min(values[c] for values in means.values()) for c in counts}
    lines = [f"| {unit} | {' | '.join(counts)} |", "|---|" + "---|" * len(counts)]
    for name, curve in curves.items():
        cells = []
        for c in counts:
            text = f"{means[name][c]:.4g}" if means[name][c] >= 1000 else f"{means[name][c]:.2f}"
            text = f"**{text}**" if means[name][c] == lowest[c] else text
            spread = (max(curve[c]) - min(curve[c])) / 2
            if spread >= 0.005:
                text += f" ± {spread:.0f}" if spread >= 10 else f" ± {spread:.2g}"
            cells.append(text)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


# Okabe and Ito's colours can be told apart with any kind of colour vision; markers repeat the distinction.
_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
_MARKERS = "os^Dv*"
_BASELINES = {"random": ("#000000", "x"), "last": ("#888888", "+")}


def _plot(
    curves: dict[str, dict[str, list[float]]], intact: float, title: str, unit: str, path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter, MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7.2, 4.5), dpi=110)
    styles = zip(_COLOURS, _MARKERS, strict=True)
    for name, curve in curves.items():
        baseline = name in _BASELINES
        colour, marker = _BASELINES[name] if baseline else next(styles)
        counts = sorted(map(int, curve))
        values = [curve[str(count)] for count in counts]
        means = [statistics.mean(value) for value in values]
        line = "--" if baseline else ":" if "greedy" in name else "-"
        axes.plot(counts, means, line, color=colour, marker=marker, label=name, markersize=6, linewidth=1.6)
        if any(len(value) > 1 for value in values):
            axes.fill_between(
                counts, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0
            )
    axes.axhline(intact, color="#444444", linewidth=1, label="intact")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=unit, ylabel="held-out perplexity (log scale)", title=f"{title} on the demo model")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only write the page from docs/quality.json")
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences to measure on")
    args = parser.parse_args()
    DOCS.mkdir(exist_ok=True)
    path = DOCS / "quality.json"
    if not args.render:
        path.write_text(json.dumps(measure_all(args.sequences), indent=1) + "\n")
    render(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
