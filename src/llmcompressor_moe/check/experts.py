"""Rules about routed experts: their number, their names, and whether the router can choose among them."""

from llmcompressor_moe.check.comparison import Comparison, PerLayer, ranges
from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.expected import ExpectedModel, expert_index, layer_of
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.checkpoint.layout import CheckpointLayout
from llmcompressor_moe.topology import MoELayer

_SAVE_AGAIN = "save the model again, or correct the expert count in config.json"


def check_foreign_names(expected: ExpectedModel, comparison: Comparison, findings: Findings) -> None:
    """Experts stored under the names that llm-compressor gives them where the family has names of its own."""
    found: dict[str, str | None] = {}
    for tensor in comparison.extra:
        module, _, leaf = tensor.rpartition(".")
        if module in expected.linearized:
            native = expected.linearized[module].native
            found[tensor] = None if native is None else f"{native}.{leaf}"
    if not found:
        return
    renamed = {old: new for old, new in found.items() if new is not None}
    first = next(iter(found))
    if renamed:
        first, native = next(iter(renamed.items()))
        findings.error(
            "expert-names",
            first,
            f"{len(renamed)} expert tensors carry llm-compressor's names; this architecture's own are as "
            f"{native}: transformers leaves them out and runs random experts, vLLM fails or serves wrong",
            f"rename them ({_leaf_map(expected)}) and let ignore and targets cover both namings",
        )
        comparison.forget(renamed.values())
    else:
        layers = {expected.linearized[t.rpartition(".")[0]].layer for t in found}
        fused = [name for layer in layers for name in expected.fused_experts.get(layer, [])]
        findings.error(
            "expert-names",
            first,
            f"{len(found)} plain tensors of single experts; this architecture stores its experts fused"
            + (f", as {fused[0]}" if fused else "")
            + ": transformers leaves them out and runs random experts",
            "save unquantized experts in the architecture's own layout (llmcompressor's repack_moe)",
        )
        comparison.forget(fused)
    comparison.forget(found)


def _leaf_map(expected: ExpectedModel) -> str:
    pairs = {
        f"{role} -> {name.rsplit('.', 1)[-1]}"
        for name, role in expected.roles.items()
        if expected.aliases[name]
    }
    return ", ".join(sorted(pairs))


def check_counts(
    config: ReadConfig,
    expected: ExpectedModel,
    layout: CheckpointLayout,
    comparison: Comparison,
    findings: Findings,
) -> None:
    """Expert tensors, router rows and correction bias of each MoE layer against the config's count."""
    layers = PerLayer(findings)
    single = _single_experts(expected, layout)
    for layer, moe in expected.moe_layers.items():
        stored = single.get(layer)
        count = len(stored) if stored else _fused_count(expected, layout, layer)
        rows = _router_rows(expected, comparison, layer, moe.num_experts)
        if stored and max(stored) != len(stored) - 1:
            absent = sorted(set(range(max(stored))) - stored)
            layers.error(
                "expert-gap",
                layer,
                f"its experts run from 0 to {max(stored)} without {ranges(absent)}",
                "renumber the experts without gaps",
            )
        elif count is not None and count != moe.num_experts and rows == {count}:
            layers.error(
                "config-experts",
                layer,
                f"config.json says {moe.num_experts} experts, experts and router in the files are {count}",
                f"set the expert count to {count} ({config.expert_attribute}, or per_layer_config)",
            )
        else:
            _report_counts(layers, layer, moe, count, rows)
        if count not in (None, moe.num_experts) or rows:
            counted = (*expected.fused_experts.get(layer, ()), *expected.router_tensors.get(layer, ()))
            comparison.forget_under((f"{expected.experts_path[layer]}.",))
            comparison.forget(n for n in counted if n in comparison.shapes and _rows_differ(comparison, n))
    layers.report()


