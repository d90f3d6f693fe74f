"""`llmcompressor-moe evaluate BASE COMPRESSED...`: what was lost, and what it saves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli import messages
from llmcompressor_moe.cli.errors import user_errors
from llmcompressor_moe.cli.options import (
    AsJson,
    Device,
    Dtype,
    MaxKl,
    MaxPerplexityIncrease,
    MaxReplaced,
    MaxTokens,
    MinRoutingOverlap,
    MinTop1Agreement,
    Stride,
    Verbose,
    WindowBatch,
    WindowLength,
)
from llmcompressor_moe.sizes import bytes_text, count_text

if TYPE_CHECKING:
    from llmcompressor_moe.evaluation.report import BaseEvaluation, Evaluation

LIMIT_BROKEN = 1


def evaluate(
    base: Annotated[Path, typer.Argument(help="Directory of the model that the others were made from.")],
    compressed: Annotated[list[Path], typer.Argument(help="Directories of models made from it.")],
    text: Annotated[
        str,
        typer.Option(
            "--text",
            "-t",
            help='Text to measure on: "demo" (bundled), a .txt file (blank line between documents), a .jsonl '
            'file with "text", or a saved or named dataset.',
        ),
    ] = "demo",
    max_tokens: MaxTokens = 65536,
    length: WindowLength = None,
    stride: Stride = None,
    batch_size: WindowBatch = 1,
    routing_tokens: Annotated[int, typer.Option(min=1, help="Tokens on which routers are compared.")] = 8192,
    ranks: Annotated[
        list[int] | None,
        typer.Option("--ranks", min=1, help="Expert-parallel ranks to count all-to-all bytes for."),
    ] = None,
    dispatch_format: Annotated[
        str, typer.Option(help="How compressed models send tokens: 16-bit, fp8-per-token or fp8-per-group.")
    ] = "16-bit",
    speed: Annotated[bool, typer.Option("--speed", help="Measure prefill and decode, side by side.")] = False,
    speed_batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences at once.")] = None,
    prompt_length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens per prompt.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each prompt is continued by.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns per model that count.")] = 5,
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="Interpreter of vLLM's environment: speed and tasks are measured there, too."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task of lm-eval: a name or a YAML file.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    max_perplexity_increase: MaxPerplexityIncrease = None,
    max_kl: MaxKl = None,
    min_top1_agreement: MinTop1Agreement = None,
    min_routing_overlap: MinRoutingOverlap = None,
    max_replaced: MaxReplaced = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for everything, JSON.")] = None,
    json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model and models made from it, on the same text.

    Exit code 0: measured, all limits kept; 1: a limit is broken; 2: something has to be changed first.
    """
    from llmcompressor_moe.checkpoint.files import check_can_write_file, write_text
    from llmcompressor_moe.cli.logs import logs
    from llmcompressor_moe.evaluation.latency import SpeedSettings
    from llmcompressor_moe.evaluation.run import EvaluationSettings
    from llmcompressor_moe.evaluation.run import evaluate as run
    from llmcompressor_moe.limits import Limits

    with logs(verbose), user_errors(show_trace=verbose):
        if output is not None:
            check_can_write_file(output, [base, *compressed, text])
        settings = EvaluationSettings(
            source=text,
            max_tokens=max_tokens,
            length=length,
            stride=stride,
            batch_size=batch_size,
            routing_tokens=routing_tokens,
            ranks=tuple(ranks or ()),
            dispatch_format=dispatch_format,
            speed=SpeedSettings(
                batch_sizes=tuple(speed_batch or (1,)),
                prompt_lengths=tuple(prompt_length or (128,)),
                new_tokens=new_tokens,
                rounds=rounds,
            )
            if speed
            else None,
            vllm_python=vllm_python,
            tasks=tuple(task or ()),
            include_path=include_path,
            limit=limit,
            dtype=dtype,
            device=device,
            limits=Limits(
                max_perplexity_increase=max_perplexity_increase,
                max_kl=max_kl,
                min_top1_agreement=min_top1_agreement,
                min_routing_overlap=min_routing_overlap,
                max_replaced=max_replaced,
            ),
        )
        found = run(
            base,
            compressed,
            settings,
            announce=messages.step,
        )
        if output is not None:
            write_text(output, found.model_dump_json(indent=1) + "\n")
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        render(found, Console())
    if not found.ok:
        raise typer.Exit(LIMIT_BROKEN)


def render(found: "Evaluation", console: Console) -> None:
    """Print what was measured: quality, routing, cost, communication, broken limits."""
    console.print(_quality(found))
    if found.base.tasks:
        console.print(_tasks(found))
    if any(model.routing.layers for model in found.compressed):
        console.print(_routing(found))
    console.print(_cost(found))
    if any(model.communication for model in found.compressed):
        console.print(_communication(found))
    if found.speed:
        console.print(_speed(found))
    if any(model.recovery for model in found.compressed):
        console.print(_recovery(found))
    for engine, error in found.speed_errors.items():
        console.print(Text(f"speed in {engine} could not be measured: {error}", style="yellow"))
    for model in found.compressed:
        for broken in model.broken_limits:
            console.print(Text(f"limit broken by {_name(model)}: {broken}", style="bold red"), soft_wrap=True)
    if found.limits.any and found.ok:
        console.print(Text("no limit is broken", style="bold green"))


def _name(model: "BaseEvaluation") -> str:
    return Path(model.path).name


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", overflow="fold")
    return table


