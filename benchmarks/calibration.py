"""What a calibration pass costs: ours for the three drops and for trying schemes, a bare forward's, upstream's
REAPPruningModifier's.

    python benchmarks/calibration.py                 # writes docs/benchmarks.json and docs/benchmarks.md
    python benchmarks/calibration.py --device cuda --dtype bfloat16 --layers 24 --hidden 2048 --length 2048

Each measurement is a process of its own; the variants take turns, so that a busy machine slows all of them alike,
and the ratios are taken within one round. The models are Mixtrals with random weights: one of few large experts in
float32, one of many small experts in bfloat16, as most are released.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
VARIANTS = {
    "bare": "bare forward, stock transformers model (fused experts)",
    "ours": "Layer, Block and Expert Drop (criterion reap) in one recipe",
    "sensitivity": "RouterAwareQuantModifier: trying W4A16 and W8A16 on every expert",
    "upstream": "upstream's REAPPruningModifier, default oneshot",
    "upstream-routed": "the same with moe_calibrate_all_experts=False",
}
TARGETS = {
    "coarse": {("ours", "bare"): 1.3, ("ours", "upstream"): 0.35, ("sensitivity", "bare"): 2.5},
    "fine-grained": {("ours", "bare"): 0.3},
}
SHAPES: dict[str, dict[str, Any]] = {
    "coarse": {
        "hidden": 512,
        "intermediate": 1024,
        "layers": 8,
        "experts": 16,
        "top_k": 2,
        "sequences": 8,
        "length": 512,
        "dtype": "float32",
        "variants": list(VARIANTS),
    },
    "fine-grained": {
        "hidden": 512,
        "intermediate": 256,
        "layers": 8,
        "experts": 64,
        "top_k": 4,
        "sequences": 16,
        "length": 256,
        "dtype": "bfloat16",
        "variants": ["bare", "ours"],
    },
}
_SIZES = ("hidden", "intermediate", "layers", "experts", "top_k", "sequences", "length")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the shape's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="instead of the shape's own")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="instead of the shape's own")
    parser.add_argument(
        "--output", type=Path, default=DOCS / "benchmarks.json", help="JSON; the page goes beside it"
    )
    parser.add_argument("--render", action="store_true", help="only write the page from the JSON")
    parser.add_argument("--measure", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def of_shape(args: argparse.Namespace, shape: str) -> argparse.Namespace:
    """The arguments, completed by a shape."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**SHAPES[shape] | given)


# One measurement, in its own process


