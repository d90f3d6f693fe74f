"""Save a model that was opened from a checkpoint: tensor by tensor, from file to file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressed_tensors import ModelCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.distributed import is_source_process
from llmcompressor.transformers.compression.compressed_tensors_utils import update_and_save_recipe
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.config_file import edit_config
from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, open_model, opened_from
from llmcompressor_moe.compat.llmcompressor.saving import mark_wrapped
from llmcompressor_moe.progress import progress
from llmcompressor_moe.saving.kept_quantization import describe_stored_quantization
from llmcompressor_moe.saving.leftovers import leftover_tensors
from llmcompressor_moe.saving.mtp import plan_mtp
from llmcompressor_moe.saving.save import save_says_what_it_is
from llmcompressor_moe.saving.shards import write_shards
from llmcompressor_moe.saving.tensors import output_tensors
from llmcompressor_moe.surgery.config import switch_off_mtp
from llmcompressor_moe.surgery.config_changes import ConfigChanges

__all__ = ["open_moe"]

_SHARD_BYTES = 5_000_000_000
# Larger files beside the weights are not settings.
_SMALL = 64 * 1024 * 1024
# Weights in any form, and code.
_NOT_CARRIED = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".onnx", ".h5", ".msgpack", ".pkl", ".py"),
)
_WRITTEN_NEW = ("README.md", "trimming.json", "recipe.yaml")


def open_moe(
    path: str | Path, *, dtype: str = "auto", requantize: bool = False, scratch: str | Path | None = None
) -> PreTrainedModel:
    """Open a checkpoint without loading it.

    The result is an ordinary transformers model with linearized experts, whose parameters are read from the
    checkpoint's files when they are used. It takes little memory, whatever its size. `oneshot` runs on it with
    any recipe. ``save_pretrained`` copies what the recipe did not change bit for bit, in its stored dtype and
    under its stored name. Parameters that a recipe changes are kept in a scratch folder until then. The
    checkpoint itself is never written.

    Example::

        model = open_moe("Qwen3-30B-A3B")
        oneshot(model=model, recipe=ExpertDropModifier(drop_ratio=0.25), dataset=data, output_dir="smaller")

    :param path: a checkpoint directory: bfloat16, float16 or float32; block FP8; MXFP4; compressed-tensors.
        Trimmed ones as well
    :param dtype: ``auto`` keeps every stored dtype; ``bfloat16``, ``float16`` or ``float32`` converts all weights
        that are not quantized
    :param requantize: write weights that are stored quantized in 16 bit, so that a recipe can quantize them
        otherwise; without it they keep their stored bytes
    :param scratch: folder in which parameters that change are kept; defaults to the system's temporary folder
    :raises FileNotFoundError: there is no config.json
    :raises ValueError: the files are damaged or do not fit the config, or the weights are stored in a form that
        cannot be read
    :raises NotAnMoEError: the model has no MoE layer
    """
    model = open_model(path, dtype=dtype, requantize=requantize, scratch=scratch)
    opened = opened_from(model)

    def save_pretrained(save_directory: str | Path, **kwargs: Any) -> None:
        _write(model, opened, Path(save_directory), **kwargs)

    mark_wrapped(save_pretrained)
    model.save_pretrained = save_pretrained
    save_says_what_it_is(model, ConfigChanges(model.config))
    return model


def _write(
    model: PreTrainedModel,
    opened: OpenedCheckpoint,
    directory: Path,
    quantization_format: str | None = None,
    save_compressed: bool = True,
    max_shard_size: int | str | None = None,
    **_: Any,
) -> None:
    compressor = ModelCompressor.from_pretrained_model(
        model, quantization_format=quantization_format if save_compressed else CompressionFormat.dense.value
    )
    if save_compressed:
        compressor.compress_model(model, skip_compressed=True)
    if not is_source_process():
        return
    mtp = plan_mtp(model, opened, quantizes=compressor.quantization_config is not None)
    if not mtp.keep:
        switch_off_mtp(model.config)
    model._mtp_note = mtp.note
    tensors = [*output_tensors(model, opened), *leftover_tensors(model, opened, mtp)]
    total = sum(tensor.nbytes for tensor in tensors)
    with progress(total, "Writing", nbytes=total, unit="B", unit_scale=True) as advance:
        write_shards(directory, tensors, _as_bytes(max_shard_size or _SHARD_BYTES), advance)
    for file in carried_files(opened.path):
        # Without its mode: those of a read-only checkpoint are written to.
        shutil.copyfile(file, directory / file.name)
    edit_config(directory, lambda config: _describe_stored(config, model, opened))
    compressor.update_config(str(directory))
    update_and_save_recipe(str(opened.path), str(directory))


def _describe_stored(config: dict[str, Any], model: PreTrainedModel, opened: OpenedCheckpoint) -> None:
    """What a config says of how weights are stored, and of code."""
    describe_stored_quantization(config, model, opened)
    # The code that it names is not carried along; transformers' classes, or ours, built the model.
    config.pop("auto_map", None)
    for level in (config, config.get("text_config") or {}):
        for name in ("dtype", "torch_dtype"):
            if name in level and opened.dtype is not None:
                level[name] = str(opened.dtype).removeprefix("torch.")


def _as_bytes(size: int | str) -> int:
    from transformers.utils.hub import convert_file_size_to_int

    return convert_file_size_to_int(size)


def carried_files(path: Path) -> Iterator[Path]:
    """Files beside the weights that belong to a model whatever is done to it: configs, tokenizer, processors,
    chat templates, licence.
    """
    for file in sorted(path.iterdir()):
        skipped = file.name.endswith(_NOT_CARRIED) or file.name in _WRITTEN_NEW
        if file.is_file() and not skipped and not file.name.startswith(".") and file.stat().st_size <= _SMALL:
            yield file
