"""Open a checkpoint without loading it: a transformers model whose parameters are read from its files when they
are used.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.distributed import get_source_rank, is_distributed, is_source_process
from llmcompressor.modeling.moe.linearize import get_linearized_moes, get_non_linearized_moes
from llmcompressor.utils.dev import get_main_device
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmcompressor_moe.checkpoint.cache import forget, read_from
from llmcompressor_moe.checkpoint.config_parts import QUANTIZATION, quantization_of, quantized_parts
from llmcompressor_moe.checkpoint.encodings import logical_tensors, refuse_unreadable
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, whole_layout
from llmcompressor_moe.checkpoint.mapping import model_sources
from llmcompressor_moe.checkpoint.reader import load_trimmed_moe
from llmcompressor_moe.checkpoint.sources import Leaf, Source, Taken, recorded_copies
from llmcompressor_moe.checkpoint.stored import StoredTensors
from llmcompressor_moe.compat.llmcompressor.linear_experts import linearize_without_weights
from llmcompressor_moe.compat.transformers.building import build, class_named, initialize
from llmcompressor_moe.topology import MoELayer, expert_modules, find_topology, text_config

__all__ = ["OpenedCheckpoint", "OpenedModule", "open_model", "opened_from", "opened_module"]

_ATTRIBUTE, _ORIGIN = "_opened_checkpoint", "_opened_module"


@dataclass(frozen=True)
class OpenedCheckpoint:
    """The checkpoint that a model reads from.

    :param path: its directory
    :param stored: its tensors
    :param logical: name -> tensor as the model computes with it, in the names that the files use
    :param unused: logical names that the model has no use for (multi-token-prediction layers, for example)
    :param paths: logical name -> the model's parameters, by the paths they had when the model was opened, that are
        made of it
    :param stack: the model's path of the list of blocks
    :param num_blocks: blocks that it was opened with
    :param moe_layers: MoE layers that it was opened with
    :param quantization: ``quantization_config`` of its config.json
    :param dtype: what plain weights are written in; None keeps the stored dtypes
    :param requantize: whether its weights are to be written decoded, so that a recipe can quantize them again
    :param scratch: folder for tensors that change
    """

    path: Path
    stored: StoredTensors
    logical: dict[str, Leaf]
    unused: frozenset[str]
    paths: dict[str, tuple[str, ...]]
    stack: str
    num_blocks: int
    moe_layers: tuple[MoELayer, ...]
    quantization: dict[str, Any] | None
    dtype: torch.dtype | None
    requantize: bool
    scratch: Path

    @functools.cached_property
    def stored_modules(self) -> dict[str, str]:
        """The model's path of a module when it was opened -> its name in the files, where both can be told."""
        found: dict[str, str] = {}
        for stored, targets in self.paths.items():
            for target in targets:
                ours, theirs = target.split("."), stored.split(".")
                for depth in range(1, len(ours)):
                    # Names differ in words, or in how many words stand before what is alike.
                    alike = len(ours) == len(theirs) or ours[depth:] == theirs[depth - len(ours) :]
                    if alike and len(theirs) > len(ours) - depth:
                        found.setdefault(".".join(ours[:depth]), ".".join(theirs[: depth - len(ours)]))
        return found

    @property
    def stored_stack(self) -> str:
        """Name of the list of blocks in the files."""
        return self.stored_modules.get(self.stack, self.stack)


@dataclass(frozen=True)
class OpenedModule:
    """What one module of an opened model was made of, whatever a recipe does to it later.

    :param path: its path when the model was opened
    :param sources: name of a parameter or buffer -> where it was read from
    :param cuts: name of one that was cut -> what is left of where it was read from, whether or not its values have
        changed since
    """

    path: str
    sources: dict[str, Source]
    cuts: dict[str, Taken] = field(default_factory=dict)

    def note_cut(self, name: str, axis: int, kept: Sequence[int]) -> None:
        """Remember that some entries of an axis of a tensor are left."""
        source = self.made_of(name)
        if source is not None:
            self.cuts[name] = Taken(source, axis, kept)

    def made_of(self, name: str) -> Source | None:
        """Where the values of a tensor, in the shape that it has now, were read from."""
        return self.cuts.get(name, self.sources.get(name))

    def path_of(self, name: str) -> str:
        """Path of one of its tensors when the model was opened."""
        return f"{self.path}.{name}" if self.path else name


