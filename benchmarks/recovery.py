"""How much of what compression cost can be won back, by which loss, and with how many tokens.

    python -m llmcompressor_moe.demo.train --cache build/packages --output build/demo --texts-only
    python benchmarks/recovery.py --text build/demo/text/train.txt --output build/recovery

Students are the demo model with a quarter of its MoE layers, a quarter of its blocks, or half of its experts dropped, and
the last one in 4 bit as well. Each is recovered with each mixture of losses and each seed; then each once for longer, for
the curve of gap closed against tokens. Runs that are there already are not done again. Writes recovery.json and PNGs.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from llmcompressor_moe.checkpoint.files import write_text
from llmcompressor_moe.compression import compress
from llmcompressor_moe.demo import DEMO_HELDOUT, DEMO_MODEL
from llmcompressor_moe.recovery import RecoverySettings, recover

STUDENTS: dict[str, dict[str, dict[str, Any]]] = {
    "layer-drop-2-of-8": {"LayerDropModifier": {"num_drop": 2}},
    "block-drop-2-of-8": {"BlockDropModifier": {"num_drop": 2}},
    "expert-drop-4-of-8": {"ExpertDropModifier": {"num_drop": 4}},
    "expert-drop-4-of-8-w4": {
        "ExpertDropModifier": {"num_drop": 4},
        "RouterAwareQuantModifier": {"schemes": ["W4A16"], "target_bits": 4.5, "attention_scheme": "W4A16"},
    },
}
MIXTURES: dict[str, dict[str, Any]] = {
    "next-token": {"weights": {"next_token": 1.0, "logits_kl": 0.0}},
    "logits-kl": {"weights": {"logits_kl": 1.0}},
    "logits-kl+router-kl": {"weights": {"logits_kl": 1.0, "router_kl": 0.1}},
    "logits-kl+router-kl+matching": {
        "weights": {"logits_kl": 1.0, "router_kl": 0.1, "hidden": 0.1, "expert_output": 0.1}
    },
    "router-only": {"weights": {"logits_kl": 1.0}, "train": ("router",), "learning_rate": 1e-2},
}
BEST = "logits-kl"
# Chosen by a few short runs on the calibration text, not on the held-out text.
COMMON = {"length": 256, "batch_size": 8, "learning_rate": 3e-3, "warmup": 0.1, "log_every": 20}
# A step must take a weight over half a step of its grid to change anything.
QUANTIZED_RATE = 4e-3


def student_at(name: str, folder: Path) -> Path:
    """Compress the demo model, if that has not been done."""
    path = folder / "students" / name
    if not path.exists():
        recipe = folder / f"{name}.yaml"
        write_text(recipe, yaml.safe_dump({"default_stage": {"default_modifiers": STUDENTS[name]}}))
        compress(DEMO_MODEL, recipe, "demo", path, num_samples=64, sequence_length=256)
    return path


def run(
    name: str, mixture: str, seed: int, steps: int, text: Path, folder: Path, looks_every: int | None = None
) -> dict[str, Any]:
    done = folder / "runs" / f"{name}.{mixture}.{steps}.{seed}.json"
    if done.exists():
        return json.loads(done.read_text())
    fields = {**COMMON, **MIXTURES[mixture]}
    if name.endswith("w4") and mixture != "router-only":
        fields["learning_rate"] = QUANTIZED_RATE
    settings = RecoverySettings(
        data=str(text),
        heldout=str(DEMO_HELDOUT),
        steps=steps,
        seed=seed,
        evaluate_every=looks_every or steps,
        save_every=steps,
        **fields,
    )
    found = recover(student_at(name, folder), folder / "recovered", teacher=DEMO_MODEL, settings=settings)
    start, end, teacher = found.start_nll, found.end_nll, found.teacher_nll
    curve = [
        (entry.tokens, entry.heldout_nll)
        for entry in found.log
        if getattr(entry, "heldout_nll", None) is not None
    ]
    result = {
        "student": name,
        "mixture": mixture,
        "seed": seed,
        "steps": steps,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "perplexity": [math.exp(value) for value in (start, end, teacher)],
        "gap_closed": found.gap_closed,
        "perplexity_won_back": (math.exp(start) - math.exp(end)) / (math.exp(start) - math.exp(teacher)),
        "curve": [
            (tokens, (math.exp(start) - math.exp(nll)) / (math.exp(start) - math.exp(teacher)))
            for tokens, nll in curve
        ],
    }
    write_text(done, json.dumps(result, indent=1))
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: share of the lost perplexity won back, mean over seeds with the range."""
    lines = [
        "| | " + " | ".join(MIXTURES) + " |",
        "| --- " * (len(MIXTURES) + 1) + "|",
    ]
    for name in STUDENTS:
        cells = []
        for mixture in MIXTURES:
            values = [
                100 * r["perplexity_won_back"]
                for r in results
                if r["student"] == name and r["mixture"] == mixture
            ]
            cells.append(
                f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else ""
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for result in results:
        tokens, won = zip(*[(0, 0.0), *result["curve"]], strict=True)
        axes.plot(
            [count / 1e6 for count in tokens],
            [100 * share for share in won],
            marker="o",
            markersize=3,
            label=result["student"],
        )
    axes.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="tokens seen (millions)", ylabel="lost perplexity won back (%)", ylim=(0, 105))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(
    text: Annotated[Path, typer.Option(help="Text to train on; not the held-out text.")],
    output: Annotated[Path, typer.Option(help="Folder for students, runs and results.")] = Path(
        "build/recovery"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps of 2048 tokens.")] = 30,
    long_steps: Annotated[int, typer.Option(help="The same for the curves.")] = 200,
    seeds: Annotated[int, typer.Option(help="Seeds per mixture.")] = 3,
    only: Annotated[str | None, typer.Option(help="One student.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure."""
    torch.set_num_threads(threads)
    names = [name for name in STUDENTS if only in (None, name)]
    results = [
        run(name, mixture, seed, steps, text, output)
        for seed in range(seeds)
        for name in names
        for mixture in MIXTURES
    ]
    curves = (
        [run(name, BEST, 0, long_steps, text, output, long_steps // 10) for name in names]
        if long_steps
        else []
    )
    write_text(output / "recovery.json", json.dumps({"runs": results, "curves": curves}, indent=1) + "\n")
    print(table(results))
    for result in curves:
        print(
            f"{result['student']}: {100 * result['perplexity_won_back']:.1f} % after {result['tokens']} tokens"
        )
    if curves:
        plot(curves, output / "recovery-tokens.png")


if __name__ == "__main__":
    typer.run(main)