def _quality(found: "Evaluation") -> Table:
    table = _table(
        f"Quality ({found.base.text.tokens} tokens of {found.source})",
        ["model", "perplexity", "bits per byte", "KL from base", "top-1 as base"],
    )
    for model in (found.base, *found.compressed):
        agreed = getattr(model, "agreement", None)
        table.add_row(
            _name(model),
            f"{model.text.perplexity:.2f}",
            f"{model.text.bits_per_byte:.4f}",
            f"{agreed.mean_kl:.4f}" if agreed else "",
            f"{agreed.top1_agreement:.1%}" if agreed else "",
        )
    return table


def _recovery(found: "Evaluation") -> Table:
    table = _table(
        "Recovery (on its own held-out text, nats per token)",
        ["model", "tokens", "before", "after", "teacher", "gap closed"],
    )
    for model in found.compressed:
        curve = model.recovery
        if curve is not None:
            table.add_row(
                _name(model),
                f"{curve.tokens:,}",
                f"{curve.start_nll:.4f}",
                f"{curve.end_nll:.4f}",
                "" if curve.teacher_nll is None else f"{curve.teacher_nll:.4f}",
                "" if curve.gap_closed is None else f"{curve.gap_closed:.1%}",
            )
    return table


def _tasks(found: "Evaluation") -> Table:
    models = (found.base, *found.compressed)
    table = _table("Tasks of lm-eval", ["task", "metric", *map(_name, models)])
    scores = [{(one.task, one.metric): one for one in model.tasks} for model in models]
    for task, metric in scores[0]:
        values = [by_name[task, metric] for by_name in scores]
        table.add_row(
            task,
            metric,
            *(f"{one.value:.4f}" + (f" ± {one.stderr:.4f}" if one.stderr else "") for one in values),
        )
    return table


def _routing(found: "Evaluation") -> Table:
    columns = ["model, block", "experts", "overlap", "of those left", "all new", "KL", "load CV", "dead"]
    table = _table("Routing against the base", columns)
    for model in found.compressed:
        mean = model.routing.mean
        if mean is None:
            continue
        table.add_row(
            _name(model),
            "",
            *_figures(mean),
            f"{mean.load_cv_before:.2f} -> {mean.load_cv_after:.2f}",
            f"{mean.dead_before} -> {mean.dead_after}",
            style="bold",
        )
        for block, layer in model.routing.layers.items():
            one = layer.routing
            table.add_row(
                f"  {block}",
                str(len(layer.kept_experts)),
                *_figures(one),
                f"{one.load_cv_before:.2f} -> {one.load_cv_after:.2f}",
                f"{one.dead_before} -> {one.dead_after}",
            )
        for block in sorted({*model.routing.dropped_layers, *model.routing.dropped_blocks}):
            what = "block dropped" if block in model.routing.dropped_blocks else "MoE layer dropped"
            table.add_row(f"  {block}", what, style="dim")
    return table


def _figures(one: object) -> list[str]:
    return [
        "-" if (value := getattr(one, name)) is None else form.format(value)
        for name, form in (
            ("top_k_overlap", "{:.1%}"),
            ("top_k_overlap_kept", "{:.1%}"),
            ("replaced", "{:.1%}"),
            ("router_kl", "{:.4f}"),
        )
    ]


def _cost(found: "Evaluation") -> Table:
    flops, decode = found.base.cost.flops, found.base.cost.decode
    table = _table(
        "Cost",
        [
            "model",
            "size",
            "parameters",
            "active",
            *(f"FLOPs per token at {entry.context}" for entry in flops),
            *(f"read per step, batch {entry.batch} at {entry.context}" for entry in decode),
            *(f"speed-up that allows, batch {entry.batch}" for entry in decode),
        ],
    )
    for model in (found.base, *found.compressed):
        cost = model.cost
        table.add_row(
            _name(model),
            bytes_text(cost.nbytes + cost.header_nbytes),
            count_text(cost.parameters),
            count_text(cost.active_parameters),
            *(count_text(entry.total) for entry in cost.flops),
            *(bytes_text(round(entry.step)) for entry in cost.decode),
            *(f"{ours.step / theirs.step:.2f}" for ours, theirs in zip(decode, cost.decode, strict=True)),
        )
    return table


def _communication(found: "Evaluation") -> Table:
    columns = ["model", "ranks", "bytes per token", "was", "heaviest link", "was"]
    table = _table("Expert-parallel all-to-all, each vector once per rank", columns)
    for model in found.compressed:
        for compared in model.communication:
            before, after = compared.before.deduplicated, compared.after.deduplicated
            table.add_row(
                _name(model),
                str(compared.after.ranks),
                *(f"{sent.bytes_per_token:,.0f}" for sent in (after, before)),
                *(
                    f"{sent.heaviest_link.nbytes / compared.after.tokens:,.0f}" if sent.heaviest_link else "0"
                    for sent in (after, before)
                ),
            )
    return table


def _speed(found: "Evaluation") -> Table:
    columns = [
        "model, engine",
        "batch",
        "prompt",
        "prefill",
        "decode, tokens/s",
        "base",
        "reached",
        "bytes allow",
        "peak memory",
    ]
    table = _table("Speed, medians (quartiles)", columns)
    for compared in found.speed:
        ours, base = compared.compressed, compared.base
        decode, reached = ours.decode_tokens_per_second, compared.reached_quartiles
        table.add_row(
            f"{Path(ours.path).name}, {compared.engine}",
            str(ours.batch),
            str(ours.prompt_length),
            f"{1000 * ours.prefill_seconds.median:.1f} ms",
            f"{decode.median:.1f} ({decode.lower:.1f} to {decode.upper:.1f})",
            f"{base.decode_tokens_per_second.median:.1f}",
            f"{compared.reached_ratio:.2f} ({reached.lower:.2f} to {reached.upper:.2f})",
            f"{compared.bytes_ratio:.2f}",
            bytes_text(ours.peak_nbytes) if ours.peak_nbytes is not None else "-",
        )
    return table
