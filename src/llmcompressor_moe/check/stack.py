"""Rules about the stack of blocks: its depth, the sizes that run through it, per-layer lists, drops."""

from typing import Any

from transformers import PreTrainedConfig

from llmcompressor_moe.check.comparison import Comparison, ranges
from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.expected import ExpectedModel, layer_of
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.checkpoint.layout import CheckpointLayout
from llmcompressor_moe.families import MTP_COUNTS, exception_for

# Lists of layer indices; every other list with "layer" in its name that starts out as long as the stack has
# one entry per layer.
_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers_enum")
_PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "layers_block_type",
    "hybrid_layer_ids",
)


def check_depth(
    config: ReadConfig,
    expected: ExpectedModel,
    layout: CheckpointLayout,
    comparison: Comparison,
    findings: Findings,
) -> None:
    """`num_hidden_layers` against the blocks that the files hold."""
    path = expected.layers_path
    stored = {index for name in layout.tensors if (index := layer_of(name, path)) is not None}
    if not stored:
        return
    beyond = {layer_of(name, path) for name in comparison.extra} - {None}
    beyond = {index for index in beyond if index >= config.num_layers}
    if beyond:
        findings.error(
            "config-layers",
            "num_hidden_layers",
            f"config.json says {config.num_layers}, the files also hold block {ranges(beyond)}",
            f"set num_hidden_layers to {max(beyond) + 1}, or save again after the cut",
        )
        comparison.forget_under(tuple(f"{path}.{index}." for index in beyond))
    absent = set(range(config.num_layers)) - stored
    absent = {i for i in absent if any(layer_of(name, path) == i for name in comparison.missing)}
    if absent:
        findings.error(
            "config-layers",
            "num_hidden_layers",
            f"config.json says {config.num_layers}, the files hold nothing of block {ranges(absent)}: "
            "transformers fills those with random weights",
            f"set num_hidden_layers to {max(stored) + 1}"
            if absent == set(range(max(stored) + 1, config.num_layers))
            else "save again: blocks have to be renumbered after a cut",
        )
        comparison.forget_under(tuple(f"{path}.{index}." for index in absent))


def check_sizes(
    config: ReadConfig, expected: ExpectedModel, comparison: Comparison, findings: Findings
) -> None:
    """`hidden_size` and `vocab_size` against the embedding table."""
    tables = [
        s
        for s in expected.sites.values()
        if s.kind == "embedding" and f"{s.name}.weight" in comparison.shapes
    ]
    for site in tables:
        stored, _ = comparison.shapes[f"{site.name}.weight"]
        if len(stored.shape) != 2:
            continue
        for axis, name in ((0, "vocab_size"), (1, "hidden_size")):
            stated, found = config.value(name), stored.shape[axis]
            if stated == found or (site.out_features, site.in_features)[axis] != stated:
                continue
            findings.error(
                f"config-{name.replace('_', '-')}",
                name,
                f"config.json says {stated}, {site.name}.weight has {found}",
                f"set {name} to {found}, or save again",
            )
            explained = [
                tensor
                for tensor, (info, wanted) in comparison.shapes.items()
                if len(info.shape) == len(wanted.shape)
                and all(
                    a == b or (b == stated and a == found)
                    for a, b in zip(info.shape, wanted.shape, strict=True)
                )
            ]
            comparison.forget(explained)


def check_attention_order(parsed: PreTrainedConfig, findings: Findings) -> None:
    """Families whose kind of attention vLLM takes from a block's index, whatever `layer_types` lists."""
    period = exception_for(parsed.model_type).position_period
    listed = getattr(parsed, "layer_types", None)
    if period == 1 or not listed:
        return
    usual = type(parsed)().layer_types
    moved = [index for index, kind in enumerate(listed) if kind != usual[index % period]]
    if moved:
        findings.error(
            "config-attention-order",
            "layer_types",
            f"layer {moved[0]} is {listed[moved[0]]!r}, but vLLM runs it as {usual[moved[0] % period]!r}: for "
            f"{parsed.model_type!r} it goes by the layer's index modulo {period}",
            f"drop neighbouring blocks in multiples of {period}",
        )


def check_layer_lists(
    raw_text: dict[str, Any], findings: Findings, parsed: PreTrainedConfig | None = None
) -> None:
    """Lists in config.json that have one entry per layer, or name layers.

    With the `parsed` config only those lists are judged that its class alone can tell.
    """
    depth = raw_text.get("num_hidden_layers")
    if not isinstance(depth, int) or isinstance(depth, bool):
        return
    # some families append the entries of their MTP layers
    with_mtp = depth + mtp_layers(raw_text)
    per_layer = (
        set(_PER_LAYER_LISTS) if parsed is None else _lists_that_follow_depth(parsed) - set(_PER_LAYER_LISTS)
    )
    for name, value in raw_text.items():
        if not isinstance(value, list):
            continue
        if name in per_layer and len(value) not in (depth, with_mtp):
            findings.error(
                "config-list-length",
                name,
                f"has {len(value)} entries for {depth} layers",
                "give it one entry per layer",
            )
        elif name in _INDEX_LISTS and parsed is None:
            beyond = [i for i in value if not isinstance(i, int) or not 0 <= i < with_mtp]
            if beyond:
                findings.error(
                    "config-list-index",
                    name,
                    f"names {beyond}, layers run from 0 to {depth - 1}",
                    "renumber it after a cut",
                )


def mtp_layers(raw_text: dict[str, Any]) -> int:
    """Number of multi-token-prediction layers that a config announces."""
    for name in MTP_COUNTS:
        value = raw_text.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _lists_that_follow_depth(config: PreTrainedConfig) -> set[str]:
    """Lists that the config class itself makes as long as the stack."""
    try:
        shallow, deep = (type(config)(num_hidden_layers=depth).to_dict() for depth in (7, 11))
    except Exception:
        # some classes refuse a depth of their own; the named lists still hold
        return set()
    return {
        name
        for name, value in shallow.items()
        if isinstance(value, list)
        and len(value) == 7
        and isinstance(deep.get(name), list)
        and len(deep[name]) == 11
        and name not in _INDEX_LISTS
    }


def skipped_layers(written: Any) -> dict[int, list[str]]:
    """Layer -> skipped parts, as `per_layer_config` writes them; whatever is malformed is left out."""
    if not isinstance(written, dict):
        return {}
    return {
        int(key): [part for part in entry["skip"] if isinstance(part, str)]
        for key, entry in written.items()
        if str(key).isdigit()
        and isinstance(entry, dict)
        and isinstance(entry.get("skip"), list)
        and entry["skip"]
    }


def check_dropped(
    config: ReadConfig, expected: ExpectedModel, comparison: Comparison, findings: Findings
) -> None:
    """A dropped MoE leaves no tensors behind, but its norm stays."""
    path = expected.layers_path
    for layer in skipped_layers(config.raw_text.get("per_layer_config")):
        prefix = f"{path}.{layer}."
        left = [name for name in comparison.extra if name.startswith(prefix)]
        if left:
            findings.error(
                "dropped-tensors-left",
                f"layer {layer}",
                f"per_layer_config drops its MoE, {len(left)} tensors of it are stored, as {left[0]}",
                "save again, or take the layer out of per_layer_config",
            )
            comparison.forget(left)
        norms = [n for n in comparison.missing if n.startswith(prefix) and "norm" in n]
        if norms:
            findings.error(
                "dropped-norm-missing",
                norms[0],
                f"the MoE of layer {layer} is dropped, but vLLM still builds its norm and fails without it",
                "keep the norm before a dropped MoE in the checkpoint",
            )
            comparison.forget(norms)
