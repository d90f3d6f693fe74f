"""What mixed precision costs the bundled demo model: held-out perplexity per mean bits and sensitivity, and
trimming and quantizing together against each alone.

    python benchmarks/precision.py            # measures; writes docs/precision.json, the tables of docs/precision.md, plots
    python benchmarks/precision.py --render   # writes tables and plots again from docs/precision.json

Candidates are tried, budgets are spent and experts are rounded by the package; the model is then measured on
held-out text in fp32. `random` has five seeds; the sensitivities that look at data are repeated on three disjoint sets of
calibration samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor_moe.criteria import expert_criterion
from llmcompressor_moe.criteria.experts import ScoreInput
from llmcompressor_moe.demo import DEMO_MODEL, calibration_texts, heldout_rows, token_rows
from llmcompressor_moe.evaluation import perplexity
from llmcompressor_moe.plan import ExpertRoom, experts_to_drop
from llmcompressor_moe.profile import Statistic, collect_profile, divergence_without
from llmcompressor_moe.quantization.measure import LayerMeasurement
from llmcompressor_moe.quantization.planner import Planner, QuantSettings
from llmcompressor_moe.quantization.planning import Budget, choose_schemes
from llmcompressor_moe.quantization.schemes import resolve_schemes
from llmcompressor_moe.quantization.sensitivity import SENSITIVITIES, SensitivityInput
from llmcompressor_moe.quantization.trial import Trial
from llmcompressor_moe.surgery.session import TrimSession

DOCS = Path(__file__).resolve().parent.parent / "docs"
LENGTH, CALIBRATION, SETS = 256, 64, 3
BITS = (3.5, 4.5, 5.5, 6.5)
SCHEMES = ["W2A16", "W3A16", "W4A16", "W8A16", "UNQUANTIZED"]
RANDOM_SEEDS = range(5)
SHARES = (0.7, 0.6, 0.5, 0.4, 0.37, 0.35, 0.34, 0.33, 0.32)
# name -> (blocks, MoE layers, experts per layer) to drop
TRIMS = {
    "1 block": (1, 0, 0),
    "2 blocks": (2, 0, 0),
    "3 blocks": (3, 0, 0),
    "4 blocks": (4, 0, 0),
    "5 blocks": (5, 0, 0),
    "1 layer": (0, 1, 0),
    "2 layers": (0, 2, 0),
    "3 layers": (0, 3, 0),
    "4 layers": (0, 4, 0),
    "5 layers": (0, 5, 0),
    "1 expert": (0, 0, 1),
    "2 experts": (0, 0, 2),
    "3 experts": (0, 0, 3),
    "4 experts": (0, 0, 4),
    "5 experts": (0, 0, 5),
    "6 experts": (0, 0, 6),
    "1 block, 1 expert": (1, 0, 1),
    "1 layer, 1 expert": (0, 1, 1),
    "1 layer, 2 experts": (0, 1, 2),
}
TOGETHER = ("1 layer", "1 block", "1 expert", "2 experts", "1 layer, 1 expert")


def settings() -> QuantSettings:
    return QuantSettings(
        candidates=resolve_schemes(SCHEMES, None, "schemes"),
        attention=None,
        dense=None,
        target_bits=1.0,
        target_size=None,
        per_expert=False,
        ignore=["lm_head"],
        sensitivity="output_error",
        sample_tokens=256,
        seed=0,
    )


@dataclass
class Variant:
    """The demo model with some parts dropped: in fp32 to compute with, in bfloat16 to count bytes."""

    session: TrimSession
    stored: TrimSession
    heldout: torch.Tensor
    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    rounded: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    known: dict[str, float] = field(default_factory=dict)

    @property
    def planner(self) -> Planner:
        return Planner(self.session, settings())

    def sizes(self):
        return Planner(self.stored, settings()).sizes()

    def measure(self, batches: list[dict[str, torch.Tensor]]) -> dict[int, LayerMeasurement]:
        return self.planner.measure(batches, self.session.dropped_layers | self.session.dropped_blocks)

    def budget(self, nbytes: int) -> Budget:
        planner = Planner(self.stored, settings())
        return Budget(nbytes=nbytes, rest=planner.rest(), digits=planner._digits)

    def nbytes(self) -> int:
        """Of the checkpoint in 16 bit."""
        digits = Planner(self.stored, settings())._digits
        experts = sum(e["UNQUANTIZED"].on_disk(digits) for layer in self.sizes().values() for e in layer)
        return Planner(self.stored, settings()).rest() + experts

    def perplexity(self, chosen: dict[int, list[str]]) -> float:
        """Held-out perplexity with the experts rounded to their schemes."""
        key = json.dumps(sorted(chosen.items()))
        if key not in self.known:
            self._round(chosen)
            self.known[key] = perplexity(self.session.model, self.heldout)
        return self.known[key]

    @torch.no_grad()
    def _round(self, chosen: dict[int, list[str]]) -> None:
        candidates = {candidate.name: candidate for candidate in settings().candidates}
        for layer, names in chosen.items():
            for position, (expert, name) in enumerate(zip(self.session.experts(layer), names, strict=True)):
                path = f"{layer}.{position}"
                for leaf, weight in expert.named_parameters():
                    if f"{path}.{leaf}" not in self.plain:
                        self.plain[f"{path}.{leaf}"] = weight.clone()
                    weight.copy_(self.plain[f"{path}.{leaf}"])
                if candidates[name].scheme is None:
                    continue
                if (path, name) not in self.rounded:
                    trial = Trial(expert, candidates[name], torch.device("cpu"))
                    trial.run(expert, torch.zeros(0, 0))
                    for child, linear in trial._twin.named_children():
                        if isinstance(linear, nn.Linear):
                            self.rounded[path, f"{name}.{child}"] = linear.weight.clone()
                    self.rounded[path, name] = torch.ones(())
                for child, linear in expert.named_children():
                    if isinstance(linear, nn.Linear):
                        linear.weight.copy_(self.rounded[path, f"{name}.{child}"])


class Bench:
    """The demo model, its texts, and what the drops go by."""

    def __init__(self, sequences: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
        self.linear = linearize_moe(model)
        rows = heldout_rows(tokenizer, LENGTH)
        count = min(sequences, len(rows))
        self.heldout = torch.tensor([rows[i * len(rows) // count] for i in range(count)])
        texts = token_rows(tokenizer, calibration_texts(), LENGTH)
        self.batches = [
            [
                {
                    "input_ids": torch.tensor([row]),
                    "attention_mask": torch.ones(1, len(row), dtype=torch.long),
                }
                for row in texts[start::SETS][:CALIBRATION]
            ]
            for start in range(SETS)
        ]
        intact = TrimSession.begin(copy.deepcopy(self.linear))
        topology = intact.topology
        wanted = {Statistic.ROUTING, Statistic.OUTPUT}
        self.profile = collect_profile(intact.model, topology, self.batches[0], wanted)
        few = self.batches[0][:8]
        indices = [(index,) for index in topology.moe_layers]
        self.by_kl = {
            part: sorted(scores, key=scores.get)
            for part in ("block", "layer")
            if (scores := divergence_without(intact.model, topology, few, indices, part))
        }

    def variant(self, blocks: int = 0, layers: int = 0, experts: int = 0) -> Variant:
        """Drop blocks and MoE layers by KL, experts by REAP's score, as one recipe would."""
        model = copy.deepcopy(self.linear)
        stored = copy.deepcopy(self.linear).to(torch.bfloat16)
        sessions = [TrimSession.begin(model), TrimSession.begin(stored)]
        scores = {
            layer: expert_criterion("reap").score(
                ScoreInput(
                    profile=found, num_samples=self.profile.num_samples, weights=[], layer=layer, seed=0
                )
            )
            for layer, found in self.profile.experts.items()
        }
        rooms = {layer: ExpertRoom(8, 2, 1) for layer in scores}
        gone = experts_to_drop(scores, rooms, experts, "layer") if experts else {}
        for session in sessions:
            for index in self.by_kl["block"][:blocks]:
                session.drop_block(index)
            for index in [i for i in self.by_kl["layer"] if i in session.layers][:layers]:
                session.drop_layer(index)
            for layer, chosen in gone.items():
                if layer in session.layers:
                    session.drop_experts(layer, chosen)
        return Variant(*sessions, self.heldout)


