"""Rules about splitting a checkpoint over devices, as vLLM splits it."""

import re

from llmcompressor_moe.check.comparison import PerLayer, ranges
from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.demand import Demand
from llmcompressor_moe.check.expected import ExpectedModel, LinearSite
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.schemes import Schemes
from llmcompressor_moe.compat.transformers.per_layer import general_value

# vLLM pads the vocabulary to a multiple of this.
_VOCAB_PADDING = 64


def check_parallel(
    config: ReadConfig,
    expected: ExpectedModel,
    demand: Demand,
    schemes: Schemes | None,
    tensor_parallel: int,
    expert_parallel: int,
    findings: Findings,
) -> None:
    """Divisibility of heads, widths, scale groups and experts."""
    if tensor_parallel > 1:
        _check_heads(config, tensor_parallel, findings)
        _check_widths(config, expected, demand, schemes, tensor_parallel, expert_parallel, findings)
        vocab = config.value("vocab_size")
        if isinstance(vocab, int) and vocab % (tensor_parallel * _VOCAB_PADDING):
            findings.note(
                "parallel-vocab",
                "vocab_size",
                f"{vocab} is not a multiple of {_VOCAB_PADDING} x {tensor_parallel}: vLLM pads the embedding",
            )
    if expert_parallel > 1:
        layers = PerLayer(findings)
        for layer, moe in expected.moe_layers.items():
            if moe.num_experts < expert_parallel:
                layers.error(
                    "parallel-experts",
                    layer,
                    f"{moe.num_experts} experts over {expert_parallel} ranks leave some with none",
                    "use fewer expert-parallel ranks",
                )
            elif moe.num_experts % expert_parallel:
                layers.warning(
                    "parallel-experts",
                    layer,
                    f"{moe.num_experts} experts do not divide by {expert_parallel} ranks: vLLM spreads them "
                    "unevenly and refuses expert load balancing (EPLB)",
                    "drop a number of experts that leaves a multiple of the ranks",
                )
        layers.report()


def _check_heads(config: ReadConfig, ranks: int, findings: Findings) -> None:
    heads: dict[tuple[str, int], list[int]] = {}
    for index in range(config.num_layers):
        layer = config.layer(index)
        for name in ("num_attention_heads", "num_key_value_heads"):
            value = general_value(layer, name)
            if isinstance(value, int) and value > 0:
                heads.setdefault((name, value), []).append(index)
    for (name, value), layers in heads.items():
        # fewer key-value heads than ranks are copied
        if value % ranks and not (name == "num_key_value_heads" and ranks % value == 0):
            findings.error(
                "parallel-heads",
                name,
                f"{value} (layer {ranges(layers)}) does not divide by tensor_parallel={ranks}",
                "use a tensor-parallel size that divides the heads",
            )


def _plan(config: ReadConfig, expected: ExpectedModel) -> list[tuple[re.Pattern, str]]:
    """Module name patterns and `rowwise`/`colwise`, from the plan that the architecture itself carries."""
    plan = getattr(expected.model, "tp_plan", None) or config.text.base_model_tp_plan or {}
    return [
        (re.compile(rf"(^|.*\.){re.escape(pattern).replace(re.escape('*'), '[^.]+')}$"), style)
        for pattern, style in plan.items()
    ]


def _split(site: LinearSite, plan: list[tuple[re.Pattern, str]]) -> str | None:
    if site.kind == "expert":
        return "rowwise" if site.runtime.endswith(".down_proj") else "colwise"
    for pattern, style in plan:
        if pattern.match(site.runtime):
            return next((way for way in ("rowwise", "colwise") if way in style and "rep" not in style), None)
    return None


def _check_widths(
    config: ReadConfig,
    expected: ExpectedModel,
    demand: Demand,
    schemes: Schemes | None,
    ranks: int,
    expert_parallel: int,
    findings: Findings,
) -> None:
    plan = _plan(config, expected)
    uneven: dict[tuple[str, str, int], set[int]] = {}
    torn: dict[tuple[str, int, int], set[int]] = {}
    for site in expected.sites.values():
        # with expert parallelism each rank holds whole experts
        if site.kind not in ("linear", "expert") or (site.kind == "expert" and expert_parallel > 1):
            continue
        split = _split(site, plan)
        # key and value projections follow the rule for heads
        if split is None or site.name.endswith((".k_proj", ".v_proj")):
            continue
        width = site.in_features if split == "rowwise" else site.out_features
        leaf = site.name.rsplit(".", 1)[-1]
        layer = site.layer if site.layer is not None else -1
        if width % ranks:
            uneven.setdefault((leaf, split, width), set()).add(layer)
            continue
        group = demand.quantized.get(site.name)
        weights = schemes.schemes[group].weights if schemes and group is not None else None
        size = getattr(weights, "group_size", None)
        if split == "rowwise" and size and size > 0 and width // ranks % size:
            torn.setdefault((leaf, width, size), set()).add(layer)
    for (leaf, split, width), layers in uneven.items():
        findings.error(
            "parallel-width",
            leaf,
            f"{'input' if split == 'rowwise' else 'output'} size {width} (layer {ranges(layers)}) does not "
            f"divide by tensor_parallel={ranks}",
            "use a tensor-parallel size that divides it",
        )
    for (leaf, width, size), layers in torn.items():
        findings.error(
            "parallel-group-size",
            leaf,
            f"{width} inputs over {ranks} ranks are {width // ranks} each, no multiple of the quantization "
            f"group {size} (layer {ranges(layers)})",
            "use a smaller group size, fewer ranks, or expert parallelism",
        )