def opened_module(module: nn.Module) -> OpenedModule | None:
    """What a module was made of; None for one that a recipe put in place."""
    return module.__dict__.get(_ORIGIN)


def opened_from(model: nn.Module) -> OpenedCheckpoint | None:
    """The checkpoint that a model was opened from; None for a model that was loaded."""
    return getattr(model, _ATTRIBUTE, None)


def is_opened(model: nn.Module) -> bool:
    """Whether a model reads from a checkpoint."""
    return opened_from(model) is not None


def keeps_stored_precision(model: nn.Module) -> bool:
    """Whether a model was opened from a quantized checkpoint and is saved in the precision that is stored."""
    opened = opened_from(model)
    return opened is not None and opened.quantization is not None and not opened.requantize


def open_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    requantize: bool = False,
    scratch: str | Path | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """See `open_moe`, which also makes the model save itself by tensors."""
    layout = whole_layout(path)
    root = layout.path
    config = _config(root)
    quantization = _take_quantization(config)
    if quantization is not None:
        refuse_unreadable(quantization, str(root))
    if dtype != "auto":
        config.dtype = text_config(config).dtype = getattr(torch, dtype)
    model = _build(config)
    config = model.config
    stored = StoredTensors(layout)
    logical = _logical(stored, layout, quantization, model.dtype)
    experts = {name for name, _ in get_non_linearized_moes(model)}
    sources, unused = model_sources(model, logical, experts)
    _check_complete(model, sources, experts, root)
    tied = _tied(model)
    sources = _linearize(model, sources)
    _make_buffers(model)
    model.eval().requires_grad_(False)
    by_tensor = dict(_matched(model, sources, tied))
    for name, module in model.named_modules():
        module.__dict__[_ORIGIN] = OpenedModule(name, _own_sources(name, module, sources))
    folder = _scratch_folder(scratch)
    read_from(model, by_tensor, torch.device(device) if device else get_main_device(), folder)
    weakref.finalize(model, _clean, folder, list(by_tensor), is_source_process())
    topology = find_topology(model)
    paths: dict[str, list[str]] = {}
    for target, source in sources.items():
        for leaf in source.leaves():
            paths.setdefault(leaf.name, []).append(target)
    opened = OpenedCheckpoint(
        path=root,
        stored=stored,
        logical=logical,
        unused=frozenset(unused),
        paths={name: tuple(targets) for name, targets in paths.items()},
        stack=topology.stack,
        num_blocks=len(topology.blocks),
        moe_layers=tuple(topology.moe_layers.values()),
        quantization=quantization,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        requantize=requantize,
        scratch=folder,
    )
    model.__dict__[_ATTRIBUTE] = opened
    return model


def _own_sources(path: str, module: nn.Module, sources: Mapping[str, Source]) -> dict[str, Source]:
    names = {name: f"{path}.{name}" if path else name for name in [*module._parameters, *module._buffers]}
    return {name: sources[full] for name, full in names.items() if full in sources}


def _scratch_folder(parent: str | Path | None) -> Path:
    """A new folder for tensors that change, the same on all ranks."""
    found = [tempfile.mkdtemp(prefix="opened-", dir=parent) if is_source_process() else None]
    if is_distributed():
        torch.distributed.broadcast_object_list(found, src=get_source_rank())
    return Path(found[0])


def _clean(folder: Path, tensors: list[torch.Tensor], owner: bool) -> None:
    if owner:
        shutil.rmtree(folder, ignore_errors=True)
    forget(tensors)


def _config(root: Path) -> PreTrainedConfig:
    with load_trimmed_moe():
        return AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)


