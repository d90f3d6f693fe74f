"""Open or load checkpoints, trimmed and quantized ones too, and load their tokenizers; never from a hub."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.offload import dispatch_model
from compressed_tensors.quantization import QuantizationConfig, disable_quantization
from llmcompressor.utils.dev import get_main_device
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmcompressor_moe.checkpoint.opened import open_model
from llmcompressor_moe.checkpoint.reader import load_trimmed_moe
from llmcompressor_moe.checkpoint.rounding import round_activations
from llmcompressor_moe.compat.transformers.building import class_named
from llmcompressor_moe.inspection import inspect_model, read_config

__all__ = [
    "DTYPES",
    "load_callable",
    "load_decompressed",
    "load_model",
    "load_tokenizer",
    "open_as_served",
]

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
            model, found = class_named(architecture).from_pretrained(
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


def open_as_served(
    path: str | Path, dtype: str = "auto", device: torch.device | str | None = None
) -> PreTrainedModel:
    """A model to run block by block as it will be served, opened wherever that is the same.

    It is opened: weights are read from the files, and decoded, when they are used, and activations are rounded by
    the schemes of compressed-tensors (W8A8, FP8, NVFP4, a quantized KV cache). Inputs of models in other formats
    (block FP8, for example) are not rounded. An opened model runs on the main device, and has MoE layers; others
    are loaded as a whole, and so are checkpoints that round outputs.

    :param dtype: see `load_model`
    :param device: where it runs; None: an accelerator where there is one
    :raises ValueError: see `checkpoint.opened.open_model` and `load_model`
    """
    main = get_main_device()
    device = main if device is None else torch.device(device)
    elsewhere = device.type != main.type or device.index not in (None, main.index)
    if elsewhere or _rounds_outputs(path) or not inspect_model(path, schemes=()).moe_layers:
        return _on_device(load_decompressed(path, dtype), device)
    model = open_model(path, dtype=dtype, device=device)
    round_activations(model)
    return model


def load_callable(
    path: str | Path, dtype: str = "auto", device: torch.device | str | None = None
) -> PreTrainedModel:
    """A model as it will be served, to be called many times: loaded as a whole.

    :param dtype: see `load_model`
    :param device: all of it goes there; None: it is dispatched over all accelerators, and over the CPU where they
        are too small; without an accelerator it stays on the CPU
    :raises ValueError: see `load_model`
    """
    model = load_decompressed(path, dtype)
    if device is None and torch.accelerator.is_available():
        return dispatch_model(model).eval()
    return _on_device(model, torch.device(device or "cpu"))


def _on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    # transformers' own refuses quantized models.
    return nn.Module.to(model, device).eval()


def _rounds_outputs(path: str | Path) -> bool:
    """Whether a checkpoint of compressed-tensors has schemes for outputs, or for attention as a whole."""
    written = read_config(path).quantization
    if not written or written.get("quant_method") != "compressed-tensors":
        return False
    return any(
        scheme.output_activations is not None or scheme.weights is None
        for scheme in QuantizationConfig.model_validate(written).config_groups.values()
    )


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
