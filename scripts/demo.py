"""What `make demo` runs: compress the bundled model, check, reload, serve with vLLM, print one table, draw others.

    .venv/bin/python scripts/demo.py [OUTPUT]

OUTPUT is out/demo unless told. Quantized experts have no kernel on most CPUs, so the same drops without
quantization are made as well, and that checkpoint is what vLLM serves here.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
# The model's matrices are 128 wide: more threads would only wait for each other, here and in vLLM.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor_moe import load_trimmed_moe
from llmcompressor_moe.cli.compress import render
from llmcompressor_moe.cli.logs import logs
from llmcompressor_moe.cli.sweep import render as render_points
from llmcompressor_moe.compression import CompressionSummary, compress
from llmcompressor_moe.demo import DEMO_MODEL, heldout_rows
from llmcompressor_moe.evaluation import perplexity
from llmcompressor_moe.evaluation.latency import SpeedSettings
from llmcompressor_moe.evaluation.run import EvaluationSettings
from llmcompressor_moe.evaluation.speed import measure_vllm
from llmcompressor_moe.evaluation.vllm_engine import VllmProcess
from llmcompressor_moe.inspection import inspect_model
from llmcompressor_moe.sizes import bytes_text, count_text
from llmcompressor_moe.sweep.grid import load_grid
from llmcompressor_moe.sweep.page import write_page
from llmcompressor_moe.sweep.plots import write_plots
from llmcompressor_moe.sweep.report import SweepReport
from llmcompressor_moe.sweep.run import SweepSettings, run_sweep

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "demo.yaml"
GRID = ROOT / "grids" / "quick.yaml"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PROMPTS, PROMPT_LENGTH, NEW_TOKENS, ROUNDS = 16, 32, 128, 8


@dataclass
class Column:
    """One model of the table; None where nothing was measured.

    :param perplexity: held-out text, transformers
    :param served_perplexity: the same in vLLM
    :param tokens_per_second: generated in vLLM, the time for the prompts counted
    """

    name: str
    nbytes: int
    parameters: int
    active: int
    perplexity: float
    served_perplexity: float | None = None
    tokens_per_second: float | None = None


def without_quantization(recipe: Path, target: Path) -> Path:
    """The same recipe with its drops only."""
    content = yaml.safe_load(recipe.read_text())
    modifiers = content["default_stage"]["default_modifiers"]
    content["default_stage"]["default_modifiers"] = {
        name: fields for name, fields in modifiers.items() if name.endswith("DropModifier")
    }
    target.write_text(yaml.safe_dump(content, sort_keys=False))
    return target


def make(recipe: Path, target: Path, console: Console) -> CompressionSummary:
    """One compression, told step by step."""
    console.rule(f"{recipe.name} -> {target.name}", align="left")
    with logs(verbose=False):
        summary = compress(
            DEMO_MODEL,
            recipe,
            "demo",
            target,
            num_samples=64,
            sequence_length=256,
            announce=lambda step: console.print(f"- {step}", style="cyan", highlight=False),
        )
    render(summary, console)
    return summary


def measure(name: str, path: Path, rows: torch.Tensor) -> Column:
    """Reload a checkpoint in transformers and measure it."""
    with load_trimmed_moe():
        model = AutoModelForCausalLM.from_pretrained(path)
    inspection = inspect_model(path)
    return Column(
        name=name,
        nbytes=inspection.on_disk,
        parameters=inspection.parameters,
        active=inspection.active_parameters,
        perplexity=perplexity(model, rows),
    )


def serve(models: Sequence[Path], columns: Sequence[Column], rows: torch.Tensor) -> None:
    """Measure checkpoints in vLLM, in its own environment, and fill their columns.

    :raises VllmError: vLLM failed; with the end of its log
    """
    for model, column in zip(models, columns, strict=True):
        room = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_memory_bytes": 2**28}
        with VllmProcess(model, VLLM_PYTHON, room) as engine:
            column.served_perplexity = math.exp(engine.negative_log_likelihood(rows.tolist()))
    settings = SpeedSettings(
        batch_sizes=(PROMPTS,), prompt_lengths=(PROMPT_LENGTH,), new_tokens=NEW_TOKENS, rounds=ROUNDS
    )
    latencies = measure_vllm(models, settings, python=VLLM_PYTHON, prompts=rows)
    for latency, column in zip(latencies, columns, strict=True):
        column.tokens_per_second = latency.tokens_per_second.median


def table(columns: Sequence[Column]) -> Table:
    """Before and after, side by side."""
    shown = Table(title="The bundled demo model, before and after", title_justify="left")
    shown.add_column("")
    for column in columns:
        shown.add_column(column.name, justify="right")

    def row(label: str, texts: list[str]) -> None:
        shown.add_row(label, *texts)

    row("size on disk", [bytes_text(column.nbytes) for column in columns])
    row("parameters", [count_text(column.parameters) for column in columns])
    row("active per token", [count_text(column.active) for column in columns])
    row("held-out perplexity, transformers", [f"{column.perplexity:.2f}" for column in columns])
    row("held-out perplexity, vLLM", [_or_dash(column.served_perplexity, ".2f") for column in columns])
    row("tokens/s, vLLM", [_or_dash(column.tokens_per_second, ".0f") for column in columns])
    return shown


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def try_others(output: Path) -> SweepReport:
    """A few other cuts, measured and drawn; what an earlier demo left there goes."""
    shutil.rmtree(output, ignore_errors=True)
    evaluation = EvaluationSettings(max_tokens=8192, length=256, stride=256, batch_size=8, dtype="float32")
    settings = SweepSettings(num_samples=32, kl_samples=8, evaluation=evaluation)
    report = run_sweep(DEMO_MODEL, load_grid(GRID), output, settings)
    write_page(report, output / "report.html")
    write_plots(report, output)
    return report


def main(output: Path) -> None:
    """Everything, in order."""
    console = Console()
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    quantized, unquantized = output / "drops-w4a16", output / "drops"
    made = make(RECIPE, quantized, console)
    plain = make(without_quantization(RECIPE, output / "drops.yaml"), unquantized, console)
    if [report.dropped for report in made.reports] != [report.dropped for report in plain.reports]:
        raise RuntimeError("the recipe with and the one without quantization dropped different parts")
    console.rule("reload in transformers", align="left")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rows = torch.tensor(heldout_rows(tokenizer, 256))
    named = [("original", DEMO_MODEL), ("drops", unquantized), ("drops + W4A16", quantized)]
    with logs(verbose=False):
        columns = [measure(name, path, rows) for name, path in named]
    console.rule("serve with vLLM (two minutes)", align="left")
    serve([DEMO_MODEL, unquantized], columns[:2], rows)
    console.print(table(columns))
    console.print(
        "- : most CPUs have no kernel for quantized experts; vLLM serves that checkpoint on GPUs.",
        highlight=False,
    )
    (output / "table.json").write_text(json.dumps([asdict(column) for column in columns], indent=2) + "\n")
    console.rule(f"other cuts ({GRID.name})", align="left")
    with logs(verbose=False):
        render_points(try_others(output / "sweep"), console)
    console.print(f"open {output / 'sweep' / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "demo")
