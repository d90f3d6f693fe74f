"""Rules about quantized weights: stored as the config says, and in a way that fused MoE layers can take."""

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationStrategy

from llmcompressor_moe.check.comparison import Comparison, PerLayer, kind_of
from llmcompressor_moe.check.demand import Demand
from llmcompressor_moe.check.expected import ExpectedModel
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.schemes import FIELD, QPARAM, Schemes, is_compressed
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, read_small
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.topology import find_towers

# Projections that vLLM runs as one matrix.
_RUN_AS_ONE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BOTH = "let ignore and targets cover both namings"
# Formats that transformers decompresses to bfloat16, whatever the model is in.
_IN_BFLOAT16 = (
    CompressionFormat.nvfp4_pack_quantized,
    CompressionFormat.mxfp4_pack_quantized,
    CompressionFormat.mxfp8_quantized,
)


def _groups(names: Iterable[str]) -> list[tuple[str, int]]:
    """First name and number of names of each kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[kind_of(f"{name}.")].append(name)
    return [(found[0], len(found)) for found in kinds.values()]


def check_undeclared(layout: CheckpointLayout, comparison: Comparison, findings: Findings) -> None:
    """Compressed weights in a checkpoint that does not say how they are compressed."""
    modules = [
        m for m in dict.fromkeys(n.rpartition(".")[0] for n in comparison.extra) if is_compressed(layout, m)
    ]
    for module, count in _groups(modules):
        findings.error(
            "quant-undeclared",
            module,
            f"stored compressed ({count} modules alike), but config.json has no {FIELD}",
            f"put {FIELD} into config.json",
        )
    comparison.forget_under(tuple(f"{module}." for module in modules))


def check_storage(
    expected: ExpectedModel,
    demand: Demand,
    schemes: Schemes,
    layout: CheckpointLayout,
    comparison: Comparison,
    findings: Findings,
) -> None:
    """Modules that the config quantizes are stored compressed, all others plain."""
    if schemes.config.kv_cache_scheme is not None:
        comparison.forget([n for n in comparison.extra if QPARAM.search(n) and ".weight" not in n])
    plain = [m for m in demand.quantized if f"{m}.weight" in layout.tensors and not is_compressed(layout, m)]
    for module, count in _groups(plain):
        elsewhere = [a for a in expected.aliases.get(module, ()) if schemes.group_of(a) is None]
        findings.error(
            "quant-stored-plain",
            module,
            f"{schemes.label(demand.quantized[module])} in {FIELD}, but stored plain ({count} modules alike)"
            + (f": ignore names only {elsewhere[0]}" if elsewhere else ""),
            _BOTH if elsewhere else "add it to ignore, or save it compressed",
        )
    compressed = [m for m in demand.plain if is_compressed(layout, m)]
    kinds = {name: site.kind for name, site in expected.sites.items()}
    for module, count in _groups(compressed):
        if kinds.get(module) in ("router", "gate"):
            findings.error(
                "router-quantized",
                module,
                f"a {kinds[module]} is stored quantized ({count} modules alike); readers run it plain",
                "quantize again with the routers and shared-expert gates in ignore",
            )
            continue
        elsewhere = [a for a in expected.aliases.get(module, ()) if schemes.group_of(a) is not None]
        findings.error(
            "quant-unexpected",
            module,
            f"stored compressed ({count} modules alike), but {FIELD} leaves it plain"
            + (f": targets name only {elsewhere[0]}" if elsewhere else ""),
            _BOTH if elsewhere else "take it out of ignore, or save it plain",
        )
    comparison.forget_under(tuple(f"{module}." for module in (*plain, *compressed)))


def check_routers(
    expected: ExpectedModel, schemes: Schemes, layout: CheckpointLayout, findings: Findings
) -> None:
    """Routers and gates are left plain by the config too, not only by the files."""
    layers = PerLayer(findings)
    for site in expected.sites.values():
        if site.kind not in ("router", "gate") or is_compressed(layout, site.name):
            continue
        # vLLM runs every router as a Linear under its native name; in transformers most are none
        names = {site.runtime: site.classes, site.name: ("Linear", *site.classes)}
        quantized = [name for name, classes in names.items() if schemes.group_of(name, classes) is not None]
        if not quantized:
            continue
        layer = site.layer if site.layer is not None else -1
        way_out = "add " + " and ".join(f"'re:.*{_tail(name)}$'" for name in quantized) + " to ignore"
        if len(quantized) == len(names):
            layers.error(
                "router-not-ignored",
                layer,
                f"{FIELD} quantizes its {site.kind} {_tail(site.name)}, which is stored plain",
                way_out,
            )
        else:
            layers.warning(
                "quant-names-one-sided",
                layer,
                f"ignore covers its {site.kind} as one of {', '.join(map(_tail, names))} only",
                way_out,
            )
    layers.report()


def check_towers(expected: ExpectedModel, demand: Demand, schemes: Schemes, findings: Findings) -> None:
    """Quantized weights beside the text model: in a vision or audio tower, or a projector."""
    if expected.topology is None:
        return
    decoder = f"{expected.topology.stack.rpartition('.')[0]}."
    text = [site.name for site in expected.sites.values() if site.runtime.startswith(decoder)]
    for tower in find_towers(expected.model, expected.topology):
        inside = [
            site.name
            for site in expected.sites.values()
            if f"{site.runtime}.".startswith(f"{tower}.") and site.name in demand.quantized
        ]
        if not inside:
            continue
        shared = schemes.patterns_for_both(inside, text)
        if not all(schemes.targets.matches(name) for name in inside):
            how = "its targets name a class of modules"
        elif shared:
            how = f"its target {shared[0]!r} names layers of the text model as well"
        else:
            how = "its targets name them"
        findings.warning(
            "quant-tower",
            tower,
            f"{len(inside)} modules beside the text model are quantized, {inside[0]} for one: {how}",
            "if that was not intended, quantize again with them in ignore",
        )


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def check_moe_layers(expected: ExpectedModel, demand: Demand, schemes: Schemes, findings: Findings) -> None:
    """One scheme and one group size in each fused MoE layer, under every naming."""
    layers = PerLayer(findings)
    seen: set[str] = set()
    for layer, groups in demand.expert_groups.items():
        labels = {name: _identity(schemes, group) for name, group in groups.items()}
        kinds = set(labels.values())
        seen |= kinds
        if len(kinds) > 1:
            _report_mix(layers, layer, kinds)
        differing = {
            kind_of(f"{alias}.").removesuffix(".")
            for name in groups
            for alias in expected.aliases.get(name, ())
            if _identity(schemes, schemes.group_of(alias)) != labels[name]
        }
        if differing:
            layers.warning(
                "quant-names-one-sided",
                layer,
                f"ignore and targets give its experts another scheme as {', '.join(sorted(differing))} than "
                "under their own names",
                _BOTH,
            )
        if any(schemes.ambiguous(name) for name in groups):
            layers.warning(
                "quant-ambiguous",
                layer,
                f"several groups of {FIELD} name its experts; readers take different ones",
                "let each module match the targets of one group",
            )
        if layer in expected.fused_experts and kinds != {"plain"}:
            layers.warning(
                "quant-fused-family",
                layer,
                "this architecture stores its experts fused: transformers alone cannot load single quantized "
                "ones and runs random experts",
                "load it inside load_trimmed_moe(); serve it with a vLLM that reads this model's single "
                "experts",
            )
    layers.report()
    for reason in _beyond_transformers(expected, demand, schemes, seen):
        findings.warning(
            "transformers-experts",
            FIELD,
            f"vLLM reads these experts, transformers alone does not: it {reason}",
            "serve with vLLM; in transformers load it inside load_trimmed_moe()",
        )


def check_family(model_type: str, demand: Demand, findings: Findings) -> None:
    """Families whose quantized experts vLLM cannot take."""
    exception = exception_for(model_type)
    found = {group is not None for groups in demand.expert_groups.values() for group in groups.values()}
    if found == {False, True} and exception.refuse_partly_quantized:
        reason, way_out = exception.refuse_partly_quantized, "quantize the experts of all layers"
    elif True in found and exception.refuse_quantized_experts:
        reason, way_out = exception.refuse_quantized_experts, "keep the experts in 16 bit"
    else:
        return
    findings.error(
        "moe-family", FIELD, f"vLLM cannot serve {model_type!r} with these experts: {reason}", way_out
    )


def _beyond_transformers(
    expected: ExpectedModel, demand: Demand, schemes: Schemes, kinds: set[str]
) -> Iterator[str]:
    """What transformers 5.17 does wrong with experts that it has to stack while it decompresses them."""
    groups = {
        group
        for layer, found in demand.expert_groups.items()
        if layer not in expected.fused_experts
        for group in found.values()
    }
    if None in groups:
        yield "leaves the plain experts of a compressed checkpoint out and runs random ones"
    if len(kinds - {"plain"}) > 1:
        yield f"decompresses all experts by one scheme ({'; '.join(sorted(kinds - {'plain'}))})"
    for group in sorted(groups - {None}):
        weights, form = schemes.schemes[group].weights, schemes.format_of(group)
        packed = form is CompressionFormat.pack_quantized and weights.symmetric
        scaled_by_row = weights.strategy in (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL)
        if not packed and not (weights.type == "float" and weights.num_bits == 8 and scaled_by_row):
            zero_points = "" if weights.symmetric else " with zero points"
            scales = (
                f" with scales per {weights.strategy.value}"
                if form is CompressionFormat.float_quantized
                else ""
            )
            yield f"cannot decompress {form.value} experts{zero_points}{scales}"


def _identity(schemes: Schemes, group: int | None) -> str:
    """What distinguishes two schemes to a fused layer; equal for groups that say the same."""
    if group is None:
        return "plain"
    scheme = schemes.schemes[group]
    weights, inputs = scheme.weights, scheme.input_activations

    def say(args) -> str:
        if args is None:
            return "none"
        kind = getattr(args.type, "value", args.type)
        strategy = getattr(args.strategy, "value", args.strategy)
        return f"{args.num_bits} bit {kind} {strategy} {args.group_size or ''}".strip()

    return f"{say(weights)}, inputs {say(inputs)}"


def _report_mix(layers: PerLayer, layer: int, kinds: set[str]) -> None:
    shown = "; ".join(sorted(kinds))
    one_per_layer = "give all experts of a layer one scheme; layers may differ from each other"
    if "plain" in kinds:
        layers.error(
            "moe-partly-quantized", layer, f"some experts are quantized, others not ({shown})", one_per_layer
        )
    elif len({kind.split(" bit ")[0] for kind in kinds}) > 1:
        layers.error(
            "moe-mixed-schemes",
            layer,
            f"its experts have different bit widths ({shown}): vLLM takes the first expert's and fails",
            one_per_layer,
        )
    else:
        layers.error(
            "moe-mixed-group-size",
            layer,
            f"its experts have different schemes ({shown}): vLLM takes the first expert's and silently "
            "serves the others wrong",
            one_per_layer,
        )


def check_dtype(dtype: torch.dtype, demand: Demand, schemes: Schemes, findings: Findings) -> None:
    """Formats that not every reader brings into the dtype of the model."""
    used = {schemes.format_of(group) for group in demand.quantized.values()}
    names = [form.value for form in _IN_BFLOAT16 if form in used]
    if names and dtype != torch.bfloat16:
        findings.warning(
            "transformers-dtype",
            "dtype",
            f"the model is in {str(dtype).removeprefix('torch.')}, and transformers alone decompresses "
            f"{', '.join(names)} weights to bfloat16: its first forward fails",
            "in transformers load it inside load_trimmed_moe(); serve it with --dtype bfloat16, which every "
            "kernel of vLLM for these formats takes",
        )


def check_run_as_one(expected: ExpectedModel, demand: Demand, schemes: Schemes, findings: Findings) -> None:
    """Linears that vLLM merges into one matrix share one scheme."""
    for site in expected.sites.values():
        parent, _, leaf = site.name.rpartition(".")
        for leaves in _RUN_AS_ONE:
            if site.kind != "linear" or leaf != leaves[0]:
                continue
            names = [f"{parent}.{other}" for other in leaves if f"{parent}.{other}" in expected.sites]
            kinds = {_identity(schemes, demand.quantized.get(name)) for name in names}
            if len(kinds) > 1:
                findings.error(
                    "linear-mixed-schemes",
                    parent,
                    f"vLLM runs {', '.join(leaves)} as one matrix, they have different schemes "
                    f"({'; '.join(sorted(kinds))})",
                    "give them one scheme",
                )


def check_packed_shapes(
    expected: ExpectedModel, demand: Demand, layout: CheckpointLayout, findings: Findings
) -> None:
    """The original shapes that packed weights carry with them (two 64-bit integers each)."""
    wrong = []
    for module in demand.quantized:
        tensor = f"{module}.weight_shape"
        site = expected.sites.get(module)
        if tensor not in layout.tensors or site is None or layout.tensors[tensor].dtype != "I64":
            continue
        raw = read_small(layout, tensor)
        if raw is None or len(raw) != 16:
            continue
        if struct.unpack("<2q", raw) != (site.out_features, site.in_features):
            wrong.append((tensor, struct.unpack("<2q", raw), site))
    for first, count in _groups(name for name, _, _ in wrong):
        _, stated, site = next(entry for entry in wrong if entry[0] == first)
        findings.error(
            "quant-weight-shape",
            first,
            f"holds {list(stated)}, the module is {[site.out_features, site.in_features]} ({count} alike)",
            "save the model again",
        )


def check_stale_names(expected: ExpectedModel, schemes: Schemes, findings: Findings) -> None:
    """Exact names in ignore or targets that no module has, as they are left over after a cut."""
    known = {name for name, _ in expected.model.named_modules()}
    known |= set(expected.sites) | set(expected.linearized)
    for tensor in expected.shapes:
        while "." in tensor:
            tensor = tensor.rpartition(".")[0]
            if tensor in known:
                break
            known.add(tensor)
    stale = [
        name for name in (*schemes.ignore.exact, *schemes.targets.exact) if "." in name and name not in known
    ]
    if stale:
        findings.note(
            "quant-name-stale",
            stale[0],
            f"{len(stale)} names in ignore or targets belong to no module of this model",
            f"drop them from {FIELD}",
        )
