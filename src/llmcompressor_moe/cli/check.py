"""`llmcompressor-moe check DIR`: is this checkpoint legal to serve?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompressor_moe.cli.errors import user_errors
from llmcompressor_moe.cli.options import AsJson

if TYPE_CHECKING:
    from llmcompressor_moe.check import CheckReport

LEGAL, ILLEGAL = 0, 1

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def check(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory, the one with config.json.")],
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", "-tp", min=1, help="Ranks that it shall be split over.")
    ] = 1,
    expert_parallel: Annotated[
        int, typer.Option("--expert-parallel", "-ep", min=1, help="Ranks that experts shall be spread over.")
    ] = 1,
    json: AsJson = False,
) -> None:
    """Say whether a checkpoint is legal to serve, without loading the model.

    Exit code 0: legal (warnings are possible); 1: illegal; 2: there is nothing to check.
    """
    # importing the rules takes seconds, which `--help` should not
    from llmcompressor_moe.check import check_checkpoint

    with user_errors():
        report = check_checkpoint(path, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel)
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        render(report, Console())
    raise typer.Exit(LEGAL if report.ok else ILLEGAL)


def render(report: "CheckReport", console: Console) -> None:
    """Print a report: what was read, a table of findings, the verdict."""
    facts = [report.model_type or "unknown architecture", f"{report.tensors} tensors", _size(report.nbytes)]
    if report.experts:
        facts.append(f"experts per MoE layer: {_counts(report.experts)}")
    console.print(Text(report.path, style="bold"))
    console.print(Text(", ".join(facts)))
    if report.findings:
        table = Table(show_lines=True, expand=True)
        table.add_column("", no_wrap=True)
        table.add_column("where", overflow="fold", ratio=2)
        table.add_column("what", overflow="fold", ratio=4)
        table.add_column("way out", overflow="fold", ratio=3)
        for finding in report.findings:
            severity = finding.severity.value
            # Text, not markup: names come from the checkpoint and may hold brackets
            table.add_row(
                Text(severity, style=_STYLES[severity]),
                Text(finding.subject),
                Text(f"{finding.message} ({finding.code})"),
                Text(finding.way_out),
            )
        console.print(table)
    if report.ok:
        console.print(Text("legal to serve", style="bold green"))
    else:
        console.print(Text(f"not legal to serve: {len(report.errors)} error(s)", style="bold red"))


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _counts(experts: dict[int, int]) -> str:
    counts = list(experts.values())
    if len(set(counts)) == 1:
        return f"{counts[0]} x {len(counts)}"
    return " ".join("-" if count == 0 else str(count) for count in counts)