def _report_counts(layers: PerLayer, layer: int, moe: MoELayer, count: int | None, rows: set[int]) -> None:
    if count is not None and count < moe.num_experts:
        layers.error(
            "experts-missing",
            layer,
            f"config.json says {moe.num_experts} experts, the files hold {count}: vLLM leaves the others in "
            "uninitialised memory",
            _SAVE_AGAIN,
        )
    elif count is not None and count > moe.num_experts:
        layers.error(
            "experts-extra",
            layer,
            f"config.json says {moe.num_experts} experts, the files hold {count}",
            _SAVE_AGAIN,
        )
    for found in sorted(rows - {moe.num_experts}):
        layers.error(
            "router-rows",
            layer,
            f"its router or correction bias scores {found} experts, config.json says {moe.num_experts}",
            "cut router rows and correction bias together with the experts",
        )


def _single_experts(expected: ExpectedModel, layout: CheckpointLayout) -> dict[int, set[int]]:
    """Indices of the experts that files hold one by one, per layer."""
    found: dict[int, set[int]] = {}
    for name in layout.tensors:
        layer = layer_of(name, expected.layers_path)
        if layer in expected.experts_path:
            index = expert_index(name, expected.experts_path[layer])
            if index is not None:
                found.setdefault(layer, set()).add(index)
    return found


def _fused_count(expected: ExpectedModel, layout: CheckpointLayout, layer: int) -> int | None:
    """Number of experts in a layer's fused tensors; None where they are absent or disagree."""
    sizes = {
        layout.tensors[name].shape[0]
        for name in expected.fused_experts.get(layer, ())
        if name in layout.tensors and layout.tensors[name].shape
    }
    return sizes.pop() if len(sizes) == 1 else None


def _rows_differ(comparison: Comparison, name: str) -> bool:
    tensor, wanted = comparison.shapes[name]
    return len(tensor.shape) == len(wanted.shape) and tensor.shape[1:] == wanted.shape[1:]


def _router_rows(expected: ExpectedModel, comparison: Comparison, layer: int, count: int) -> set[int]:
    """Numbers of experts that the router's tensors score, where they differ from what is demanded."""
    return {
        comparison.shapes[name][0].shape[0]
        for name in expected.router_tensors.get(layer, ())
        if name in comparison.shapes
        and _rows_differ(comparison, name)
        and comparison.shapes[name][1].shape[:1] == (count,)
    }


def check_routing(expected: ExpectedModel, findings: Findings) -> None:
    """Whether each router can choose its experts, its groups included."""
    layers = PerLayer(findings)
    for layer, moe in expected.moe_layers.items():
        if moe.num_experts < moe.top_k:
            layers.error(
                "experts-under-top-k",
                layer,
                f"{moe.num_experts} experts, but each token goes to {moe.top_k}",
                "keep at least top_k experts, or lower num_experts_per_tok",
            )
        if moe.num_groups <= 1:
            continue
        if moe.num_experts % moe.num_groups:
            layers.error(
                "groups-uneven",
                layer,
                f"{moe.num_experts} experts do not divide into {moe.num_groups} groups: transformers fails, "
                "vLLM silently routes without groups",
                "drop the same number of experts from each group, or set n_group and topk_group to 1",
            )
            continue
        size = moe.num_experts // moe.num_groups
        if moe.groups_kept > moe.num_groups:
            layers.error(
                "groups-kept",
                layer,
                f"topk_group is {moe.groups_kept}, n_group {moe.num_groups}",
                "lower topk_group",
            )
        if min(moe.groups_kept, moe.num_groups) * size < moe.top_k:
            layers.error(
                "groups-too-small",
                layer,
                f"{moe.groups_kept} groups of {size} experts hold fewer than the {moe.top_k} a token goes to",
                "keep more experts per group, or raise topk_group",
            )
        elif size < 2:
            layers.error(
                "groups-too-small",
                layer,
                f"groups of {size} expert: routers rank a group by its two best, vLLM ignores such groups",
                "keep at least two experts per group",
            )
    layers.report()
