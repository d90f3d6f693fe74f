"""What pruning the demo model's experts costs: held-out perplexity by ratios per expert, algorithm and mean.

    python benchmarks/sparsity.py            # measures, then writes docs/sparsity.json and the tables of docs/sparsity.md
    python benchmarks/sparsity.py --render   # writes the tables again from docs/sparsity.json

Every number is one `oneshot` with an ExpertSparsityModifier on the calibration text, measured on the held-out text;
three disjoint sets of calibration samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from loguru import logger
from quality import CALIBRATION, DOCS, LENGTH, SEEDS, Bench
from transformers import AutoTokenizer

from llmcompressor_moe import ExpertSparsityModifier
from llmcompressor_moe.demo import DEMO_MODEL
from llmcompressor_moe.evaluation import perplexity
from llmcompressor_moe.profile import Profile
from llmcompressor_moe.sparsity.ratios import ratios_for_mean
from llmcompressor_moe.sparsity.report import SparsityReport
from llmcompressor_moe.topology import find_topology

# Multiples of 1/16, so that one ratio everywhere meets them exactly; Wanda rounds down to whole columns.
MEANS = (5 / 16, 8 / 16, 11 / 16)
RATIOS = ("uniform", "utilization", "sensitivity")
# What the two factors of an importance do alone.
CONTROLS = ("tokens alone", "layers alone")


@dataclass(frozen=True)
class Case:
    """One line of a table: what is asked for, but not the calibration set."""

    algorithm: str
    mask_structure: str
    mean: float
    ratios: str


CASES = [
    *[Case("wanda", "0:0", mean, ratios) for mean in MEANS for ratios in (*RATIOS, *CONTROLS)],
    *[Case("sparsegpt", "0:0", mean, ratios) for mean in MEANS[1:] for ratios in RATIOS],
    *[Case("wanda", "2:4", 0.25, ratios) for ratios in RATIOS],
    Case("wanda", "2:4", 0.5, "uniform"),
]


class Run:
    """Prunes copies of the demo model."""

    def __init__(self, sequences: int, folder: Path) -> None:
        self.bench = Bench.load(sequences)
        self._tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        self._folder = folder
        self._profiles: dict[int, Profile] = {}

    def __call__(self, case: Case, seed: int) -> dict[str, float]:
        """Perplexity, and what became zero."""
        report_path = self._folder / "report.json"
        settings = {"algorithm": case.algorithm, "mask_structure": case.mask_structure, "seed": seed}
        if case.ratios in CONTROLS:
            settings["plan_path"] = str(self._control(case, seed))
        else:
            settings |= {"sparsity": self._asked(case), "ratios": case.ratios}
        modifier = ExpertSparsityModifier(report_path=str(report_path), **settings)
        rows = [batch["input_ids"][0].tolist() for batch in self.bench.calibration[seed]]
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH] * len(rows)})
        model = oneshot(
            model=copy.deepcopy(self.bench.model),
            tokenizer=self._tokenizer,
            recipe=modifier,
            dataset=data,
            num_calibration_samples=len(rows),
            max_seq_length=LENGTH,
        )
        ratios = [r for row in SparsityReport.load(report_path).ratios.values() for r in row]
        return {
            "perplexity": perplexity(model, self.bench.heldout),
            "zeros": SparsityReport.load(report_path).mean,
            "lowest": min(ratios),
            "highest": max(ratios),
        }

    def _asked(self, case: Case) -> float:
        """The mean to ask for: what Wanda's rounding takes from ratios that differ, half a column, is put on top."""
        if case.algorithm != "wanda" or case.mask_structure != "0:0" or case.ratios == "uniform":
            return case.mean
        config = self.bench.model.config
        return case.mean + (2 * 0.5 / config.hidden_size + 0.5 / config.intermediate_size) / 3

    def _control(self, case: Case, seed: int) -> Path:
        profile = self._profiles.setdefault(seed, self.bench.profile(seed))
        importance = [
            float(count) if case.ratios == "tokens alone" else 1 - profile.layer_similarity[layer]
            for layer, experts in profile.experts.items()
            for count in experts.routed_tokens
        ]
        mean = self._asked(case)
        ratios = iter(ratios_for_mean(importance, [1] * len(importance), mean, mean / 2, (1 + mean) / 2))
        plan = SparsityReport(
            modifier="ExpertSparsityModifier",
            mask_structure=case.mask_structure,
            ratios={
                layer: [next(ratios) for _ in experts.routed_tokens]
                for layer, experts in profile.experts.items()
            },
        )
        path = self._folder / "plan.json"
        plan.save(path)
        return path