def _take_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Remove the quantization config: the model computes with decoded weights."""
    found = quantization_of(config)
    for part in quantized_parts(config):
        del part[QUANTIZATION]
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    architecture = class_named((config.architectures or [""])[0])
    if architecture is None:
        raise ValueError(
            f"architectures={config.architectures} is not a class of the installed transformers."
        )
    dtype = config.dtype or text_config(config).dtype or torch.bfloat16
    config.dtype = dtype
    with load_trimmed_moe(), torch.device("meta"):
        model = build(architecture, config)
    with contextlib.suppress(OSError, ValueError):
        model.generation_config = GenerationConfig.from_pretrained(
            config._name_or_path, local_files_only=True
        )
    return model


def _logical(
    stored: StoredTensors, layout: CheckpointLayout, quantization: dict[str, Any] | None, dtype: torch.dtype
) -> dict[str, Leaf]:
    encoded, parts = logical_tensors(layout.tensors, quantization)
    leaves = {name: Leaf(stored, name, dtype) for name in layout.tensors if name not in parts}
    return leaves | {name: Leaf(stored, name, dtype, one) for name, one in encoded.items()}


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Path of a tied parameter -> path of the one that it shares."""
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def _check_complete(
    model: PreTrainedModel, sources: Mapping[str, Source], experts: set[str], root: Path
) -> None:
    """Every weight must come from somewhere, in the shape that the config demands."""
    wanted = model.state_dict()
    single = {name.rsplit(".", 3)[0] for name in sources if name not in wanted}
    tied = _tied(model)
    lacking = [
        name
        for name in wanted
        if name not in sources and name.rpartition(".")[0] not in single and tied.get(name) not in sources
    ]
    ignored = model._keys_to_ignore_on_load_missing or ()
    lacking = [name for name in lacking if not any(_matches(pattern, name) for pattern in ignored)]
    if lacking:
        raise ValueError(
            f"model {str(root)!r}: its files lack {len(lacking)} weights that its config demands, {min(lacking)} "
            "for one; copy it again. `llmcompressor-moe check` says more."
        )
    for name, source in sources.items():
        if name in wanted and source.shape != wanted[name].shape:
            raise ValueError(
                f"model {str(root)!r}: {name} is stored as {tuple(source.shape)}, its config demands "
                f"{tuple(wanted[name].shape)}. `llmcompressor-moe check` says more."
            )


def _matches(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None


def _linearize(model: PreTrainedModel, sources: dict[str, Source]) -> dict[str, Source]:
    """Replace fused experts by linear ones; what their weights come from follows from how upstream splits them."""
    found = dict(sources)
    for path, experts in get_non_linearized_moes(model):
        for name in list(experts._parameters):
            source = found.pop(f"{path}.{name}", None)
            if source is not None:
                del experts._parameters[name]
                experts.__dict__[name] = source
        with torch.device("meta"), recorded_copies() as copies:
            linear = linearize_without_weights(experts, getattr(experts, "config", text_config(model.config)))
        names = {id(tensor): name for name, tensor in linear.named_parameters()}
        found |= {f"{path}.{names[id(tensor)]}": source for tensor, source in copies}
        linear.train(model.training)
        model.set_submodule(path, linear)
    return found


def _make_buffers(model: PreTrainedModel) -> None:
    """Create the buffers that no checkpoint holds (rotary frequencies, for example), as transformers does."""
    holders = []
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            holders.append(module)
    for module in holders:
        initialize(_owner(model, module), module)


def _owner(model: PreTrainedModel, module: nn.Module) -> PreTrainedModel:
    """The innermost transformers model around a module: the one that knows how to initialize it."""
    around = [
        submodel
        for submodel in model.modules()
        if isinstance(submodel, PreTrainedModel) and any(child is module for child in submodel.modules())
    ]
    return around[-1]


def _matched(
    model: PreTrainedModel, sources: Mapping[str, Source], tied: Mapping[str, str]
) -> Iterator[tuple[torch.Tensor, Source]]:
    """(meta tensor, source) of every parameter and persistent buffer, each in the dtype that it is computed in."""
    counts = {len(expert_modules(experts)) for _, experts in get_linearized_moes(model)}
    for name, shared in tied.items():
        if name not in sources and shared in sources:
            module, _, attribute = name.rpartition(".")
            other, _, theirs = shared.rpartition(".")
            tensor = model.get_submodule(other)._parameters[theirs]
            model.get_submodule(module)._parameters[attribute] = tensor
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                source = sources.get(f"{path}.{name}" if path else name)
                if tensor is None or source is None:
                    continue
                if (
                    source.dtype == torch.float32
                    and tensor.ndim == 1
                    and len(tensor) in counts
                    and "norm" not in path
                ):
                    # Offsets of router scores: a 16-bit step there is larger than their differences.
                    tensor = tensors[name] = type(tensor)(tensor.detach().float())
                    tensor.requires_grad_(False)
                yield tensor, source
