"""The one table of exceptions: what the structure of a model cannot tell.

Everything else in this package reads a model's structure. A family enters this table only when the structure
is ambiguous or the family breaks a rule that all others keep, and every entry says why.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MTP_COUNTS", "MTP_SWITCHES", "FamilyException", "exception_for", "refused_families"]

# How configs announce multi-token-prediction (MTP) layers: by their number, and some by a switch beside it.
# transformers leaves those layers out, so a model's structure tells nothing of them.
MTP_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
MTP_SWITCHES = ("use_mtp",)


@dataclass(frozen=True)
class FamilyException:
    """What one family does differently.

    :param refuse_layer_drop: reason why an MoE layer of this family cannot be dropped, if so
    :param refuse_expert_drop: reason why experts of this family cannot be dropped, if so
    :param refuse_block_drop: reason why blocks of this family cannot be dropped, if so
    :param refuse_uneven: reason why layers of this family must all keep the same number of experts and none
        be dropped, if so
    :param position_period: readers take a block's kind of attention from its index modulo this, whatever the
        config lists; blocks may only move by multiples of it
    :param refuse_quantized_experts: reason why vLLM cannot serve quantized experts of this family, if so
    :param refuse_partly_quantized: reason why vLLM cannot serve this family with quantized experts in some
        layers and 16-bit ones in others, if so
    :param router_follows_config: vLLM quantizes the routers of this family where a quantization config does not
        leave them out; those of other families it always runs plain
    :param router_scores: the function by which its routers score experts ("softmax"), where the weights that they
        return follow from no function of the logits alone
    :param refuse: reason why nothing of this family can be trimmed, if so
    """

    refuse_layer_drop: str | None = None
    refuse_expert_drop: str | None = None
    refuse_block_drop: str | None = None
    refuse_uneven: str | None = None
    position_period: int = 1
    refuse_quantized_experts: str | None = None
    refuse_partly_quantized: str | None = None
    router_follows_config: bool = False
    router_scores: str | None = None
    refuse: str | None = None


_READS_COUNT_ITSELF = (
    "its config class reads the expert count of the whole model while it is built, which a config with "
    "per-layer counts forbids"
)
_IN_THE_BLOCK = (
    "its router and experts stand directly in the block, beside a dense layer, and its config derives "
    "per-layer attention shapes that a cut would have to rewrite"
)
_TOKEN_TABLE = (
    "the routers of its first layers assign experts to token ids by a fixed table, which has no meaning "
    "for other experts"
)
_ONE_MATRIX = "its router scores routed and shared experts with one matrix, which this version does not cut"
_SKIP_CLASS = (
    "its router has one output more than there are experts, for skipping, which this version does not cut"
)
_HANDED_ON = "its routers hand a state from block to block, which a missing block would change"
_TWO_KINDS = (
    "its config counts the experts for text and those for images with one number, and calibration on text reaches "
    "only the former"
)
_ENCODER_DECODER = (
    "it is an encoder-decoder with MoE layers in both stacks, and `per_layer_config` describes one stack"
)
_PLACE_MATTERS = (
    "the decay of its linear attention depends on a block's place among all blocks, so every block after "
    "a dropped one would compute something else"
)

_EXCEPTIONS: dict[str, FamilyException] = {
    "axk2": FamilyException(refuse_uneven=_READS_COUNT_ITSELF),
    "qwen4_exp_text": FamilyException(refuse_uneven=_READS_COUNT_ITSELF),
    "ernie4_5_vl_moe_text": FamilyException(
        refuse_expert_drop=_TWO_KINDS,
        refuse_quantized_experts="its files number the experts for text and for images together, and vLLM 0.32 "
        "looks their schemes up apart",
    ),
    "gemma4_text": FamilyException(_IN_THE_BLOCK, _IN_THE_BLOCK, _IN_THE_BLOCK),
    "diffusion_gemma_text": FamilyException(_IN_THE_BLOCK, _IN_THE_BLOCK, _IN_THE_BLOCK),
    "deepseek_v4": FamilyException(refuse_expert_drop=_TOKEN_TABLE),
    "inkling_text": FamilyException(refuse_expert_drop=_ONE_MATRIX),
    "zaya": FamilyException(refuse_expert_drop=_SKIP_CLASS, refuse_block_drop=_HANDED_ON),
    # vLLM 0.32 slides every other block, whatever `layer_types` says.
    "gpt_oss": FamilyException(
        position_period=2,
        refuse_quantized_experts="vLLM 0.32 loads experts that compressed-tensors packed into other values",
    ),
    "step3p5": FamilyException(
        refuse_quantized_experts="vLLM 0.32 reads single experts of this family under `moe.experts`, and this "
        "version writes them under `mlp.experts`"
    ),
    "llama4_text": FamilyException(
        refuse_partly_quantized="vLLM 0.32 expects either single experts or fused ones in all layers, and "
        "those in 16 bit are stored fused"
    ),
    # SparseMixer (arXiv 2409.12136) samples experts from the softmax of the logits, and weighs each by a softmax
    # over those whose logits are close to its own.
    "phimoe": FamilyException(router_scores="softmax"),
    "minimax": FamilyException(refuse_block_drop=_PLACE_MATTERS),
    "switch_transformers": FamilyException(refuse=_ENCODER_DECODER),
    "nllb-moe": FamilyException(refuse=_ENCODER_DECODER),
    "dbrx": FamilyException(
        refuse="it stores the experts of a layer as one matrix for each projection, and counts them in "
        "`ffn_config`, where `per_layer_config` cannot reach"
    ),
    "jetmoe": FamilyException(
        refuse="its attention is a mixture of experts as well, which shares their number with the feed-forward"
    ),
    "longcat_flash": FamilyException(
        refuse="its routers also choose zero experts, which return their input and have no weights, and each of "
        "its blocks counts as two layers"
    ),
    "qwen3_omni_moe": FamilyException(
        refuse="transformers gives the whole model no forward, only `generate`, so nothing can be calibrated or "
        "compared, and its talker has MoE layers as well. Its thinker works: load the whole in transformers, and "
        "save that part alone (`model.thinker.save_pretrained`)"
    ),
    # vLLM 0.32 hands its quantization config to these routers.
    "qwen3_moe": FamilyException(router_follows_config=True),
    "qwen3_vl_moe_text": FamilyException(router_follows_config=True),
    "qwen3_omni_moe_text": FamilyException(router_follows_config=True),
    "lfm2_moe": FamilyException(router_follows_config=True),
}


def exception_for(model_type: str) -> FamilyException:
    """Return the table's entry for a ``model_type``; families that keep all rules get an empty one."""
    return _EXCEPTIONS.get(model_type, FamilyException())


def refused_families() -> dict[str, str]:
    """Families of which nothing can be trimmed: ``model_type`` -> reason."""
    return {name: found.refuse for name, found in _EXCEPTIONS.items() if found.refuse is not None}