def damage_by_ratio(run: Run) -> dict[str, float]:
    """Increase of the mean negative log-likelihood by one ratio for all experts (Wanda, first calibration set)."""
    intact = math.log(perplexity(run.bench.model, run.bench.heldout))
    steps = [step / 16 for step in range(4, 14)]
    return {
        str(ratio): math.log(run(Case("wanda", "0:0", ratio, "uniform"), SEEDS[0])["perplexity"]) - intact
        for ratio in steps
    }


def measure(sequences: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    logger.disable("llmcompressor")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(sequences, Path(folder))
        results: dict[str, Any] = {
            "intact": perplexity(run.bench.model, run.bench.heldout),
            "evaluation": {"sequences": len(run.bench.heldout), "length": LENGTH},
            "calibration": {"sequences": CALIBRATION, "length": LENGTH},
            "seeds": list(SEEDS),
            "layers": len(find_topology(run.bench.linear).moe_layers),
            "damage": damage_by_ratio(run),
            "cases": [],
        }
        for case in CASES:
            runs = [run(case, seed) for seed in SEEDS]
            results["cases"].append(vars(case) | {"runs": runs})
            print(case, [round(one["perplexity"], 3) for one in runs], round(runs[0]["zeros"], 4), flush=True)
    results["seconds"] = round(time.perf_counter() - started, 1)
    return results


# The page

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def render(results: dict[str, Any]) -> None:
    """Write the tables into docs/sparsity.md, between its two marks."""
    page = DOCS / "sparsity.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{chr(10).join(_tables(results))}\n{END}{after}")


def _tables(results: dict[str, Any]) -> list[str]:
    evaluation, calibration = results["evaluation"], results["calibration"]
    lines = [
        "",
        f"Held-out perplexity of the demo model ({evaluation['sequences']} sequences of {evaluation['length']} tokens; "
        f"intact **{results['intact']:.2f}**), mean and half the range over {len(results['seeds'])} disjoint calibration "
        f"sets of {calibration['sequences']} sequences. Generated by `python benchmarks/sparsity.py --sequences "
        f"{evaluation['sequences']}`.",
        "",
        "| algorithm | structure | mean | ratios | zeros measured | lowest and highest ratio | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        values = [run["perplexity"] for run in case["runs"]]
        group = [
            statistics.mean(run["perplexity"] for run in other["runs"])
            for other in results["cases"]
            if all(other[key] == case[key] for key in ("algorithm", "mask_structure", "mean"))
        ]
        mean = statistics.mean(values)
        text = f"**{mean:.2f}**" if mean == min(group) and len(group) > 1 else f"{mean:.2f}"
        zeros = statistics.mean(run["zeros"] for run in case["runs"])
        low, high = (case["runs"][0][key] for key in ("lowest", "highest"))
        structure = "any" if case["mask_structure"] == "0:0" else case["mask_structure"]
        lines.append(
            f"| {case['algorithm']} | {structure} | {case['mean']:.4g} | `{case['ratios']}` | {zeros:.4f} | "
            f"{low:.2f}, {high:.2f} | {text} ± {(max(values) - min(values)) / 2:.2f} |"
        )
    damage = {float(ratio): value for ratio, value in results["damage"].items()}
    lines += [
        "",
        "Increase of the mean negative log-likelihood (nats per token) with one ratio for all experts, Wanda:",
        "",
        f"| ratio | {' | '.join(f'{ratio:.4g}' for ratio in damage)} |",
        "|---|" + "---|" * len(damage),
        f"| increase | {' | '.join(f'{value:.3f}' for value in damage.values())} |",
        "",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only write the tables from docs/sparsity.json")
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences to measure on")
    args = parser.parse_args()
    path = DOCS / "sparsity.json"
    if not args.render:
        path.write_text(json.dumps(measure(args.sequences), indent=1) + "\n")
    render(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
