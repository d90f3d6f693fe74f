"""Rules about `per_layer_config`, the standard way of saying that layers differ."""

from typing import Any

from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.compat.transformers.per_layer import has_general_value
from llmcompressor_moe.topology import expert_count_attributes, expert_width_attributes

FIELD = "per_layer_config"
OPT_OUT = "allow_global_per_layer_attribute_access"
# The one part that load_trimmed_moe() and the vLLM plugin can leave out.
SKIPPABLE = ("mlp",)


def check_opt_out(raw: dict[str, Any], findings: Findings) -> None:
    """The switch that silences readers which do not know the format has no place in a file."""
    for place, part in (("", raw), *((f"{k}.", v) for k, v in raw.items() if isinstance(v, dict))):
        if OPT_OUT in part:
            findings.error(
                "per-layer-opt-out",
                f"{place}{OPT_OUT}",
                "with it readers that do not know per_layer_config no longer fail: they serve random weights",
                "delete it from config.json",
            )


def check_shape(raw: dict[str, Any], raw_text: dict[str, Any], findings: Findings) -> bool:
    """Whether `per_layer_config` is well-formed JSON for its purpose. Runs before transformers parses it."""
    if raw is not raw_text and FIELD in raw:
        findings.error(
            "per-layer-place",
            FIELD,
            "it stands beside the text config, where no reader looks for it",
            "move it into the text config",
        )
    if FIELD not in raw_text:
        return True
    written = raw_text[FIELD]
    before = len(findings.all)
    if not isinstance(written, dict):
        findings.error(
            "per-layer-malformed", FIELD, f"is a {type(written).__name__}, not a mapping from layer"
        )
        return False
    depth = raw_text.get("num_hidden_layers")
    seen: dict[int, str] = {}
    for key, entry in written.items():
        subject = f"{FIELD}.{key}"
        if not key.isdigit() or len(key) > 6:
            findings.error("per-layer-index", subject, f"{key!r} is not a layer index", "use 0, 1, 2, ...")
            continue
        index = int(key)
        if index in seen:
            findings.error("per-layer-index", subject, f"layer {index} is also given as {seen[index]!r}")
        seen[index] = key
        if isinstance(depth, int) and index >= depth:
            findings.error(
                "per-layer-index",
                subject,
                f"layers run from 0 to {depth - 1}",
                "renumber per_layer_config after a cut, or correct num_hidden_layers",
            )
        if not isinstance(entry, dict):
            findings.error("per-layer-malformed", subject, f"is a {type(entry).__name__}, not a mapping")
            continue
        skip = entry.get("skip", [])
        if not isinstance(skip, list) or not all(isinstance(part, str) for part in skip):
            findings.error("per-layer-malformed", f"{subject}.skip", f"{skip!r} is not a list of names")
    return len(findings.all) == before


def check_meaning(config: ReadConfig, findings: Findings) -> bool:
    """Attributes that exist, parts that can be skipped, and counts that make unaware readers fail.

    Returns whether all is well.
    """
    written = config.raw_text.get(FIELD)
    if not isinstance(written, dict):
        return True
    before = len(findings.all)
    aliases = config.text.attribute_map
    counts = expert_count_attributes(config.parsed)
    widths = expert_width_attributes(config.parsed)
    for key, entry in written.items():
        subject = f"{FIELD}.{key}"
        for name, value in entry.items():
            if name == "skip":
                continue
            if name in aliases:
                findings.error(
                    "per-layer-alias",
                    f"{subject}.{name}",
                    f"this architecture's config calls it {aliases[name]}; readers of a layer miss the alias",
                    f"write {aliases[name]}",
                )
            elif not has_general_value(config.text, name):
                findings.error(
                    "per-layer-attribute",
                    f"{subject}.{name}",
                    f"{config.text.model_type} has no such attribute",
                    "correct the name",
                )
            if aliases.get(name, name) in counts and (
                not isinstance(value, int) or isinstance(value, bool) or value < 0
            ):
                findings.error(
                    "per-layer-count", f"{subject}.{name}", f"{value!r} is not a number of experts"
                )
            if aliases.get(name, name) in widths and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                findings.error(
                    "per-layer-width", f"{subject}.{name}", f"{value!r} is not a number of channels"
                )
        _check_skip(config, subject, entry, counts, findings)
    return len(findings.all) == before


def _check_skip(
    config: ReadConfig, subject: str, entry: dict[str, Any], counts: list[str], findings: Findings
) -> None:
    skip = entry.get("skip", [])
    aliases = config.text.attribute_map
    own = {aliases.get(name, name): value for name, value in entry.items()}
    stated = [own[name] for name in counts if name in own]
    for part in skip:
        if part not in SKIPPABLE:
            findings.error(
                "per-layer-skip",
                f"{subject}.skip",
                f"{part!r}: readers can leave out {', '.join(SKIPPABLE)} only",
                "drop whole blocks instead",
            )
    if "mlp" in skip and counts and 0 not in stated:
        findings.error(
            "per-layer-skip-count",
            subject,
            f"skips the MoE without {counts[0]}: 0, so readers that do not know the format see an ordinary "
            "layer and serve random weights",
            f'write {{"skip": ["mlp"], "{counts[0]}": 0}}',
        )
    if "mlp" not in skip and 0 in stated:
        findings.error(
            "per-layer-count",
            subject,
            "has no experts but does not skip its MoE",
            'add "skip": ["mlp"]',
        )