def build(args: argparse.Namespace, directory: str) -> None:
    """Save a random Mixtral and a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 256),
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=args.length,
    )
    MixtralForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(4096)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0").save_pretrained(directory)


class Meter:
    """Wall time and peak memory of the code in its context."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = self.cpu_seconds = self.peak = self.before = 0.0

    def __enter__(self) -> Meter:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            # Linux: forget the peak so far.
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        self.started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started[0]
        self.cpu_seconds = time.process_time() - self.started[1]
        self.peak = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else _status("VmHWM")

    def result(self) -> dict[str, float]:
        """Seconds and MiB."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "memory_before_mib": self.before,
            "memory_peak_mib": self.peak,
        }


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run one variant and return its numbers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    ids = torch.randint(1, 4096, (args.sequences, args.length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids[:1, :64].to(args.device), use_cache=False)
    if args.measure == "bare":
        with Meter(args.device) as meter, torch.no_grad():
            for row in ids:
                row = row[None].to(args.device)
                model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
        return {"pass": meter.result()}
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    settings = {
        "model": model,
        "dataset": data,
        "tokenizer": AutoTokenizer.from_pretrained(args.model),
        "num_calibration_samples": len(ids),
        "max_seq_length": args.length,
    }
    how = {"ours": measure_ours, "sensitivity": measure_sensitivity}.get(args.measure, measure_upstream)
    return how(args, settings)


def measure_ours(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    from llmcompressor import oneshot

    from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
    from llmcompressor_moe.modifiers import base

    meter = Meter(args.device)
    calls: list[int] = []
    base.collect_profile = _metered(base.collect_profile, meter, calls)
    started = time.perf_counter()
    recipe = [
        LayerDropModifier(num_drop=1),
        BlockDropModifier(num_drop=1),
        ExpertDropModifier(num_drop=args.experts // 4, criterion="reap"),
    ]
    oneshot(recipe=recipe, **settings)
    if len(calls) != 1:
        raise RuntimeError(f"the three drops took {len(calls)} passes instead of one")
    return {"pass": meter.result(), "oneshot_seconds": time.perf_counter() - started}


def measure_sensitivity(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    from llmcompressor import oneshot

    from llmcompressor_moe import RouterAwareQuantModifier
    from llmcompressor_moe.quantization import heldout
    from llmcompressor_moe.quantization.planner import Planner

    meter = Meter(args.device)
    calls: list[int] = []
    Planner.measure = _metered(Planner.measure, meter, calls)
    # Nothing held out: the ratio is over the same data.
    heldout.split_held_out = lambda batches: (list(batches), [], False)
    started = time.perf_counter()
    oneshot(recipe=RouterAwareQuantModifier(target_bits=6.0), **settings)
    if len(calls) != 1:
        raise RuntimeError(f"schemes were tried {len(calls)} times instead of once")
    return {"pass": meter.result(), "oneshot_seconds": time.perf_counter() - started}


def measure_upstream(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

    meter = Meter(args.device)
    calls: list[int] = []
    SequentialPipeline.__call__ = staticmethod(_metered(SequentialPipeline.__call__, meter, calls))
    started = time.perf_counter()
    oneshot(
        recipe=REAPPruningModifier(sparsity=0.25),
        moe_calibrate_all_experts=args.measure == "upstream",
        **settings,
    )
    if len(calls) != 1:
        raise RuntimeError(f"upstream took {len(calls)} sequential passes instead of one")
    return {"pass": meter.result(), "oneshot_seconds": time.perf_counter() - started}


def _metered(function: Callable[..., Any], meter: Meter, calls: list[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        with meter:
            return function(*args, **kwargs)

    return wrapped


# All measurements


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Take turns, each variant in a fresh process."""
    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        build(args, directory)
        for number in range(args.rounds):
            # Another order each round, so that no variant always follows the same one.
            shift = number % len(args.variants)
            order = args.variants[shift:] + args.variants[:shift]
            taken = {variant: _in_process(args, variant, directory) for variant in order}
            rounds.append(taken)
            seconds = {variant: round(taken[variant]["pass"]["seconds"], 2) for variant in args.variants}
            print(f"round {number + 1}: {seconds}", flush=True)
    shape = (*_SIZES, "threads", "device", "dtype")
    return {"settings": {name: getattr(args, name) for name in shape}, "rounds": rounds}


