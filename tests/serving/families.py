"""Which families vLLM 0.32 serves on a CPU, what their tiny models need for it, and what stops the others."""

from typing import Any

_NO_SPARSE_ATTENTION = "vLLM has no sparse attention for a CPU"
_NO_SIGMOID_ROUTER = "vLLM's router for a CPU scores with softmax unless experts are in groups"
_BFLOAT16 = "vLLM's linear attention for a CPU computes in bfloat16"
_TORCHVISION = "vLLM's module needs torchvision, of which PyPI has no build for a CPU"
_PROCESSOR = "vLLM wants the image processor of a real checkpoint"

# model_type -> what its checkpoints say in config.json and the transformers config class does not.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "glm4_moe": {"head_dim": 32},
    "granitemoe": {},
    "gpt_oss": {},
    # vLLM's KV blocks, 32 tokens at least on a CPU, must divide a chunk.
    "llama4_text": {"attention_chunk_size": 32},
    "deepseek": {},
    "deepseek_v2": {},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "afmoe": {
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "exaone_moe": {},
    "glm4_moe_lite": {
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "qk_norm": True, "route_norm": True},
    # vLLM takes the embedding for the head, and a window for one token longer than transformers does.
    "cohere2_moe": {"tie_word_embeddings": True, "sliding_window": 64},
    "lfm2_moe": {"tie_word_embeddings": True},
    "granitemoe_swa": {},
    "granitemoehybrid": {},
    "granitemoeshared": {},
    # The rest has no class of its own in vLLM: transformers builds the layers.
    "flex_olmo": {},
    "hunyuan_v1_moe": {},
    "mellum": {},
    "solar_open": {},
}

# What stops an untouched tiny model.
NOT_SERVED: dict[str, str] = {
    "axk1": "vLLM expects a norm in dense layers that transformers' model lacks",
    "axk2": "vLLM's latent attention has no kernel for its head size",
    "deepseek_ocr2": _PROCESSOR,
    "deepseek_v32": _NO_SPARSE_ATTENTION,
    "deepseek_v4": _NO_SPARSE_ATTENTION,
    "dots1": "vLLM's transformers backend never returns from its router",
    "ernie4_5_moe": "vLLM's router for a CPU leaves out the correction bias",
    "ernie4_5_vl_moe": _PROCESSOR,
    "gemma4_text": "nothing of it can be dropped; untouched it is served",
    "glm4v_moe": _TORCHVISION,
    "glm5_next": _TORCHVISION,
    "glm_moe_dsa": _NO_SPARSE_ATTENTION,
    "hy_v4": _NO_SPARSE_ATTENTION,
    "inkling_text": "vLLM wants the tokenizer of a real checkpoint",
    "jamba": "vLLM has no selective scan for a CPU",
    "kimi_linear": "vLLM's module needs CUDA libraries",
    "laguna": _NO_SIGMOID_ROUTER,
    "mimo_v2_flash": "vLLM reads the config of the original checkpoints, which transformers' class cannot write",
    "minimax": "vLLM's transformers backend has no linear attention",
    "minimax_m2": _NO_SIGMOID_ROUTER,
    "minimax_m3_vl_text": _NO_SIGMOID_ROUTER,
    "mistral4": "vLLM's latent attention has no kernel for its head size",
    "nemotron_h": "vLLM has no experts without a gate for a CPU",
    "phimoe": "vLLM's transformers backend calls its router wrongly",
    "qwen3_5_moe_text": f"{_TORCHVISION}; with it {_BFLOAT16}",
    "qwen3_next": _BFLOAT16,
    "qwen3_omni_moe_thinker": _PROCESSOR,
    "qwen3_vl_moe": _TORCHVISION,
    "qwen4_exp_text": _TORCHVISION,
    "step3p7": f"{_TORCHVISION}; with it vLLM asks the vision config for `width`, `layers` and `heads`, which "
    "transformers' class renames",
    "zaya": "vLLM's transformers backend gives other log-probabilities than transformers",
}
