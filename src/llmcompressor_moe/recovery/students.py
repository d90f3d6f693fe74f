"""Load a checkpoint as a model that can train, and save what it has become as a checkpoint of the same kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.distributed import is_source_process
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained
from transformers import PreTrainedModel

from llmcompressor_moe.check import CheckReport, check_checkpoint
from llmcompressor_moe.check.expected import model_class
from llmcompressor_moe.check.report import RESEARCH_CODES
from llmcompressor_moe.checkpoint.atomic import atomic_directory
from llmcompressor_moe.checkpoint.layout import INDEX_NAME
from llmcompressor_moe.inspection import read_config
from llmcompressor_moe.loading import DTYPES, load_model
from llmcompressor_moe.recovery.fake_quantization import (
    has_quantized_modules,
    quantization_parameters,
    start_fake_quantization,
)
from llmcompressor_moe.saving.save import HISTORY_FILE, save_says_what_it_is, saved_reports
from llmcompressor_moe.surgery.config_changes import ConfigChanges
from llmcompressor_moe.surgery.repack import repack_experts
from llmcompressor_moe.topology import NotAnMoEError, find_topology

__all__ = ["load_student", "save_student"]

_STORED_DTYPES = "_dtypes_as_stored"
_CARD = "README.md"
_WEIGHTS = (".safetensors", INDEX_NAME, ".bin", ".pt", ".pth")
_WRITTEN_ANEW = ("config.json", "recipe.yaml", HISTORY_FILE, _CARD)


def load_student(path: str | Path, dtype: str = "auto", linear_experts: bool = False) -> PreTrainedModel:
    """A checkpoint as a model that can train, in train mode, with every weight floating point.

    A trimmed one keeps its layers as they are, a pruned one its zeros (until it trains; see
    `lifecycle.constant_masks`). A quantized one is decompressed once and rounds weights and inputs by its schemes
    as it runs, with gradients that pass through the rounding; see `fake_quantization`.

    :param path: directory of the checkpoint
    :param dtype: of the weights while they train; ``auto`` is the one that they are stored in
    :param linear_experts: one Linear per projection and expert instead of fused experts, as modifiers need it;
        experts of a quantized checkpoint are so in any case
    :raises ValueError: the dtype is unknown, or see `load_model`
    :raises IllegalCheckpointError: the checkpoint is not legal to serve, so what it becomes would not be either
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")
    # Before a training whose result would be refused.
    check_checkpoint(path).raise_if_errors(research=True)
    architecture = model_class(read_config(path))
    model = load_model(path, "auto", architecture and architecture.__name__)
    model.config._name_or_path = str(path)
    if getattr(model, "hf_quantizer", None) is not None:
        start_fake_quantization(model)
    elif linear_experts:
        linearize_moe(model)
    setattr(model, _STORED_DTYPES, {name: tensor.dtype for name, tensor in _stored_tensors(model)})
    # Also where it stays as it is stored: some formats are decompressed to another one than the rest has.
    _cast(model, model.config.dtype or model.dtype if dtype == "auto" else getattr(torch, dtype))
    return model.train()


def save_student(model: PreTrainedModel, directory: str | Path, source: str | Path) -> CheckReport | None:
    """Write a trained student as a checkpoint of the kind that it came from, as a whole or not at all.

    Experts are fused again, tensors have the names of the family's checkpoints and the dtypes that they came in,
    a quantized student is compressed again by the schemes and scales that it trained with. History, model card,
    tokenizer and whatever else lay beside the source's weights come along. The model is not fit for training
    afterwards. Of several ranks every one has to call it; the first writes.

    :param model: from `load_student`, without adapters
    :param directory: an earlier checkpoint there is replaced at the very end
    :param source: directory that the student was loaded from; may be the same
    :return: the verdict on what was written; None on ranks that wrote nothing
    :raises OutputDirectoryError: the directory cannot be written; it is as it was
    :raises IllegalCheckpointError: the result would not be legal to serve; nothing was written
    """
    source = Path(source)
    research = _is_research_only(source)
    model.eval()
    _cast_as_stored(model)
    model.config._name_or_path = str(source)
    model._earlier_reports = saved_reports(source)
    model._research_only = research
    _prepare_saving(model)
    with create_session():
        if not is_source_process():
            model.save_pretrained(directory)
            return None
        with atomic_directory(directory) as written:
            model.save_pretrained(written)
            _carry_over(source, written)
            report = check_checkpoint(written).raise_if_errors(research=research)
    report.path = str(directory)
    return report


def _prepare_saving(model: PreTrainedModel) -> None:
    """Have `save_pretrained` compress what is quantized and name everything as the family's checkpoints do."""
    if not has_quantized_modules(model):
        repack_experts(model)
    modify_save_pretrained(model)
    try:
        find_topology(model)
    except NotAnMoEError:
        return
    save_says_what_it_is(model, ConfigChanges(model.config))


def _is_research_only(source: Path) -> bool:
    """Whether vLLM cannot serve a checkpoint because somebody asked for one that only transformers runs."""
    errors = check_checkpoint(source).errors
    return bool(errors) and all(finding.code in RESEARCH_CODES for finding in errors)


def _stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers that hold floating-point numbers."""
    kept = model.state_dict(keep_vars=True)
    yield from ((name, tensor) for name, tensor in kept.items() if tensor.is_floating_point())


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give weights another dtype; scales, and what its family keeps in fp32, stay as they are."""
    fp32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    scales = quantization_parameters(model)
    for name, tensor in _stored_tensors(model):
        if name not in scales and not fp32.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def _cast_as_stored(model: PreTrainedModel) -> None:
    """Give everything the dtype that it came in, but for what will be compressed: that is rounded once, as it was
    in training.
    """
    rounded = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if hasattr(module, "quantization_scheme") and module.quantization_scheme.weights is not None
    }
    dtypes = getattr(model, _STORED_DTYPES, {})
    for name, tensor in _stored_tensors(model):
        if name not in rounded:
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def _carry_over(source: Path, directory: Path) -> None:
    """Put what lay beside the source's weights beside the new ones: tokenizer, history, model card, whatever."""
    for entry in source.iterdir():
        if entry.is_file() and not entry.name.endswith(_WEIGHTS) and entry.name not in _WRITTEN_ANEW:
            shutil.copy2(entry, directory / entry.name)
    for name in ("recipe.yaml", HISTORY_FILE):
        if not (source / name).exists():
            (directory / name).unlink(missing_ok=True)
    if (source / _CARD).exists():
        shutil.copy2(source / _CARD, directory / _CARD)
    else:
        (directory / _CARD).unlink(missing_ok=True)
