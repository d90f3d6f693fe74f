"""Architectures that the package brings: their logits against the equations of their papers, in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_models
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

from llmcompressor_moe.compression import compress
from llmcompressor_moe.inspection import inspect_model

CONFIGS = Path(__file__).parent / "data" / "configs"

Weights = dict[str, torch.Tensor]


def deepseek_logits(weights: Weights, ids: torch.Tensor, config: Any) -> torch.Tensor:
    """DeepSeek-MoE (arXiv 2401.06066, equations 9 to 11, in LLaMA's blocks) on one sequence, [length, vocabulary].

    :param weights: under the names of the published checkpoints
    """
    hidden = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        block = _under(f"model.layers.{index}.", weights)
        hidden = hidden + _attention(
            _norm(hidden, block["input_layernorm.weight"]), _under("self_attn.", block), config
        )
        inputs, mlp = _norm(hidden, block["post_attention_layernorm.weight"]), _under("mlp.", block)
        hidden = hidden + (_moe(inputs, mlp, config) if "gate.weight" in mlp else _feed_forward(inputs, mlp))
    return _norm(hidden, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def _under(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _norm(hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _feed_forward(inputs: torch.Tensor, weights: Weights) -> torch.Tensor:
    gate, up = inputs @ weights["gate_proj.weight"].T, inputs @ weights["up_proj.weight"].T
    return (silu(gate) * up) @ weights["down_proj.weight"].T


def _moe(inputs: torch.Tensor, weights: Weights, config: Any) -> torch.Tensor:
    shared = _under("shared_experts.", weights)
    outputs = _feed_forward(inputs, shared) if shared else torch.zeros_like(inputs)
    for token, affinities in enumerate((inputs @ weights["gate.weight"].T).softmax(-1)):
        chosen = affinities.argsort(descending=True)[: config.num_experts_per_tok]
        total = affinities[chosen].sum() if config.norm_topk_prob else 1
        for expert in chosen.tolist():
            gated = affinities[expert] / total
            outputs[token] += gated * _feed_forward(inputs[token], _under(f"experts.{expert}.", weights))
    return outputs


def _attention(inputs: torch.Tensor, weights: Weights, config: Any) -> torch.Tensor:
    length, size = len(inputs), config.hidden_size // config.num_attention_heads
    query, key, value = (
        (inputs @ weights[f"{name}_proj.weight"].T).view(length, -1, size).transpose(0, 1) for name in "qkv"
    )
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(*heads.chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    groups = config.num_attention_heads // config.num_key_value_heads
    key, value = rotated(key).repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = rotated(query) @ key.transpose(1, 2) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    heads = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    return heads.transpose(0, 1).reshape(length, -1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize(
    "values",
    [
        {"n_shared_experts": 2},
        {"n_shared_experts": None, "norm_topk_prob": True, "moe_layer_freq": 2, "moe_intermediate_size": 32},
    ],
    ids=["as published", "the config's other choices"],
)
def test_deepseek(values: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.build("deepseek", **values)
    model.save_pretrained(tmp_path)
    ids = support.token_ids(1)
    expected = deepseek_logits(load_file(tmp_path / "model.safetensors"), ids[0], model.config)
    torch.testing.assert_close(support.logits(model, ids)[0], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(support.logits(support.load(tmp_path), ids)[0], expected, atol=2e-5, rtol=1e-4)


def test_deepseek_refuses_other_scores(tmp_path: Path) -> None:
    config = tiny_models.tiny_config("deepseek").to_dict() | {"scoring_func": "sigmoid"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="scoring_func is 'sigmoid'"):
        inspect_model(tmp_path)


def test_deepseek_as_published(tmp_path: Path) -> None:
    """Fields of an older transformers, and code beside the weights: not run, and not named in what is written."""
    base, out = support.saved("deepseek", tmp_path), tmp_path / "out"
    published = json.loads((CONFIGS / "DeepSeek-MoE-16B-base" / "config.json").read_text())
    config = json.loads((base / "config.json").read_text())
    expected = support.logits(support.load(base))
    older = {name: published[name] for name in ("auto_map", "rope_theta", "rope_scaling", "seq_aux")}
    config = {name: value for name, value in config.items() if name in published or name == "dtype"} | older
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": config.pop("dtype")}))
    for name in ("modeling_deepseek.py", "configuration_deepseek.py"):
        (base / name).write_text("raise RuntimeError('code of a checkpoint was run')")
    torch.testing.assert_close(support.logits(support.load(base)), expected)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("default_stage: {default_modifiers: {BlockDropModifier: {blocks: [2]}}}")
    summary = compress(base, recipe, None, out)
    assert summary.needs_plugin
    assert "llmcompressor-moe-vllm" in (out / "README.md").read_text()
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    model = support.load(base)
    del model.model.layers[2]
    model.config.num_hidden_layers = 3
    torch.testing.assert_close(support.logits(support.load(out)), support.logits(model))