def sensitivities(bench: Bench) -> dict:
    """Perplexity per granularity, mean bits and sensitivity; a list per seed or calibration set."""
    variant = bench.variant()
    sizes = variant.sizes()
    plain = {layer: ["UNQUANTIZED"] * len(experts) for layer, experts in sizes.items()}
    base = variant.perplexity(plain)
    measured = []
    for batches in bench.batches:
        variant.perplexity(plain)
        variant._round(plain)
        measured.append(variant.measure(batches))
    bits = {
        layer: {name: size.bits / size.weights for name, size in experts[0].items()}
        for layer, experts in sizes.items()
    }
    curves: dict = {}
    for granularity in ("layer", "expert"):
        for target in BITS:
            for name, how in SENSITIVITIES.items():
                runs = [(0, seed) for seed in RANDOM_SEEDS] if name == "random" else []
                runs = runs or [(s, 0) for s in range(SETS if how.needs_data else 1)]
                values = []
                for data, seed in runs:
                    errors = {
                        layer: how.errors(SensitivityInput(found, bits[layer], layer, seed))
                        for layer, found in measured[data].items()
                    }
                    chosen = choose_schemes(
                        sizes, errors, Budget(bits=target), per_expert=granularity == "expert"
                    )
                    values.append(variant.perplexity(chosen))
                curves.setdefault(granularity, {}).setdefault(str(target), {})[name] = values
                print(granularity, target, name, [round(value - base, 3) for value in values], flush=True)
    return {"base": base, "curves": curves}


