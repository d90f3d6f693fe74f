"""Which stored tensors make up a plain weight, as a checkpoint's ``quantization_config`` and headers say it.

Released checkpoints store a weight in many ways: FP8 with a scale per block, packed integers, FP4. Here each
becomes one `Encoded`: a logical name, its stored tensors by role, and the codec (``decoding``) that turns them
into the plain weight. Only names, shapes and dtypes are looked at; no file is opened.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import is_match, match_targets

from llmcompressor_moe.checkpoint.decoding import (
    BlockFp4,
    BlockFp8,
    Codec,
    Mxfp4,
    Mxfp4Blocks,
    NvFp4,
    PackedInt,
    PlainInt8,
    ScaledFp8,
)
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, TensorInfo

__all__ = ["Encoded", "UnreadablePrecisionError", "logical_tensors", "refuse_unreadable"]

_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
# Scales that are exponents: 2 ** (byte - 127).
_EXPONENTS = frozenset({"U8", "F8_E8M0"})
_DEFAULT_BLOCK = (128, 128)

_READABLE = ("compressed-tensors", "fp8", "mxfp4")
_UNQUANTIZED = "start from the model's unquantized release"
_CONVERT = "convert it first with compressed_tensors.entrypoints.convert.convert_checkpoint and"
_WAYS_OUT = {
    "gptq": f"{_UNQUANTIZED}, and quantize the result with llm-compressor's GPTQModifier",
    "awq": f"{_CONVERT} AutoAWQConverter, or {_UNQUANTIZED}",
    "bitsandbytes": f"load it in transformers and save what model.dequantize() returns, or {_UNQUANTIZED}",
    "modelopt": f"{_CONVERT} ModelOptNvfp4Converter (NVFP4 only), or {_UNQUANTIZED}",
    "auto-round": f"export it again from AutoRound with format='llm_compressor', or {_UNQUANTIZED}",
}
# Formats that compressed-tensors has given up.
_SPARSE_FORMATS = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")

# Local names of what compressed-tensors stores for a module beside its bias.
_LOCAL = re.compile(
    r"weight|(weight|input|output)_(packed|scale|zero_point|global_scale|g_idx|shape)|[qkv]_(scale|zero_point)"
)


class UnreadablePrecisionError(ValueError):
    """Weights are stored in a way that cannot be turned into plain ones; the message names the way out."""


@dataclass(frozen=True)
class Encoded:
    """One logical tensor and the stored tensors that it is made of.

    :param name: logical name, for example ``model.layers.3.mlp.experts.0.up_proj.weight``, or
        ``model.layers.3.mlp.experts.gate_up_proj``
    :param parts: role -> stored name. Roles are those that the codec takes; what else is stored for the module,
        such as scales of its inputs, is listed under its own suffix
    :param inputs: how inputs of its module are rounded; None where they are not, or where that cannot be told
    :param shape: of the logical tensor. Integers packed per channel or tensor do not say how many columns there
        are: the number is exact if their bits fill whole I32, and ``weight_shape`` decides when decoded
    """

    name: str
    parts: dict[str, str]
    shape: tuple[int, ...]
    codec: Codec
    inputs: QuantizationArgs | None = None


def logical_tensors(
    layout: CheckpointLayout | Mapping[str, TensorInfo], quantization_config: dict[str, Any] | None
) -> tuple[dict[str, Encoded], set[str]]:
    """The encoded tensors of a checkpoint.

    :param layout: the checkpoint, or its tensors by stored name
    :param quantization_config: what config.json says under that name; None or empty for plain checkpoints
    :return: logical name -> encoded tensor, and the stored names that belong to one. Every other stored tensor
        is plain
    :raises UnreadablePrecisionError: the method cannot be read, scales are missing or do not fit, or config and
        tensors contradict each other; names the tensors and the field
    """
    tensors = layout.tensors if isinstance(layout, CheckpointLayout) else layout
    found: list[Encoded] = []
    if quantization_config:
        refuse_unreadable(quantization_config, "config.json")
        readers = {"fp8": _read_fp8, "mxfp4": _read_mxfp4, "compressed-tensors": _read_compressed}
        found = list(readers[quantization_config["quant_method"]](tensors, quantization_config))
    claimed = {stored for encoded in found for stored in encoded.parts.values()}
    for encoded in found:
        if encoded.name in tensors and encoded.name not in claimed:
            raise UnreadablePrecisionError(
                f"{encoded.name} is stored twice: plain, and as {next(iter(encoded.parts.values()))}. Keep one."
            )
    for name, tensor in tensors.items():
        if tensor.dtype in _FP8 and name not in claimed:
            raise _bare_fp8(tensor, tensors)
    return {encoded.name: encoded for encoded in found}, claimed


def refuse_unreadable(quantization_config: dict[str, Any], where: str) -> None:
    """Check that the weights of a checkpoint can be decoded at all.

    :param quantization_config: not empty
    :param where: what the error names first, such as the checkpoint's path
    :raises UnreadablePrecisionError: they cannot; names ``quant_method`` and what to do instead
    """
    producer = quantization_config.get("producer")
    made_by = producer.get("name") if isinstance(producer, dict) else None
    method = quantization_config.get("quant_method") or made_by
    if method not in _READABLE:
        family = str(method).lower().replace("_", "-").removeprefix("intel/")
        # ModelOpt's methods say their precision: modelopt_fp4, modelopt_mixed
        way_out = _WAYS_OUT.get("modelopt" if family.startswith("modelopt") else family, _UNQUANTIZED)
        raise UnreadablePrecisionError(
            f"{where}: quantization_config.quant_method is {method!r}; plain weights can be read from "
            f"{', '.join(_READABLE)} only. Way out: {way_out}."
        )
    sparsity = quantization_config.get("sparsity_config") or {}
    for field, form in (
        ("format", quantization_config.get("format")),
        ("sparsity_config.format", sparsity.get("format")),
    ):
        if form in _SPARSE_FORMATS:
            raise UnreadablePrecisionError(
                f"{where}: quantization_config.quant_method is {method!r} with {field} {form!r}, which "
                f"compressed-tensors no longer reads. Way out: {_UNQUANTIZED}."
            )


def _bare_fp8(weight: TensorInfo, tensors: Mapping[str, TensorInfo]) -> UnreadablePrecisionError:
    names = _scale_names(weight.name)
    scale = next((name for name in names if name in tensors), None)
    if scale is None:
        what = f"its scale {names[0]} is missing. Download the checkpoint again, with all of its files"
    else:
        what = f"quantization_config does not say what {scale} means. Restore the config.json of the release"
    return UnreadablePrecisionError(f"{weight.name} is stored as {weight.dtype}, but {what}.")


def _scale_names(weight: str) -> list[str]:
    """Names that checkpoints give the scale of a weight, most common first."""
    if weight.endswith(".weight"):
        return [f"{weight}_scale_inv", f"{weight}_scale", f"{weight.removesuffix('.weight')}.scale"]
    return [f"{weight}_scale_inv", f"{weight}_scale"]


def _read_fp8(tensors: Mapping[str, TensorInfo], config: dict[str, Any]) -> Iterator[Encoded]:
    block = config.get("weight_block_size", _DEFAULT_BLOCK)
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if block is not None and not (is_pair and all(isinstance(size, int) and size > 0 for size in block)):
        raise UnreadablePrecisionError(
            f"quantization_config.weight_block_size is {block!r}; it must be two whole numbers above 0, or null "
            "for one scale per tensor."
        )
    for name, weight in tensors.items():
        scale = next((tensors[scale] for scale in _scale_names(name) if scale in tensors), None)
        if scale is None or weight.dtype not in {*_FP8, "I8"}:
            continue
        parts = {"weight": name, "scale": scale.name}
        stem = f"{name.removesuffix('.weight')}." if name.endswith(".weight") else f"{name}_"
        for extra in ("activation_scale", "input_scale"):
            if f"{stem}{extra}" in tensors:
                parts[extra] = f"{stem}{extra}"
        shape = weight.shape
        if weight.dtype == "I8":
            shape = (*shape[:-1], 2 * shape[-1])
        fits = _block_of(shape, scale.shape, block, stacks="gate_up_proj" in name)
        if fits is None:
            raise UnreadablePrecisionError(
                f"{scale.name} has shape {list(scale.shape)}, which does not fit {name} of shape {list(shape)} "
                f"with quantization_config.weight_block_size {block!r}. Restore the config.json of the release."
            )
        fused = len(shape) == 3 and all(tensors[part].shape[:1] == shape[:1] for part in parts.values())
        codec = BlockFp4 if weight.dtype == "I8" else BlockFp8
        yield Encoded(name, parts, shape, codec(*fits, expert_axis=0 if fused else None))


def _block_of(
    shape: tuple[int, ...], scale: tuple[int, ...], configured: tuple[int, int] | None, stacks: bool
) -> tuple[tuple[int, int], int] | None:
    """Rows and columns of a block, and how many projections are stacked; None where scales do not fit."""
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:]
    if math.prod(scale) == 1:
        scale = (1,) * len(shape)
    *before, down, across = (*scale, *[1] * (len(shape) - len(scale)))
    if tuple(before) != shape[:-2] or not down or not across:
        return None
    if configured is not None:
        height, width = configured
        if across == math.ceil(columns / width):
            if down == math.ceil(rows / height):
                return (height, width), 1
            # gate and up had blocks of their own before they were stacked
            if stacks and rows % 2 == 0 and down == 2 * math.ceil(rows // 2 / height):
                return (height, width), 2
    # As transformers does: parts of a checkpoint may have other blocks than its config says.
    if rows % down or columns % across:
        return None
    return (rows // down, columns // across), 1


def _read_mxfp4(tensors: Mapping[str, TensorInfo], config: dict[str, Any]) -> Iterator[Encoded]:
    for name, blocks in tensors.items():
        if not name.endswith("_blocks") or blocks.dtype != "U8":
            continue
        logical = name.removesuffix("_blocks")
        scales = tensors.get(f"{logical}_scales")
        if scales is None:
            raise UnreadablePrecisionError(
                f"{name} is stored as MXFP4, but its scales {logical}_scales are missing. Download the checkpoint "
                "again, with all of its files."
            )
        if len(blocks.shape) != 4 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:-1]:
            raise UnreadablePrecisionError(
                f"{name} has shape {list(blocks.shape)} and {scales.name} {list(scales.shape)}; fused MXFP4 "
                "experts have [experts, rows, groups, 16] and [experts, rows, groups]. Download both again."
            )
        experts, rows, groups, _ = blocks.shape
        yield Encoded(
            logical, {"blocks": name, "scales": scales.name}, (experts, 32 * groups, rows), Mxfp4Blocks()
        )


def _read_compressed(tensors: Mapping[str, TensorInfo], config: dict[str, Any]) -> Iterator[Encoded]:
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, local = name.rpartition(".")
        if _LOCAL.fullmatch(local):
            modules[module][local] = tensor
    schemes = _Schemes(config)
    for module, stored in modules.items():
        weight = stored.get("weight_packed") or stored.get("weight")
        if weight is None or ("weight_packed" not in stored and weight.dtype not in {*_FP8, "I8"}):
            continue
        if "weight_scale" not in stored:
            raise UnreadablePrecisionError(
                f"{weight.name} is stored as {weight.dtype}, but its scale {module}.weight_scale is missing. "
                "Download the checkpoint again, with all of its files."
            )
        scheme = schemes.of(module)
        codec, shape = _codec_of(weight, stored, scheme.weights)
        parts = {local: tensor.name for local, tensor in stored.items()}
        yield Encoded(f"{module}.weight", parts, shape, codec, scheme.input_activations)


def _codec_of(
    weight: TensorInfo, stored: dict[str, TensorInfo], weights: QuantizationArgs
) -> tuple[Codec, tuple[int, int]]:
    """The codec of a compressed module and its weight's shape: by how it is stored, with the config's numbers."""
    scale = stored["weight_scale"]
    kind = (weight.dtype, weights.type)
    packed = "weight_packed" in stored
    if len(weight.shape) == 2:
        rows, width = weight.shape
        if packed and kind == ("I32", "int"):
            by_group = weights.group_size is not None and weights.group_size > 0
            columns = scale.shape[-1] * weights.group_size if by_group else width * 32 // weights.num_bits
            zero_point = weights.symmetric or "weight_zero_point" in stored
            if zero_point and math.ceil(columns * weights.num_bits / 32) == width:
                return PackedInt(weights, (rows, columns)), (rows, columns)
        if packed and kind == ("U8", "float") and weights.num_bits == 4:
            if scale.dtype in _EXPONENTS:
                return Mxfp4(weights), (rows, 2 * width)
            if "weight_global_scale" in stored:
                return NvFp4(weights), (rows, 2 * width)
        if not packed and weights.num_bits <= 8:
            if weight.dtype in _FP8 and kind[1] == "float":
                return ScaledFp8(weights), (rows, width)
            if kind == ("I8", "int"):
                return PlainInt8(weights), (rows, width)
    beside = ", ".join(f"{local} {tensor.dtype}{list(tensor.shape)}" for local, tensor in stored.items())
    raise UnreadablePrecisionError(
        f"{weight.name} is stored with {beside}; quantization_config.config_groups says "
        f"{'symmetric' if weights.symmetric else 'asymmetric'} {weights.type} weights of {weights.num_bits} "
        f"bits per {weights.strategy} (group_size {weights.group_size}), which is stored otherwise. Restore "
        "the config.json of the release."
    )


class _Schemes:
    """Which scheme a compressed-tensors config gives a module.

    :param config: ``quantization_config``
    :raises UnreadablePrecisionError: compressed-tensors refuses it
    """

    def __init__(self, config: dict[str, Any]):
        try:
            parsed = QuantizationConfig.model_validate(config)
            for name in [
                *(parsed.ignore or []),
                *(t for s in parsed.config_groups.values() for t in s.targets),
            ]:
                re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except (ValueError, re.error) as error:
            raise UnreadablePrecisionError(
                f"quantization_config cannot be read by compressed-tensors: {error}. Restore the config.json of "
                "the release."
            ) from error
        # As compressed-tensors applies it: of equal targets the last group counts.
        self._schemes: dict[str, QuantizationScheme] = {
            target: scheme for scheme in parsed.config_groups.values() for target in scheme.targets
        }
        self._patterns = [target for target in self._schemes if not _is_path(target)]
        self._ignored = set(parsed.ignore or [])
        self._ignored_patterns = [name for name in self._ignored if not _is_path(name)]
        with torch.device("meta"):
            self._classes = (torch.nn.Linear(1, 1), torch.nn.Embedding(1, 1))

    def of(self, module: str) -> QuantizationScheme:
        """The scheme of a module that is stored compressed.

        :raises UnreadablePrecisionError: it is ignored, or no group or several fit
        """
        linear = self._classes[0]
        if module in self._ignored or is_match(module, linear, self._ignored_patterns):
            raise UnreadablePrecisionError(
                f"{module} is stored compressed, but quantization_config.ignore leaves it plain. Restore the "
                "config.json of the release."
            )
        scheme = self._schemes.get(module)
        for of_class in self._classes:
            if scheme is None:
                matched = match_targets(module, of_class, self._patterns)
                scheme = self._schemes[matched[0]] if matched else None
        candidates = [scheme] if scheme is not None else list(self._schemes.values())
        found: list[QuantizationScheme] = []
        for candidate in candidates:
            bare = candidate.model_copy(update={"targets": []})
            if bare.weights is not None and bare not in found:
                found.append(bare)
        # Targets may name modules as transformers does, not as the checkpoint: one scheme leaves no doubt.
        if len(found) == 1:
            return found[0]
        raise UnreadablePrecisionError(
            f"{module} is stored compressed, but quantization_config.config_groups does not say how: its targets "
            f"({', '.join(list(self._schemes)[:4])}, ...) give its weights {len(found)} schemes. Add it to the "
            "targets of its group."
        )


def _is_path(target: str) -> bool:
    """Whether a target can only be the name of one module: no pattern and no class."""
    return "." in target and not target.startswith("re:")
