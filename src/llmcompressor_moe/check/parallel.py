"""Rules about splitting a checkpoint over devices, as vLLM splits it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from compressed_tensors.config import CompressionFormat

from llmcompressor_moe.check.comparison import PerLayer, ranges
from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.demand import Demand
from llmcompressor_moe.check.expected import ExpectedModel, LinearSite
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.schemes import Schemes
from llmcompressor_moe.compat.transformers.per_layer import general_value

# vLLM pads the vocabulary to a multiple of this.
_VOCAB_PADDING = 64
_HEADS = ("num_attention_heads", "num_key_value_heads")
_LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
# How vLLM splits projections of blocks. transformers' own plans leave out some of them, or whole families.
_WAYS = {
    "q_proj": "colwise",
    "o_proj": "rowwise",
    "gate_proj": "colwise",
    "up_proj": "colwise",
    "down_proj": "rowwise",
    "input_linear": "colwise",
    "output_linear": "rowwise",
}
# Gate and up in one matrix, of which a rank gets its share of each.
_TWO_IN_ONE = ("input_linear",)


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
        _check_vocabulary(config, tensor_parallel, findings)
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


def _check_vocabulary(config: ReadConfig, ranks: int, findings: Findings) -> None:
    vocab = config.value("vocab_size")
    if not isinstance(vocab, int) or vocab < 1:
        return
    padded = math.ceil(vocab / _VOCAB_PADDING) * _VOCAB_PADDING
    if padded % ranks:
        findings.error(
            "parallel-vocab",
            "vocab_size",
            f"{vocab}, padded to {padded}, does not divide by tensor_parallel={ranks}",
            f"use a tensor-parallel size that divides {padded}",
        )
    elif padded != vocab:
        findings.note(
            "parallel-vocab", "vocab_size", f"vLLM pads embedding and head from {vocab} rows to {padded}"
        )


def _check_heads(config: ReadConfig, ranks: int, findings: Findings) -> None:
    heads: dict[tuple[str, int], list[int]] = {}
    for index in range(config.num_layers):
        layer = config.layer(index)
        kinds = getattr(layer, "layer_types", None) or []
        linear = index < len(kinds) and kinds[index] == "linear_attention"
        for name in (*_HEADS, *_LINEAR_HEADS) if linear else _HEADS:
            value = general_value(layer, name)
            # latent attention has one set of keys and values for all heads, on every rank
            if name == "num_key_value_heads" and general_value(layer, "kv_lora_rank"):
                continue
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


@dataclass(frozen=True)
class _Split:
    """A matrix that ranks share out, by its inputs (`rowwise`) or by its outputs (`colwise`)."""

    name: str
    way: str
    width: int
    layer: int

    @property
    def leaf(self) -> str:
        return self.name.rsplit(".", 1)[-1]


def _splits(config: ReadConfig, expected: ExpectedModel, experts: bool) -> Iterator[_Split]:
    """Every matrix that is shared out, but the vocabulary's.

    :param experts: whether those of routed experts are
    """
    plan = _plan(config, expected)
    head = expected.model.get_output_embeddings()
    for site in expected.sites.values():
        if site.kind == "expert":
            way = _way_of_expert(site.runtime) if experts else None
        elif site.kind == "linear" and expected.model.get_submodule(site.runtime) is not head:
            way = _way_of(site, plan)
        else:
            way = None
        # key and value projections follow the rule for heads
        if way and not site.name.endswith((".k_proj", ".v_proj")):
            width = site.in_features if way == "rowwise" else site.out_features
            if site.name.endswith(_TWO_IN_ONE):
                width //= 2
            yield _Split(site.name, way, width, -1 if site.layer is None else site.layer)
    fused = {name: linear for name, linear in expected.linearized.items() if linear.native is None}
    for name, linear in fused.items() if experts else ():
        way = _way_of_expert(name)
        yield _Split(name, way, linear.shape[1 if way == "rowwise" else 0], linear.layer)


def _way_of_expert(name: str) -> str:
    return "rowwise" if name.endswith(".down_proj") else "colwise"


def _way_of(site: LinearSite, plan: list[tuple[re.Pattern, str]]) -> str | None:
    leaf = site.name.rsplit(".", 1)[-1]
    if site.layer is not None and leaf in _WAYS:
        return _WAYS[leaf]
    for pattern, style in plan:
        if pattern.match(site.runtime):
            # what a plan gathers it splits for want of a better way, and vLLM may split it otherwise
            kept = not any(word in style for word in ("rep", "gather"))
            return next((way for way in ("rowwise", "colwise") if kept and way in style), None)
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
    uneven: dict[tuple[str, str, int], set[int]] = {}
    torn: dict[tuple[str, str], set[int]] = {}
    # with expert parallelism each rank holds whole experts
    for split in _splits(config, expected, experts=expert_parallel == 1):
        if split.width % ranks:
            uneven.setdefault((split.leaf, split.way, split.width), set()).add(split.layer)
            continue
        group = demand.quantized.get(split.name)
        reason = schemes and group is not None and _why_torn(schemes, group, split, split.width // ranks)
        if reason:
            torn.setdefault((split.leaf, f"{split.width} {reason}"), set()).add(split.layer)
    for (leaf, way, width), layers in uneven.items():
        findings.error(
            "parallel-width",
            leaf,
            f"{'input' if way == 'rowwise' else 'output'} size {width} (layer {ranges(layers)}) does not "
            f"divide by tensor_parallel={ranks}",
            "use a tensor-parallel size that divides it",
        )
    for (leaf, what), layers in torn.items():
        findings.error(
            "parallel-group-size",
            leaf,
            f"{what} over {ranks} ranks (layer {ranges(layers)})",
            "use a smaller group size, fewer ranks, or expert parallelism",
        )


def _why_torn(schemes: Schemes, group: int, split: _Split, share: int) -> str | None:
    """What of a quantized weight lies on two ranks, each of which has ``share`` of its inputs or outputs."""
    weights = schemes.schemes[group].weights
    if weights is None:
        return None
    inputs = split.way == "rowwise"
    divided = f"{'inputs' if inputs else 'outputs'} are {share} each"
    if weights.block_structure:
        unit = weights.block_structure[1 if inputs else 0]
    else:
        unit = weights.group_size if inputs and weights.group_size and weights.group_size > 0 else 1
    if share % unit:
        return (
            f"{divided}, not a multiple of the {'blocks' if weights.block_structure else 'groups'} of {unit},"
        )
    # Inputs of weights, and outputs of zero points, share words of 32 bits. vLLM asks that of gate and up together
    # only, but each of them is cut.
    packed = schemes.format_of(group) is CompressionFormat.pack_quantized
    if packed and (inputs or not weights.symmetric) and share * weights.num_bits % 32:
        return f"{divided}, which {weights.num_bits} bits do not pack into whole words,"
    return None
