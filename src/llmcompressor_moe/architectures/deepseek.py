"""DeepSeek-MoE (arXiv 2401.06066, deepseek-moe-16b): LLaMA's attention, routed and shared experts.

transformers begins with DeepSeek-V2. The published checkpoints bring code of their own, which is never run here.
This is LLaMA with the router and the experts of Qwen2-MoE, whose mathematics is the same, and with shared experts
that no gate scales.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, PreTrainedModel
from transformers import initialization as init
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter
from transformers.utils.output_capturing import OutputRecorder

__all__ = ["DeepseekConfig", "DeepseekForCausalLM", "DeepseekModel"]


@strict
class DeepseekConfig(LlamaConfig):
    """Sizes of a DeepSeek-MoE model; the defaults are those of deepseek-moe-16b.

    :param intermediate_size: width of the dense feed-forwards
    :param moe_intermediate_size: width of one routed expert
    :param n_routed_experts: routed experts per MoE layer
    :param n_shared_experts: experts that every token passes, each as wide as a routed one; None or 0 for none
    :param num_experts_per_tok: routed experts per token
    :param first_k_dense_replace: the first blocks, which are dense
    :param moe_layer_freq: of the other blocks, those whose index it divides have an MoE layer
    :param norm_topk_prob: whether the weights of a token's experts are scaled to a sum of 1
    :param scoring_func: ``softmax``
    """

    model_type = "deepseek"
    attribute_map: ClassVar = {"num_experts": "n_routed_experts"}

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1408
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def validate_architecture(self) -> None:
        """Called when a config is made.

        :raises ValueError: the model has another scoring function, or heads do not divide the hidden size;
            making a config raises it as a `StrictDataclassClassValidationError`
        """
        super().validate_architecture()
        if self.scoring_func != "softmax":
            raise ValueError(
                f"scoring_func is {self.scoring_func!r}; routers of model_type 'deepseek' know 'softmax' only."
            )


class DeepseekMoE(nn.Module):
    """Routed experts, and shared experts that are added unscaled."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.experts = Qwen2MoeExperts(config)
        self.gate = Qwen2MoeTopKRouter(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = DeepseekV2MLP(config, intermediate_size=width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the shape of its input [..., hidden size]."""
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(flat)
        routed = self.experts(flat, indices, weights).view_as(hidden_states)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """A block of LLaMA, with an MoE layer where the config has one."""

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0:
            self.mlp = DeepseekMoE(config)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    """What model and language model share."""

    config_class = DeepseekConfig
    _no_split_modules: ClassVar = ["DeepseekDecoderLayer"]
    _can_record_outputs: ClassVar = {
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Qwen2MoeExperts | Qwen2MoeTopKRouter):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """The blocks, without the language modeling head."""

    def __init__(self, config: DeepseekConfig):
        # LLaMA's own would build its own blocks.
        PreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DeepseekDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: DeepseekConfig):
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
