"""`llmcompressor-moe recover STUDENT --teacher BASE --data TEXT --output OUT`: win back what compression cost."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli import messages
from llmcompressor_moe.cli.errors import error_line, user_errors
from llmcompressor_moe.cli.options import AsJson, Dtype, OutputDirectory, Verbose

if TYPE_CHECKING:
    from llmcompressor_moe.recovery.progress import LogEntry
    from llmcompressor_moe.recovery.run import RecoveryReport

NOT_LEGAL = 1


def recover(
    student: Annotated[Path, typer.Argument(help="Directory of the compressed model.")],
    output: OutputDirectory,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Directory of the model that it was made from.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help='Text to train on: "demo" (bundled), a .txt file (blank line between documents), a .jsonl file '
            'with "text", a directory written by datasets.save_to_disk, or NAME or NAME:SPLIT of a dataset.',
        ),
    ] = "demo",
    heldout: Annotated[
        str | None,
        typer.Option("--text", "-t", help="Text to measure on. Defaults to a share of the data."),
    ] = None,
    max_heldout_tokens: Annotated[int, typer.Option(help="Tokens to measure on, at most.")] = 32768,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT of a loss: next_token, logits_kl, router_kl, expert_output, hidden, load_balancing. "
            "Defaults to logits_kl=1."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of logits_kl.")] = 1.0,
    train: Annotated[
        list[str] | None,
        typer.Option(help="What trains: router, norms, experts, attention, lora, or all. Defaults to all."),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Their weight, times rank.")] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="Where they are: attention, experts, router. Defaults to attention."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; as --epochs tells unless given.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="How often each row is taken.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass and rank.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="The highest.")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    max_gradient_norm: Annotated[float, typer.Option(help="Larger gradients are scaled down.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the order of rows and of new adapters.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the weights in training: auto, bfloat16 or float32.")
    ] = "float32",
    teacher_dtype: Dtype = "auto",
    precision: Annotated[str | None, typer.Option(help="bf16 or fp16: mixed precision.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, one forward more.")
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", "-r", help="Recipe with modifiers that work while a model trains."),
    ] = None,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros/--fill-zeros", help="Keep what is pruned pruned.")
    ] = True,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the teacher's likeliest tokens: it is then not in memory in training."
        ),
    ] = None,
    cache_top: Annotated[int, typer.Option(help="Tokens that are kept per position.")] = 64,
    log_every: Annotated[int, typer.Option(help="Steps per line of the log.")] = 10,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between looks at held-out text; a tenth.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints to resume from; a tenth.")
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Train on the CPU though there is an accelerator.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUTPUT.training if a run was interrupted.")
    ] = False,
    json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Finetune a compressed model towards the one it was made from, and write it as the same kind of checkpoint.

    Several GPUs: `torchrun --nproc-per-node N --no-python llmcompressor-moe recover ...`. Exit code 0: written; 1:
    the result would not be legal to serve; 2: something has to be changed first, or a loss became NaN.
    """
    from llmcompressor_moe.check.report import IllegalCheckpointError
    from llmcompressor_moe.cli.logs import logs

    with logs(verbose), user_errors(show_trace=verbose):
        try:
            from llmcompressor_moe.recovery.run import recover as run
            from llmcompressor_moe.recovery.settings import RecoverySettings
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is not installed, and training needs it: pip install llmcompressor-moe[recover]"
            ) from error
        settings = RecoverySettings(
            data=data,
            heldout=heldout,
            max_heldout_tokens=max_heldout_tokens,
            length=length,
            weights=_weights(loss or ["logits_kl=1"], temperature),
            train=tuple(train or ("all",)),
            lora=_lora(lora_rank, lora_alpha, lora_target),
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            learning_rate=learning_rate,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            max_gradient_norm=max_gradient_norm,
            seed=seed,
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            recipe=recipe,
            keep_zeros=keep_zeros,
            cache=cache,
            cache_top=cache_top,
            log_every=log_every,
            evaluate_every=evaluate_every,
            save_every=save_every,
            use_cpu=cpu,
        )
        try:
            found = run(
                student,
                output,
                teacher=teacher,
                settings=settings,
                resume=resume,
                announce=messages.step,
                report=lambda entry: messages.remark(entry_line(entry)),
            )
        except IllegalCheckpointError as error:
            messages.failure(error_line(error))
            raise typer.Exit(NOT_LEGAL) from None
        finally:
            _leave_ranks()
    if os.environ.get("RANK", "0") != "0":
        return
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        render(found, Console())


def _leave_ranks() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _weights(losses: Sequence[str], temperature: float) -> dict[str, Any]:
    """Exactly the losses that are named; the others do not count."""
    from llmcompressor_moe.recovery.weights import LossWeights

    known = [name for name in LossWeights.model_fields if name != "temperature"]
    weights = dict.fromkeys(known, 0.0)
    for given in losses:
        name, _, value = given.partition("=")
        if name not in known:
            raise ValueError(
                f"--loss {given!r}: there is no loss {name!r}; choose some of {', '.join(known)}."
            )
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(f"--loss {given!r}: give a number as weight, such as {name}=1.") from None
    return {**weights, "temperature": temperature}


def _lora(rank: int | None, alpha: float | None, targets: Sequence[str] | None) -> dict[str, Any] | None:
    given = {"rank": rank, "alpha": alpha, "targets": tuple(targets) if targets else None}
    return {name: value for name, value in given.items() if value is not None} or None


def entry_line(entry: "LogEntry") -> str:
    """A line of the log for people."""
    told = [f"step {entry.step}", f"{entry.tokens:,} tokens"]
    if entry.loss is not None:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in entry.parts.items())
        told.append(f"loss {entry.loss:.4g} ({parts})" if len(entry.parts) > 1 else f"loss {entry.loss:.4g}")
    if entry.heldout_nll is not None:
        told.append(f"held-out {entry.heldout_nll:.4f} nats")
    if entry.gap_closed is not None:
        told.append(f"gap closed {entry.gap_closed:.0%}")
    return "  ".join(told)


def render(found: "RecoveryReport", console: Console) -> None:
    """Print what was won back, and the next command."""
    from llmcompressor_moe.evaluation.likelihood import perplexity_of

    table = Table(title=Text(found.output), title_justify="left", title_style="bold")
    for column in ("held-out text", "nats per token", "perplexity"):
        table.add_column(column, justify="left" if column == "held-out text" else "right")
    rows = (("before", found.start_nll), ("after", found.end_nll), ("teacher", found.teacher_nll))
    for name, nll in rows:
        if nll is not None:
            table.add_row(name, f"{nll:.4f}", f"{perplexity_of(nll):.2f}")
    console.print(table)
    if found.gap_closed is not None:
        console.print(Text(f"gap closed: {found.gap_closed:.1%}", style="bold green"))
    console.print(
        Text(
            f"trained {found.trained_parameters:,} of {found.total_parameters:,} parameters on {found.tokens:,} "
            f"tokens in {found.seconds:.0f} s"
        ),
        soft_wrap=True,
    )
    # What evaluate compares is MoE models.
    compared = found.teacher is not None and found.moe_layers
    command = f"evaluate {found.teacher}" if compared else "check"
    console.print(Text("next:", style="bold"))
    console.print(Text(f"  llmcompressor-moe {command} {found.output}"), soft_wrap=True)
