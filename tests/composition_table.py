"""Which modifiers go together, in which order: the cases that `test_composition.py` runs, and docs/composition.md
made from them.

    python tests/composition_table.py        # writes docs/composition.md

A new modifier is one entry in `PARTS`. Every ordered pair of one of ours with any other follows from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import composition_effects as effects
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from llmcompressor_moe import (
    BlockDropModifier,
    ExpertDropModifier,
    ExpertSparsityModifier,
    ExpertWidthModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
    RouterCalibrationModifier,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "composition.md"
EXPERTS = r"re:.*experts\.\d+\.(gate|up|down)_proj$"
ATTENTION = r"re:.*self_attn\.(q|k|v|o)_proj$"
BOTH = ("independent", "sequential")
UNEVEN_EXPERTS = {0: [1, 2], 2: [5]}


def _weights(bits: int, **options: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, symmetric=True, **options)


def w4a16() -> dict[str, QuantizationScheme]:
    """Experts in 4 bit, groups of 32."""
    return {
        "experts": QuantizationScheme(targets=[EXPERTS], weights=_weights(4, group_size=32, strategy="group"))
    }


def w8a8() -> dict[str, QuantizationScheme]:
    """Attention in 8 bit, activations too."""
    activations = _weights(8, strategy="token", dynamic=True)
    weights = _weights(8, strategy="channel")
    scheme = QuantizationScheme(targets=[ATTENTION], weights=weights, input_activations=activations)
    return {"attention": scheme}


@dataclass(frozen=True)
class Part:
    """A modifier as the table tries it.

    :param title: its name in the document
    :param make: fresh modifiers; some of upstream's only make sense as two
    :param effect: asserts that it did its work on everything that stayed
    :param ours: whether it is one of this package's
    :param pipelines: pipelines that it is tried in
    :param dtype: of the model
    :param refuses_after: part that stands anywhere after this one -> the message; "..." stands for names
    :param refuses_before: part that stands anywhere before this one -> the message
    :param refuses_first: the message where nothing stands before it
    """

    title: str
    make: Callable[[], list[Modifier]]
    effect: Callable[[effects.Outcome], None]
    ours: bool = False
    pipelines: tuple[str, ...] = BOTH
    dtype: torch.dtype = torch.float32
    refuses_after: Mapping[str, str] = field(default_factory=dict)
    refuses_before: Mapping[str, str] = field(default_factory=dict)
    refuses_first: str | None = None


_TWO_QUANTIZERS = (
    "... of the same recipe quantizes ... as well; let only one of them target it: add the experts to its ignore "
    "('re:.*experts.*'), or remove it and use attention_scheme and dense_scheme."
)
_QUANTIZED_BEFORE = (
    "... modules, ... among them, are quantized already, by an earlier modifier of the recipe or before it: let "
    "only one modifier target them (targets, ignore), and start from a model that is not quantized."
)
_SCALES_FOR_UNKNOWN = (
    "AWQModifier searches its scales for schemes that RouterAwareQuantModifier chooses only when it runs; "
    "remove it from the recipe and set algorithm='awq'."
)
_PRUNE_BEFORE_RAQ = (
    "ExpertSparsityModifier cannot prune experts that RouterAwareQuantModifier has quantized; put "
    "ExpertSparsityModifier before it."
)
_PRUNE_BEFORE = (
    "ExpertSparsityModifier cannot prune block ...: ... of its experts is quantized already, by the checkpoint "
    "or by an earlier modifier. Put ExpertSparsityModifier before the modifier that quantizes, and start from a "
    "checkpoint that is not quantized."
)
_WIDTH_BEFORE = "ExpertWidthModifier would undo what {} does to experts; put ExpertWidthModifier before it."
_WIDTH_BEFORE_QUANTIZING = (
    "ExpertWidthModifier cannot cut block ...: ... of its experts is quantized already, by the checkpoint or by "
    "an earlier modifier. Put ExpertWidthModifier before the modifier that quantizes."
)
_EXPERT_QUANTIZERS = ("quantization", "some_layers", "gptq", "awq", "autoround")

PARTS: dict[str, Part] = {
    "layer": Part("Layer Drop", lambda: [LayerDropModifier(num_drop=1)], effects.layers_gone, ours=True),
    "block": Part("Block Drop", lambda: [BlockDropModifier(num_drop=1)], effects.blocks_gone, ours=True),
    "expert": Part("Expert Drop", lambda: [ExpertDropModifier(num_drop=2)], effects.experts_gone, ours=True),
    "uneven": Part(
        "Expert Drop, uneven",
        lambda: [ExpertDropModifier(experts=UNEVEN_EXPERTS)],
        effects.experts_gone,
        ours=True,
        # The cut is that of Expert Drop, which is tried in both.
        pipelines=("independent",),
        refuses_after={
            "reap": "REAPPruningModifier assumes the same number of experts in every layer, and this "
            "ExpertDropModifier leaves different numbers. Put REAPPruningModifier before it, or use "
            "ExpertDropModifier(criterion='reap')."
        },
    ),
    "raq": Part(
        "Router-Aware Quant",
        lambda: [RouterAwareQuantModifier(group_size=32, target_bits=6.5)],
        effects.experts_in_two_schemes,
        ours=True,
        refuses_after={**dict.fromkeys(_EXPERT_QUANTIZERS, _TWO_QUANTIZERS), "awq": _SCALES_FOR_UNKNOWN},
        refuses_before=dict.fromkeys(_EXPERT_QUANTIZERS, _QUANTIZED_BEFORE),
    ),
    "sparsity": Part(
        "Expert Sparsity",
        lambda: [ExpertSparsityModifier(sparsity=0.5)],
        effects.experts_sparse_by_ratio,
        ours=True,
        refuses_before={**dict.fromkeys(_EXPERT_QUANTIZERS, _PRUNE_BEFORE), "raq": _PRUNE_BEFORE_RAQ},
    ),
    "width": Part(
        "Expert Width",
        lambda: [ExpertWidthModifier(drop_ratio=0.5)],
        effects.experts_narrow,
        ours=True,
        # It calibrates in a pass of its own and cuts before the others', in either pipeline.
        pipelines=("independent",),
        refuses_before={
            **dict.fromkeys(_EXPERT_QUANTIZERS, _WIDTH_BEFORE_QUANTIZING),
            "raq": _WIDTH_BEFORE.format("RouterAwareQuantModifier"),
            "sparsity": _WIDTH_BEFORE.format("ExpertSparsityModifier"),
            "sparsegpt": _WIDTH_BEFORE.format("SparseGPTModifier"),
            "wanda": _WIDTH_BEFORE.format("WandaPruningModifier"),
        },
    ),
    "calibration": Part(
        "Router Calibration",
        lambda: [RouterCalibrationModifier(steps=4)],
        effects.routers_fitted,
        ours=True,
        refuses_first="RouterCalibrationModifier mends what modifiers before it did, and there are none: put it "
        "after the drops or the quantization of the recipe.",
    ),
    "quantization": Part(
        "Quantization",
        lambda: [QuantizationModifier(config_groups=w4a16())],
        effects.experts_quantized,
        # GPTQ, built on it, is tried in both.
        pipelines=("independent",),
    ),
    "all_but_experts": Part(
        "Quantization of all but experts",
        lambda: [
            QuantizationModifier(
                targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*gate$", "re:.*experts.*"]
            )
        ],
        effects.all_but_experts_quantized,
        pipelines=("independent",),
    ),
    "some_layers": Part(
        "Quantization of some layers' experts",
        lambda: [QuantizationModifier(config_groups=w4a16(), ignore=[r"re:.*layers\.[13]\..*experts.*"])],
        effects.experts_of_some_layers_quantized,
        pipelines=("independent",),
    ),
    "gptq": Part(
        "GPTQ", lambda: [GPTQModifier(config_groups=w4a16(), block_size=32)], effects.experts_quantized
    ),
    "awq": Part(
        "AWQ + Quantization",
        lambda: [AWQModifier(n_grid=4), QuantizationModifier(config_groups=w4a16())],
        effects.experts_smoothed,
    ),
    "smoothquant": Part(
        "SmoothQuant + Quantization",
        lambda: [SmoothQuantModifier(), QuantizationModifier(config_groups=w8a8())],
        effects.attention_smoothed,
    ),
    "autoround": Part(
        "AutoRound",
        lambda: [AutoRoundModifier(config_groups=w4a16(), iters=2, enable_torch_compile=False)],
        effects.experts_quantized,
        dtype=torch.bfloat16,
    ),
    "sparsegpt": Part(
        "SparseGPT",
        lambda: [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=[EXPERTS], block_size=32)],
        effects.experts_sparse,
    ),
    "wanda": Part(
        "Wanda",
        lambda: [WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=[EXPERTS])],
        effects.experts_sparse,
        # SparseGPT, which shares its base, is tried in both.
        pipelines=("independent",),
    ),
    "reap": Part("REAP", lambda: [REAPPruningModifier(sparsity=0.25)], effects.experts_gone),
}
OURS = [name for name, part in PARTS.items() if part.ours]
UPSTREAM = [name for name, part in PARTS.items() if not part.ours]

# Recipes of more than two. "awq" and "smoothquant" are two modifiers each; here something stands between them.
LONGER: list[tuple[str, ...]] = [
    ("layer", "block", "expert"),
    ("expert", "block", "layer"),
    ("block", "expert", "layer"),
    ("layer", "block", "expert", "gptq"),
    ("layer", "reap", "expert", "quantization"),
    ("block", "expert", "awq"),
    ("smoothquant", "layer", "gptq"),
    ("layer", "sparsegpt", "quantization"),
    ("layer", "wanda", "autoround"),
    ("layer", "expert", "sparsity", "gptq"),
    ("block", "sparsity", "raq"),
    ("layer", "expert", "smoothquant", "raq"),
    ("layer", "expert", "calibration", "gptq"),
    ("expert", "awq", "calibration", "block"),
    ("sparsity", "raq", "calibration"),
    ("expert", "width", "raq"),
]
# Other families: where modifiers look layers up by the family's name.
BY_FAMILY = {"qwen3_moe": ("awq", "smoothquant", "autoround")}


@dataclass(frozen=True)
class Case:
    """One recipe under one pipeline on one family; `refused` is the message, None where it works."""

    order: tuple[str, ...]
    pipeline: str
    family: str = "mixtral"
    refused: str | None = None

    def __str__(self) -> str:
        return "-".join([*self.order, self.pipeline, self.family])

    def recipe(self) -> list[Modifier]:
        """Fresh modifiers."""
        return [modifier for name in self.order for modifier in PARTS[name].make()]

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return next(
            (PARTS[name].dtype for name in self.order if PARTS[name].dtype != torch.float32), torch.float32
        )


def pairs() -> list[tuple[str, str]]:
    """Every ordered pair with one of ours in it; a modifier is not paired with itself or its variant."""
    variants = {"expert", "uneven"}
    return [
        (first, second)
        for first in PARTS
        for second in PARTS
        if (PARTS[first].ours or PARTS[second].ours) and first != second and not {first, second} <= variants
    ]


def refused(order: tuple[str, ...]) -> str | None:
    """The message with which the recipe is refused; None if it works."""
    if PARTS[order[0]].refuses_first:
        return PARTS[order[0]].refuses_first
    for position, name in enumerate(order):
        for other in order[position + 1 :]:
            message = PARTS[name].refuses_after.get(other) or PARTS[other].refuses_before.get(name)
            if message is not None:
                return message
    return None


def cases() -> list[Case]:
    """Everything that is tried."""
    found = []
    for order in [*pairs(), *LONGER]:
        message = refused(order)
        pipelines = [p for p in BOTH if all(p in PARTS[name].pipelines for name in order)]
        found += [Case(order, p, refused=message) for p in pipelines[: 1 if message else None]]
    for family, names in BY_FAMILY.items():
        # The lookup is the same in both pipelines; block by block is the harder one.
        found += [
            Case(order, "sequential", family)
            for order in pairs()
            if set(order) & set(names) and "uneven" not in order and refused(order) is None
            # Takes a minute, and narrower experts have the names that they had.
            if not {"width", "autoround"} <= set(order)
        ]
    return found


def render() -> str:
    """docs/composition.md."""
    messages: list[str] = []

    def cell(first: str, second: str) -> str:
        if (first, second) not in pairs():
            return "-"
        message = refused((first, second))
        if message is None:
            return "works"
        if message not in messages:
            messages.append(message)
        return f"refused [{messages.index(message) + 1}]"

    def table(rows: list[str], columns: list[str]) -> list[str]:
        head = ["first \\ second", *(PARTS[name].title for name in columns)]
        body = [[PARTS[row].title, *(cell(row, column) for column in columns)] for row in rows]
        return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]

    lines = [*_INTRODUCTION]
    for title, rows, columns in (
        ("Ours first", OURS, UPSTREAM),
        ("llm-compressor's first", UPSTREAM, OURS),
        ("Ours with ours", OURS, OURS),
    ):
        lines += ["", f"## {title}", "", *table(rows, columns)]
    lines += ["", "## Refused", ""]
    lines += [f"{number}. {message}" for number, message in enumerate(messages, start=1)]
    lines += ["", "## Longer recipes", ""]
    lines += [f"- {', '.join(PARTS[name].title for name in order)}: works" for order in LONGER]
    return "\n".join([*lines, "", *_NOTES]) + "\n"


_INTRODUCTION = [
    "# Modifiers together",
    "",
    "Every ordered pair of one of our modifiers with another one, run on a tiny Mixtral under both pipelines",
    "(`independent` and `sequential`; uneven Expert Drop under `independent` only, as its cut is that of Expert",
    "Drop). Pairs with AWQ, SmoothQuant and AutoRound also run on a tiny Qwen3-MoE (Expert Width with the first",
    "two). *Works* means: the recipe",
    "ran through `oneshot(output_dir=...)`, `check` passes, the reloaded model gives the same logits within 1e-5,",
    "and both modifiers did their work on everything that stayed. *Refused* means: an error before anything runs,",
    "with the message below. Made by `python tests/composition_table.py` from the cases that",
    "`tests/test_composition.py` runs.",
]
_NOTES = [
    "## What is done for other modifiers",
    "",
    "- A dropped block or MoE layer stays in place, bypassed, until the recipe ends: names that other modifiers",
    "  remember stay valid.",
    "- AWQ and SmoothQuant scale a norm and the layers that read it. llm-compressor's lists leave out routers",
    "  and shared experts in most MoE families (Mixtral among them), which sends tokens to other experts than",
    "  before. Beside one of our modifiers AWQ gets lists with every reader, and SmoothQuant leaves MoE layers",
    "  alone. Mappings that you give yourself stay as they are. Where that is not enough, both are refused, with",
    "  the reason (`tests/test_smoothing.py` names the families, right and wrong).",
    "- AWQ runs on machines without an accelerator, too.",
    "- AutoRound turns the blocks that it tunes into bfloat16. Models in another dtype are refused: load the",
    "  model in bfloat16.",
    "- In the sequential pipeline all modifiers share one pass over the data. Experts are removed after it: the",
    "  others calibrate the model with all its experts, and Expert Drop scores it as it was.",
]

if __name__ == "__main__":
    DOCUMENT.write_text(render())
