"""Runs all rules over one checkpoint directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from llmcompressor_moe.check import experts, foreign, mtp, per_layer, quantization, stack
from llmcompressor_moe.check.comparison import compare, report_rest
from llmcompressor_moe.check.config import (
    CONFIG_NAME,
    ReadConfig,
    first_line,
    implausible,
    parse_config,
    read_raw_config,
)
from llmcompressor_moe.check.demand import plain_demand, quantized_demand
from llmcompressor_moe.check.expected import ExpectedModel, lay_out
from llmcompressor_moe.check.files import check_files, check_tokenizer
from llmcompressor_moe.check.parallel import check_parallel
from llmcompressor_moe.check.report import CheckReport, Findings
from llmcompressor_moe.check.schemes import read_schemes
from llmcompressor_moe.checkpoint.config_parts import raw_text_config
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, read_layout


def check_checkpoint(path: str | Path, *, tensor_parallel: int = 1, expert_parallel: int = 1) -> CheckReport:
    """Judge whether the checkpoint directory `path` is legal to serve.

    `tensor_parallel` and `expert_parallel` name the numbers of ranks that it shall be split over.

    Raises:
        NotADirectoryError: `path` is not a directory.
        ValueError: a number of ranks under 1. What is wrong with the files is a finding, no exception.
    """
    for name, ranks in (("tensor_parallel", tensor_parallel), ("expert_parallel", expert_parallel)):
        if ranks < 1:
            raise ValueError(f"{name}={ranks}: give the number of ranks, at least 1")
    root = Path(path)
    findings = Findings()
    layout = read_layout(root)
    report = CheckReport(path=str(root), tensors=len(layout.tensors), nbytes=layout.nbytes)
    with _quiet():
        complete = check_files(layout, findings)
        config = _read_config(root, findings)
        if config is not None:
            report.model_type = config.text.model_type
            sound = per_layer.check_meaning(config, findings)
            expected = _lay_out(config, layout, sound, findings)
            if expected is not None:
                report.experts = _experts(config, expected)
                _check_model(config, expected, layout, complete, tensor_parallel, expert_parallel, findings)
        check_tokenizer(root, findings)
    report.findings = sorted(findings.all, key=lambda f: ("error", "warning", "note").index(f.severity.value))
    return report


@contextmanager
def _quiet() -> Iterator[None]:
    """Readers' own warnings would stand beside the findings that say the same."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _read_config(root: Path, findings: Findings) -> ReadConfig | None:
    raw = read_raw_config(root, findings)
    if raw is None:
        return None
    raw_text = raw_text_config(raw)
    per_layer.check_opt_out(raw, findings)
    stack.check_layer_lists(raw_text, findings)
    if implausible(raw, findings) or not per_layer.check_shape(raw, raw_text, findings):
        return None
    config = parse_config(root, raw, findings)
    if config is not None:
        stack.check_layer_lists(raw_text, findings, config.text)
        stack.check_attention_order(config.text, findings)
    return config


def _lay_out(
    config: ReadConfig, layout: CheckpointLayout, sound: bool, findings: Findings
) -> ExpectedModel | None:
    try:
        expected = lay_out(config, layout.tensors)
    except Exception as error:
        if sound:
            findings.error(
                "config-unbuildable",
                CONFIG_NAME,
                f"no model can be built from it: {first_line(error)}",
                "restore config.json, or correct what the message names",
            )
        return None
    if expected is None:
        findings.error(
            "architecture-unknown",
            "architectures",
            f"transformers has no model class for {config.raw.get('architectures')}",
            "check the name",
        )
    return expected


def _experts(config: ReadConfig, expected: ExpectedModel) -> dict[int, int]:
    dropped = stack.skipped_layers(config.raw_text.get(per_layer.FIELD))
    found = {layer: 0 for layer, parts in dropped.items() if "mlp" in parts}
    found |= {layer: moe.num_experts for layer, moe in expected.moe_layers.items()}
    return dict(sorted(found.items()))


def _check_model(
    config: ReadConfig,
    expected: ExpectedModel,
    layout: CheckpointLayout,
    complete: bool,
    tensor_parallel: int,
    expert_parallel: int,
    findings: Findings,
) -> None:
    schemes = read_schemes(config.quantization, findings)
    demand = plain_demand(expected) if schemes is None else quantized_demand(expected, schemes, findings)
    experts.check_routing(expected, findings)
    if schemes is not None:
        quantization.check_routers(expected, schemes, layout, findings)
        quantization.check_towers(expected, demand, schemes, findings)
        quantization.check_moe_layers(expected, demand, schemes, findings)
        quantization.check_family(config.text.model_type, demand, findings)
        quantization.check_dtype(config.dtype, demand, schemes, findings)
        quantization.check_run_as_one(expected, demand, schemes, findings)
        quantization.check_stale_names(expected, schemes, findings)
    check_parallel(config, expected, demand, schemes, tensor_parallel, expert_parallel, findings)
    if schemes is None and isinstance(config.quantization, dict):
        foreign.check_foreign_routers(expected, config.quantization, layout, findings)
    # an unreadable file would make each of its tensors a finding of its own; an unknown quantization method
    # names its tensors in ways that are not known here
    if not complete or (schemes is None and config.quantization is not None):
        return
    comparison = compare(layout, demand)
    mtp.check_mtp(config, expected, layout, comparison, findings)
    stack.check_depth(config, expected, layout, comparison, findings)
    stack.check_sizes(config, expected, comparison, findings)
    stack.check_dropped(config, expected, comparison, findings)
    experts.check_foreign_names(expected, comparison, findings)
    experts.check_counts(config, expected, layout, comparison, findings)
    if schemes is None:
        quantization.check_undeclared(layout, comparison, findings)
    else:
        quantization.check_storage(expected, demand, schemes, layout, comparison, findings)
        quantization.check_packed_shapes(expected, demand, layout, findings)
    report_rest(comparison, findings)
