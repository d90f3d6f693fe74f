"""Turns what the config demands into one table of stored tensors, quantization included."""

from collections.abc import Callable
from dataclasses import dataclass, field

from llmcompressor_moe.check.expected import ExpectedModel, LinearSite
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.schemes import CompressedParameters, Schemes
from llmcompressor_moe.checkpoint.layout import FLOATS

INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")


@dataclass(frozen=True)
class Wanted:
    """One stored tensor as demanded: `dtypes` are the safetensors dtypes that will do."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


@dataclass
class Demand:
    """Every tensor that must (`tensors`) or may (`optional`) be stored, and the modules behind them.

    `quantized`: native or linearized module name -> scheme group. `plain`: modules that could be quantized
    but are not. `expert_groups`: MoE layer -> scheme group (None: plain) of each expert projection.
    """

    tensors: dict[str, Wanted]
    optional: dict[str, Wanted]
    quantized: dict[str, int] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    expert_groups: dict[int, dict[str, int | None]] = field(default_factory=dict)


def plain_demand(expected: ExpectedModel) -> Demand:
    """The demand of an unquantized checkpoint."""

    def wanted(shapes: dict[str, tuple[int, ...]]) -> dict[str, Wanted]:
        return {
            name: Wanted(shape, INTEGERS if name in expected.integers else FLOATS)
            for name, shape in shapes.items()
        }

    return Demand(wanted(expected.shapes), wanted(expected.optional))


def quantized_demand(expected: ExpectedModel, schemes: Schemes, findings: Findings) -> Demand:
    """The demand of a checkpoint whose Linears are stored as `schemes` says."""
    demand = plain_demand(expected)
    parameters = CompressedParameters(schemes)
    sizes_refused: dict[tuple[int, int, str], list[str]] = {}

    def compress(name: str, in_features: int, out_features: int, bias: bool, group: int) -> None:
        try:
            size = schemes.schemes[group].weights.group_size
            if size and size > 0 and in_features % size:
                raise ValueError(f"{in_features} is not a multiple of {size}, which vLLM refuses")
            local = parameters.of(in_features, out_features, bias, group)
        except ValueError as error:
            sizes_refused.setdefault((in_features, group, str(error)), []).append(name)
            local = {}
        demand.tensors.pop(f"{name}.weight", None)
        demand.quantized[name] = group
        for key, (shape, dtype) in local.items():
            demand.tensors[f"{name}.{key}"] = Wanted(shape, (dtype,) if dtype else FLOATS)

    for site in expected.sites.values():
        group = _group(site, schemes)
        if site.kind == "expert":
            demand.expert_groups.setdefault(site.layer, {})[site.name] = group
        # routers and gates stay plain whatever the config says: rules report the contradiction
        if group is None or site.kind in ("router", "gate") or schemes.schemes[group].weights is None:
            demand.plain.add(site.name)
        else:
            compress(site.name, site.in_features, site.out_features, site.bias, group)
    for layer, natives in expected.fused_experts.items():
        _fused_demand(expected, schemes, demand, compress, layer, natives)
    for (in_features, group, error), names in sizes_refused.items():
        findings.error(
            "quant-size",
            names[0],
            f"{schemes.label(group)} does not fit {in_features} inputs ({len(names)} modules): {error}",
            "choose a group size that divides the dimension",
        )
    return demand


def _group(site: LinearSite, schemes: Schemes) -> int | None:
    classes = ("Embedding",) if site.kind == "embedding" else ("Linear",)
    return schemes.group_of(site.name, classes)


def _fused_demand(
    expected: ExpectedModel,
    schemes: Schemes,
    demand: Demand,
    compress: Callable[[str, int, int, bool, int], None],
    layer: int,
    natives: list[str],
) -> None:
    """Experts that the family stores fused are stored one by one once they are quantized."""
    mine = {n: s for n, s in expected.linearized.items() if s.native is None and s.layer == layer}
    groups = {name: schemes.group_of(name) for name in mine}
    demand.expert_groups[layer] = dict(groups)
    if all(group is None for group in groups.values()):
        return
    for native in natives:
        demand.tensors.pop(native, None)
    for name, group in groups.items():
        site = mine[name]
        if group is None:
            demand.tensors[f"{name}.weight"] = Wanted(site.shape)
            if site.bias:
                demand.tensors[f"{name}.bias"] = Wanted((site.shape[0],))
            demand.plain.add(name)
        else:
            compress(name, site.shape[1], site.shape[0], site.bias, group)
