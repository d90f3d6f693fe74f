"""Write the dense model, and see that stock transformers reads it as it was meant."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from llmcompressor_moe.checkpoint.atomic import atomic_directory
from llmcompressor_moe.recovery.dense.parts import FeedForward, beside
from llmcompressor_moe.recovery.dense.siblings import (
    NoSiblingError,
    Sibling,
    dense_class,
    feed_forward_tensor,
)
from llmcompressor_moe.surgery.bypass import bypassed, num_outputs, silence
from llmcompressor_moe.topology import Topology

__all__ = ["DENSE_FILE", "write_dense"]

DENSE_FILE = "dense.json"
# Mean difference of logits over their spread; another norm or rotation gives about one.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def write_dense(
    model: PreTrainedModel,
    topology: Topology,
    sibling: Sibling,
    merged: Mapping[int, FeedForward],
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    probe: torch.Tensor,
    record: Callable[[int], str],
) -> None:
    """Write the sibling's checkpoint as a whole or not at all.

    :param model: the MoE model, whose other tensors are taken over
    :param merged: block index -> its feed-forward, all of one width
    :param probe: token ids, [1, tokens], on which both models are compared
    :param record: from the number of the dense model's parameters to the text of ``dense.json``
    :raises NoSiblingError: the dense model computes something else outside of the feed-forwards
    :raises OutputDirectoryError: the directory cannot be written; it is as it was
    """
    with atomic_directory(output) as directory:
        sibling.config.dtype = model.dtype
        sibling.config.save_pretrained(directory)
        state = _state(model, topology, sibling, merged)
        save_torch_state_dict(state, directory, metadata={"format": "pt"})
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        dense, found = dense_class(sibling.config).from_pretrained(
            directory, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
        wrong = sorted(
            [*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])]
        )
        if wrong:
            raise NoSiblingError(
                f"stock transformers does not read the {sibling.model_type} checkpoint whole ({wrong[0]} for one "
                f"of {len(wrong)} tensors); nothing was written. Please report the model."
            )
        _compare(model, topology, merged, dense.to(model.device), probe)
        (directory / DENSE_FILE).write_text(record(sum(p.numel() for p in dense.parameters())) + "\n")
        (directory / "README.md").write_text(_card(model, sibling))


def _state(
    model: PreTrainedModel, topology: Topology, sibling: Sibling, merged: Mapping[int, FeedForward]
) -> dict[str, torch.Tensor]:
    tied = (
        set(getattr(model, "all_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else ()
    )
    with torch.device("meta"):
        wanted = set(dense_class(sibling.config)(sibling.config).state_dict())
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name in wanted and name not in tied and not feed_forward_tensor(model, topology, name, sibling.mlp)
    }
    for index, ffn in merged.items():
        path = f"{topology.stack}.{index}."
        for name, value in (("gate_proj", ffn.gate), ("up_proj", ffn.up), ("down_proj", ffn.down)):
            state[f"{path}{sibling.matrices}{name}.weight"] = value.to("cpu", model.dtype).contiguous()
        if sibling.router is not None:
            state[f"{path}{sibling.router}"] = torch.zeros(1, model.config.hidden_size, dtype=model.dtype)
    return state


@torch.no_grad()
def _compare(
    model: PreTrainedModel,
    topology: Topology,
    merged: Mapping[int, FeedForward],
    dense: PreTrainedModel,
    probe: torch.Tensor,
) -> None:
    probe = probe.to(model.device)
    act = ACT2FN[getattr(dense.config, "hidden_act", None) or dense.config.hidden_activation]
    with contextlib.ExitStack() as stack:
        for block in topology.blocks:
            if block.moe is None:
                continue
            moe = model.get_submodule(block.moe.module)
            stack.enter_context(bypassed(moe, _forward(merged[block.index], act, moe, model.dtype)))
            for path in beside(model, block):
                module = model.get_submodule(path)
                stack.enter_context(bypassed(module, silence(module)))
        ours = model.eval()(input_ids=probe, use_cache=False).logits.float()
    theirs = dense.eval()(input_ids=probe, use_cache=False).logits.float()
    difference = float((ours - theirs).abs().mean() / ours.std().clamp_min(1e-12))
    if not difference <= _TOLERANCE.get(model.dtype, 3e-2):
        raise NoSiblingError(
            f"model_type={topology.model_type!r}: {dense.config.model_type!r} has the same tensors but computes "
            f"something else with them (logits differ by {difference:.2g} of their spread); nothing was written. "
            "Please report the model."
        )


def _forward(
    ffn: FeedForward, act: torch.nn.Module, moe: torch.nn.Module, dtype: torch.dtype
) -> Callable[..., Any]:
    outputs = num_outputs(type(moe))
    device = next(moe.parameters()).device
    gate, up, down = (value.to(device, dtype) for value in (ffn.gate, ffn.up, ffn.down))

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = (act(hidden_states @ gate.T) * (hidden_states @ up.T)) @ down.T
        return result if outputs == 1 else (result, *[None] * (outputs - 1))

    return forward


def _card(model: PreTrainedModel, sibling: Sibling) -> str:
    name = re.split(r"[\\/]", str(model.config._name_or_path or "").rstrip("/"))[-1] or "a Mixture of Experts"
    one = " with one expert per layer" if sibling.router else ""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags:",
            "- llmcompressor",
            "---",
            "",
            f"# {name}, made dense",
            "",
            f"The experts of `{name}` were merged into one feed-forward per block by llmcompressor-moe, and "
            f"written as a plain {sibling.model_type} checkpoint{one}; `{DENSE_FILE}` says how.",
            "It has not been trained since: distil it from the model that it came from before use.",
            "",
        ]
    )
