"""Load checkpoints, trimmed and quantized ones too, and their tokenizers; never from a hub."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from compressed_tensors.quantization import disable_quantization
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmcompressor_moe.checkpoint.reader import load_trimmed_moe
from llmcompressor_moe.inspection import inspect_model

__all__ = ["DTYPES", "load_decompressed", "load_model", "load_tokenizer"]

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(path: str | Path, dtype: str = "auto", architecture: str | None = None) -> PreTrainedModel:
    """A model in a directory.

    :param dtype: ``auto`` (what the config names) or a dtype's name
    :param architecture: class of transformers; None looks into the config
    :raises FileNotFoundError: there is no config.json
    :raises ValueError: it is no model that transformers can build, or its weights do not fit its config
    """
    architecture = architecture or inspect_model(path, schemes=()).architecture
    with load_trimmed_moe():
        try:
            model, found = getattr(transformers, architecture).from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"model {str(path)!r}: its weights cannot be loaded ({' '.join(str(error).split())}); "
                "`llmcompressor-moe check` says more."
            ) from error
    if found["missing_keys"]:
        raise ValueError(
            f"model {str(path)!r}: its files lack {len(found['missing_keys'])} weights that its config demands, "
            f"{min(found['missing_keys'])} for one; copy it again. `llmcompressor-moe check` says more."
        )
    return model


def load_decompressed(path: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """A model as it will be served, its weights decompressed once instead of at every forward.

    Weights have the values that their schemes give them, and inputs are rounded where schemes round them.

    :param dtype: see `load_model`; of everything, once it has been decompressed
    :raises ValueError: see `load_model`
    """
    quantized = inspect_model(path, schemes=()).quantization is not None
    model = load_model(path, "auto" if quantized else dtype)
    if not quantized:
        return model
    model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        if scheme.input_activations is None:
            disable_quantization(module)
        else:
            # Weights are rounded already.
            module.quantization_scheme = scheme.model_copy(update={"weights": None})
    # transformers' own refuses quantized models.
    return model if dtype == "auto" else nn.Module.to(model, getattr(torch, dtype))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's directory.

    :raises ValueError: there is none
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"model {str(path)!r}: its tokenizer cannot be loaded ({error}); put the tokenizer files beside "
            "config.json."
        ) from error