def together(bench: Bench) -> dict:
    """Perplexity at equal size: trimmed alone, quantized alone, both."""
    whole = bench.variant()
    full = whole.nbytes()
    measured = {name: bench.variant(*TRIMS[name]) for name in TRIMS}
    alone = {}
    for name, variant in measured.items():
        chosen = {layer: ["UNQUANTIZED"] * len(experts) for layer, experts in variant.sizes().items()}
        alone[name] = (variant.nbytes(), variant.perplexity(chosen))
        print("trim", name, alone[name], flush=True)
    quantized = {"quantize alone": whole, **{name: measured[name] for name in TOGETHER}}
    errors, rows = {}, []
    for name, variant in quantized.items():
        variant.perplexity(
            {layer: ["UNQUANTIZED"] * len(experts) for layer, experts in variant.sizes().items()}
        )
        sizes = variant.sizes()
        errors[name] = {
            layer: SENSITIVITIES["output_error"].errors(SensitivityInput(found, {}, layer, 0))
            for layer, found in variant.measure(bench.batches[0]).items()
        }
    for share in SHARES:
        limit = int(full * share)
        fitting = {name: ppl for name, (size, ppl) in alone.items() if size <= limit}
        best_trim = min(fitting, key=fitting.get) if fitting else None
        row = {
            "share": share,
            "nbytes": limit,
            "trim": best_trim,
            "trim_perplexity": fitting.get(best_trim),
            "both": {},
        }
        for name, variant in quantized.items():
            sizes = variant.sizes()
            try:
                chosen = choose_schemes(sizes, errors[name], variant.budget(limit), per_expert=False)
            except ValueError:
                continue
            row["both"][name] = variant.perplexity(chosen)
        print(row, flush=True)
        rows.append(row)
    return {"full": full, "rows": rows}


# The page