def _in_process(args: argparse.Namespace, variant: str, model: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", variant, "--model", model]
    for name in (*_SIZES, "threads", "device", "dtype"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# The page


def ratios(results: dict[str, Any], over: str, under: str, clock: str = "seconds") -> list[float]:
    return [r[over]["pass"][clock] / r[under]["pass"][clock] for r in results["rounds"]]


def flops(settings: dict[str, Any]) -> tuple[float, float]:
    """TFLOP for routed tokens, and with every expert run on every token (a multiply-add counts as two)."""
    tokens = settings["sequences"] * settings["length"]
    hidden, heads = settings["hidden"], max(1, settings["hidden"] // 256) * 64
    attention = 2 * hidden * (2 * hidden + 2 * heads) + 2 * 2 * settings["length"] * hidden
    expert = 2 * 3 * hidden * settings["intermediate"]

    def total(experts: int) -> float:
        return tokens * settings["layers"] * (attention + experts * expert) / 1e12

    return total(settings["top_k"]), total(settings["experts"])


def render(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the page, a section per shape."""
    lines = [
        "# What a calibration pass costs",
        "",
        "Mixtrals with random weights, batch size 1. Each measurement is a process of its own, variants take turns; "
        "medians. On a machine that others use at the same time the CPU time says more than the wall time; a target "
        "counts as met when both meet it.",
        "",
        *(line for shape, found in results.items() for line in _section(shape, found)),
        "Generated by `python benchmarks/calibration.py` from the JSON beside this page; do not edit.",
    ]
    path.write_text("\n".join(lines) + "\n")


def _section(shape: str, results: dict[str, Any]) -> list[str]:
    s, rounds = results["settings"], results["rounds"]
    variants = [variant for variant in VARIANTS if variant in rounds[0]]
    return [
        f"## {shape.capitalize()} experts, {s['dtype']}",
        "",
        f"{s['layers']} blocks, hidden size {s['hidden']}, {s['experts']} experts of intermediate size "
        f"{s['intermediate']}, top-{s['top_k']}; {s['sequences']} sequences of {s['length']} tokens; {s['device']}, "
        f"threads: {s['threads']}; {len(rounds)} rounds.",
        "",
        "| variant | pass, s | over bare | pass, CPU s | over bare | whole oneshot, s | before the pass, MiB | "
        "added by the pass, MiB |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(variant, results) for variant in variants),
        "",
        "| ratio | wall time, median | lowest to highest | CPU time, median | target | |",
        "|---|---|---|---|---|---|",
        *(
            _verdict(over, under, target, results)
            for (over, under), target in TARGETS[shape].items()
            if over in variants and under in variants
        ),
        "",
        _limit(shape, s),
        "",
    ]


def _limit(shape: str, settings: dict[str, Any]) -> str:
    """What bounds the pass from below."""
    routed, everything = flops(settings)
    if shape == "fine-grained":
        return (
            "A bare forward is not the limit here. It reads all experts for every sample, gives each of them a few "
            "tokens at a time, and multiplies in bfloat16, which a CPU without 16-bit units emulates. The pass reads "
            "weights once, gives an expert the tokens of all samples together, and multiplies in float32: the limit "
            f"is {routed:.2f} TFLOP at the float32 speed of the machine."
        )
    return (
        "The physical limit is the bare forward: no statistic can be had without it. Its Linears and attention "
        f"are {routed:.2f} TFLOP for routed tokens; upstream's default sends every token through every expert, "
        f"{everything:.2f} TFLOP ({everything / routed:.1f} times as much), and runs each block once more to pass "
        "on what pruning changed. Ours computes routed tokens only, once, and skips the LM head; it adds two "
        "cosines and one norm per token and block, and a loop over experts in place of one fused kernel. Trying "
        "schemes is the same pass, and after it, per expert and scheme, one rounding of its weights and one run on "
        "at most 256 of its tokens: with more data the pass alone is left."
    )


def _row(variant: str, results: dict[str, Any]) -> str:
    runs = [taken[variant] for taken in results["rounds"]]
    passes = [run["pass"] for run in runs]
    whole = [run["oneshot_seconds"] for run in runs if "oneshot_seconds" in run]
    cells = [
        f"{statistics.median(p['seconds'] for p in passes):.2f}",
        f"{statistics.median(ratios(results, variant, 'bare')):.2f}",
        f"{statistics.median(p['cpu_seconds'] for p in passes):.2f}",
        f"{statistics.median(ratios(results, variant, 'bare', 'cpu_seconds')):.2f}",
        f"{statistics.median(whole):.2f}" if whole else "",
        f"{statistics.median(p['memory_before_mib'] for p in passes):.0f}",
        f"{statistics.median(p['memory_peak_mib'] - p['memory_before_mib'] for p in passes):.0f}",
    ]
    return f"| {VARIANTS[variant]} | {' | '.join(cells)} |"


def _verdict(over: str, under: str, target: float, results: dict[str, Any]) -> str:
    wall, cpu = ratios(results, over, under), ratios(results, over, under, "cpu_seconds")
    median = statistics.median(wall)
    spread = f"{min(wall):.2f} to {max(wall):.2f}"
    verdict = "met" if max(median, statistics.median(cpu)) <= target else "missed"
    cells = [f"{median:.2f}", spread, f"{statistics.median(cpu):.2f}", f"at most {target}", verdict]
    return f"| {over} / {under} | {' | '.join(cells)} |"


def main() -> None:
    args = options()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.render:
        known = json.loads(args.output.read_text()) if args.output.exists() else {}
        known |= {shape: run(of_shape(args, shape)) for shape in args.shapes}
        args.output.write_text(json.dumps(known, indent=1) + "\n")
    render(json.loads(args.output.read_text()), args.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