def render(found: dict) -> None:
    """Write the plots, and the tables between their marks in docs/precision.md."""
    plot(found)
    page = DOCS / "precision.md"
    text = page.read_text()
    for name, lines in (("sensitivity", _sensitivity(found)), ("together", _together(found))):
        begin = f"<!-- {name}: begin -->"
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        text = "\n".join([f"{before}{begin}", *lines, f"{end}{after}"])
    page.write_text(text)


def _sensitivity(found: dict) -> list[str]:
    base = found["sensitivity"]["base"]
    lines = [
        "",
        f"Perplexity on {found['sequences']} held-out sequences of {LENGTH} tokens; the untouched model has {base:.2f}. "
        f"Candidates: {', '.join(SCHEMES)}, rounded to nearest. The tables show the increase of the perplexity: the "
        "mean, and in brackets the smallest and the largest over five seeds (`random`) or three disjoint sets of "
        f"{CALIBRATION} calibration sequences (where data is needed).",
    ]
    for granularity, by_bits in found["sensitivity"]["curves"].items():
        lines += ["", f"One scheme per {granularity}:", ""]
        lines += [
            "| mean bits | " + " | ".join(SENSITIVITIES) + " |",
            "| --- " * (len(SENSITIVITIES) + 1) + "|",
        ]
        for bits, by_name in by_bits.items():
            cells = [_cell([value - base for value in by_name[name]]) for name in SENSITIVITIES]
            lines.append(f"| {bits} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _together(found: dict) -> list[str]:
    rows = found["together"]["rows"]
    names = list(rows[0]["both"])
    lines = ["", "| size | trim alone | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for row in rows:
        trim = f"{row['trim_perplexity']:.2f} ({row['trim']})" if row["trim"] else "does not fit"
        both = [f"{row['both'][name]:.2f}" if name in row["both"] else "does not fit" for name in names]
        values = [row["both"][name] for name in names if name in row["both"]]
        both = [f"**{cell}**" if values and cell == f"{min(values):.2f}" else cell for cell in both]
        lines.append(
            f"| {row['share']:.0%} ({row['nbytes'] / 2**20:.2f} MiB) | {trim} | " + " | ".join(both) + " |"
        )
    return [*lines, ""]


def _cell(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1 or max(values) - min(values) < 5e-4:
        return f"{mean:.3f}"
    return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def plot(found: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = found["sensitivity"]["base"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, (granularity, by_bits) in zip(axes, found["sensitivity"]["curves"].items(), strict=True):
        for name in SENSITIVITIES:
            means = [statistics.mean(by_bits[str(bits)][name]) - base for bits in BITS]
            style = {"linewidth": 2.5} if name == "output_error" else {"linewidth": 1.2, "linestyle": "--"}
            axis.plot(BITS, means, marker="o", label=name, **style)
        axis.set(title=f"one scheme per {granularity}", xlabel="mean bits per expert weight")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("increase of perplexity")
    axes[0].set_yscale("symlog", linthresh=0.1)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(DOCS / "precision.png", dpi=110)
    figure, axis = pyplot.subplots(figsize=(7, 4))
    rows = found["together"]["rows"]
    for name in rows[0]["both"]:
        points = [(row["share"], row["both"][name]) for row in rows if name in row["both"]]
        axis.plot(
            *zip(*points, strict=True),
            marker="o",
            label=name if name == "quantize alone" else f"{name} + quantize",
        )
    points = [(row["share"], row["trim_perplexity"]) for row in rows if row["trim"]]
    axis.plot(*zip(*points, strict=True), marker="s", color="black", linestyle=":", label="trim alone")
    axis.set(xlabel="share of the model's bytes", ylabel="perplexity", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "precision-together.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    path = DOCS / "precision.json"
    if args.render:
        render(json.loads(path.read_text()))
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    bench = Bench(args.sequences)
    found = {
        "sequences": len(bench.heldout),
        "sensitivity": sensitivities(bench),
        "together": together(bench),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    render(found)


if __name__ == "__main__":
    main()
