"""What a model that was opened from a checkpoint is written as: every stored tensor that the recipe did not change
bit for bit, cut ones as slices, changed ones by their new values.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from compressed_tensors.offload import align_module_device
from compressed_tensors.offload.cache import OffloadCache
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmcompressor_moe.checkpoint.cache import source_of
from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, OpenedModule, opened_module
from llmcompressor_moe.checkpoint.sources import Leaf, Source, Taken
from llmcompressor_moe.checkpoint.stored import TORCH_DTYPES, StoredTensors
from llmcompressor_moe.compat.llmcompressor.linear_experts import fused_class
from llmcompressor_moe.compat.transformers.conversions import own_mappings
from llmcompressor_moe.saving.shards import FileRange, OutputTensor
from llmcompressor_moe.surgery.repack import empty_fused, fused_experts
from llmcompressor_moe.topology import expert_modules, text_config

__all__ = ["copied", "moved_name", "output_tensors", "rows", "stored_module_names"]

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Dtypes of weights that are not quantized.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def moved_name(stored: str, old: str, new: str) -> str:
    """A stored name after the parameter that it feeds has got another path.

    :param stored: ``model.layers.5.block_sparse_moe.experts.3.w1.weight``, say
    :param old: the parameter's path when the model was opened: ``model.layers.5.mlp.experts.3.gate_proj.weight``
    :param new: its path now: ``model.layers.4.mlp.experts.2.gate_proj.weight``
    :return: ``model.layers.4.block_sparse_moe.experts.2.w1.weight``
    """
    pairs = list(zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True))
    position = 0

    def number(match: re.Match[str]) -> str:
        nonlocal position
        for ahead in range(position, len(pairs)):
            if pairs[ahead][0] == match[0]:
                position = ahead + 1
                return pairs[ahead][1]
        return match[0]

    return _NUMBER.sub(number, stored)


@dataclass
class _Shared:
    """A stored tensor that several parameters are made of, of all experts of a layer perhaps, and what is left of
    it.

    :param experts: stored index of an expert (None: the tensor has no axis of experts) -> the parameters that are
        made of it: (source, new value or None if unchanged)
    """

    leaf: Leaf
    old: str
    now: str
    experts: dict[int | None, list[tuple[Source, _Value | None]]] = field(default_factory=dict)

    @property
    def cut(self) -> bool:
        return any(isinstance(source, Taken) for parts in self.experts.values() for source, _ in parts)

    @property
    def changed(self) -> bool:
        return any(value is not None for parts in self.experts.values() for _, value in parts)


@dataclass(frozen=True)
class _Value:
    """A tensor of a module, read when it is written."""

    module: nn.Module
    name: str

    @property
    def meta(self) -> torch.Tensor:
        tensors = self.module._parameters if self.name in self.module._parameters else self.module._buffers
        return (
            tensors.offloaded_values[self.name] if isinstance(tensors, OffloadCache) else tensors[self.name]
        )

    def read(self) -> torch.Tensor:
        with align_module_device(self.module):
            return getattr(self.module, self.name).detach()


def output_tensors(model: PreTrainedModel, opened: OpenedCheckpoint) -> list[OutputTensor]:
    """All tensors of a model that was opened from ``opened``, under the names that its files use, in their order.

    Tensors that belong to no parameter are not among them.

    :raises ValueError: a changed tensor cannot be put back into the form that it is stored in
    """
    plan = _Plan(model, opened)
    for path, module in model.named_modules():
        plan.add(path, module)
    return plan.tensors()


class _Plan:
    def __init__(self, model: PreTrainedModel, opened: OpenedCheckpoint) -> None:
        self._model = model
        self._opened = opened
        self._stored = opened.stored
        self._order = {name: place for place, name in enumerate(_file_order(opened.stored))}
        self._found: dict[str, tuple[int, OutputTensor]] = {}
        self._shared: dict[str, _Shared] = {}
        self._split: set[nn.Module] = set()
        self._refused: set[nn.Module] = set()

    def add(self, path: str, module: nn.Module) -> None:
        """Plan one module's own tensors."""
        if isinstance(module, LinearExperts2D) and any(map(_is_quantized, module.modules())):
            # Readers look for compressed experts one by one.
            self._split.update(module.modules())
        elif isinstance(module, LinearExperts2D) and self._opened.requantize:
            self._add_decoded_experts(path, module)
        if module in self._refused:
            return
        origin = opened_module(module)
        for name, value in _tensors(module):
            now = f"{path}.{name}" if path else name
            source = source_of(module, name)
            if origin is None:
                self._add_value(now, value, now)
            elif source is not None and not (module in self._split and _expert(source)):
                self._add_source(source, origin.path_of(name), now)
            else:
                self._add_changed(module, origin, name, value, now)

    def tensors(self) -> list[OutputTensor]:
        """Everything that was planned, in the order of the files."""
        for shared in self._shared.values():
            self._add_shared(shared)
        return [
            tensor for _, tensor in sorted(self._found.values(), key=lambda item: (item[0], item[1].name))
        ]

    def _put(self, tensor: OutputTensor, origin: str | None) -> None:
        place = self._order.get(origin, len(self._order)) if origin else len(self._order)
        self._found.setdefault(tensor.name, (place, tensor))

    def _add_source(self, source: Source, old: str, now: str) -> None:
        """A parameter that did not change, whole or cut."""
        if isinstance(source, Taken):
            self._add_taken(source, old, now)
            return
        for leaf in source.leaves():
            if leaf.expert is not None:
                self._part_of(leaf, source, old, now, None)
            elif self._converts(leaf):
                self._put(self._converted(leaf, moved_name(leaf.name, old, now)), leaf.parts[0])
            else:
                for part in leaf.parts:
                    self._put(copied(self._stored, part, moved_name(part, old, now)), part)

    def _converts(self, leaf: Leaf) -> bool:
        """Whether a stored tensor is written as other bytes than it is stored in."""
        if leaf.encoded is not None:
            return self._opened.requantize
        return self._written_dtype(leaf) != leaf.dtype

    def _written_dtype(self, leaf: Leaf) -> torch.dtype:
        wanted = self._opened.dtype
        return wanted if wanted is not None and leaf.dtype in _PLAIN else leaf.dtype

    def _converted(self, leaf: Leaf, name: str) -> OutputTensor:
        dtype = self._written_dtype(leaf)
        return _computed(name, leaf.meta.to(dtype), lambda: leaf.read(dtype))

    def _add_taken(self, source: Taken, old: str, now: str) -> None:
        (leaf,) = source.leaves()
        if not _is_whole(source):
            self._part_of(leaf, source, old, now, None)
            return
        name = moved_name(leaf.name, old, now)
        plain = leaf.encoded is None and leaf is source.base and not self._converts(leaf)
        if plain and source.axis == 0:
            self._put(rows(self._stored, leaf.name, name, source.axis, source.kept), leaf.name)
        else:
            dtype = self._written_dtype(leaf)
            self._put(_computed(name, source.meta.to(dtype), lambda: source.read(dtype)), leaf.parts[0])

    def _add_changed(
        self, module: nn.Module, origin: OpenedModule, name: str, value: _Value, now: str
    ) -> None:
        source = origin.made_of(name)
        old = origin.path_of(name)
        if source is None or _is_quantized(module) or module in self._split:
            stored, place = self._name_for(origin, name, now)
            self._add_value(stored, value, place)
            return
        leaves = list(source.leaves())
        if leaves[0].encoded is not None and not self._opened.requantize:
            raise ValueError(
                f"{now} is stored quantized and was changed; open the checkpoint with requantize=True, or leave "
                "out the modifier that changes it."
            )
        if _is_whole(source):
            (leaf,) = leaves
            self._add_value(moved_name(leaf.name, old, now), value, leaf.parts[0], self._written_dtype(leaf))
        elif isinstance(source, Taken) or all(leaf.expert is not None for leaf in leaves):
            for leaf in leaves:
                self._part_of(leaf, source, old, now, value)
        else:
            for leaf in leaves:
                self._add_assembled(leaf, source, value, moved_name(leaf.name, old, now))

    def _add_value(
        self, name: str, value: _Value, place: str | None, dtype: torch.dtype | None = None
    ) -> None:
        meta = value.meta if dtype is None else value.meta.to("meta", dtype)
        self._put(_computed(name, meta, lambda: value.read().to(meta.dtype)), place)

    def _add_assembled(self, leaf: Leaf, source: Source, value: _Value, name: str) -> None:
        """A stored tensor that several parameters are made of, of which this one changed."""
        present = self._found.pop(name, None)
        earlier = present[1].pieces if present else lambda: [leaf.read()]

        def pieces() -> Iterator[torch.Tensor]:
            (whole,) = earlier()
            if isinstance(whole, FileRange):
                whole = leaf.read()
            buffer = whole.clone()
            buffers = {
                other.name: buffer if other.name == leaf.name else other.read().clone()
                for other in source.leaves()
            }
            source.write(value.read(), buffers)
            yield buffer

        self._put(
            OutputTensor(name, _NAMES[leaf.dtype], tuple(leaf.shape), leaf.meta.nbytes, pieces), leaf.parts[0]
        )

    def _part_of(self, leaf: Leaf, source: Source, old: str, now: str, value: _Value | None) -> None:
        shared = self._shared.setdefault(leaf.name, _Shared(leaf, old, now))
        shared.experts.setdefault(leaf.expert, []).append((source, value))

    def _add_shared(self, shared: _Shared) -> None:
        leaf, kept = shared.leaf, list(shared.experts)
        if not shared.changed and not shared.cut and not self._converts(leaf):
            for part in leaf.parts:
                self._put(rows(self._stored, part, moved_name(part, shared.old, shared.now), 0, kept), part)
            return
        left = {expert: _left_of(leaf, parts) for expert, parts in shared.experts.items()}
        shape = tuple(len(indices) for indices in next(iter(left.values())))
        shape = shape if kept == [None] else (len(kept), *shape)
        dtype = self._written_dtype(leaf)

        def pieces() -> Iterator[torch.Tensor]:
            for expert, parts in shared.experts.items():
                whole = Leaf(self._stored, leaf.name, leaf.dtype, leaf.encoded, expert).read(dtype)
                buffer = _taken(whole, left[expert])
                for source, value in parts:
                    if value is not None:
                        _write(source, value.read(), buffer, left[expert], leaf.name)
                yield buffer

        nbytes = math.prod(shape) * dtype.itemsize
        name = moved_name(leaf.name, shared.old, shared.now)
        self._put(OutputTensor(name, _NAMES[dtype], shape, nbytes, pieces), leaf.parts[0])

    def _add_decoded_experts(self, path: str, experts: LinearExperts2D) -> None:
        """Plan experts that were stored one by one because they were quantized, and are not any more: readers look
        for them in the form of their family, where that is fused.
        """
        origin = opened_module(expert_modules(experts)[0].down_proj)
        source = origin.sources.get("weight") if origin is not None else None
        if source is None or any(leaf.expert is not None or leaf.encoded is None for leaf in source.leaves()):
            return
        fused_cls = fused_class(experts)
        layout = family_layout(
            self._model, path, empty_fused(experts, fused_cls, text_config(self._model.config))
        )
        if any(_SINGLE_EXPERT.search(name) for name in layout):
            return
        self._refused.update(experts.modules())
        dtype = self._opened.dtype or source.dtype

        @functools.lru_cache(maxsize=1)
        @torch.no_grad()
        def written() -> dict[str, torch.Tensor]:
            whole = fused_experts(experts, fused_cls, text_config(self._model.config))
            return family_layout(self._model, path, whole)

        for name, meta in layout.items():
            value = functools.partial(lambda name: written()[name].to(dtype), name)
            self._put(_computed(name, meta.to(dtype), value), next(source.leaves()).parts[0])

    def _name_for(self, origin: OpenedModule, name: str, now: str) -> tuple[str, str | None]:
        """Stored name and place for a tensor that a modifier gave to a module, or that is no longer fused."""
        module, place = _stored_module(origin, now.rpartition(".")[0], self._opened)
        return f"{module}.{name}", place


def _is_whole(source: Source) -> bool:
    """Whether a tensor is all of a stored one, or is what is left of all of it."""
    while isinstance(source, Taken):
        source = source.base
    return isinstance(source, Leaf) and source.expert is None


def _left_of(leaf: Leaf, parts: Sequence[tuple[Source, _Value | None]]) -> list[torch.Tensor]:
    """What is left of each axis of a stored tensor (of one expert's part of it): indices, in order."""
    if not any(isinstance(source, Taken) for source, _ in parts):
        return [torch.arange(size) for size in leaf.shape]
    found: list[list[torch.Tensor]] = [[] for _ in leaf.shape]
    for source, _ in parts:
        for axis, indices in source.places():
            found[axis].append(indices)
    return [torch.cat(indices).unique() for indices in found]


def _taken(tensor: torch.Tensor, left: Sequence[torch.Tensor]) -> torch.Tensor:
    """A copy of what is left of a tensor."""
    for axis, indices in enumerate(left):
        if len(indices) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, indices)
    return tensor.clone(memory_format=torch.contiguous_format)


def _write(
    source: Source, value: torch.Tensor, buffer: torch.Tensor, left: Sequence[torch.Tensor], name: str
) -> None:
    """Write a parameter's new value into what is left of the stored tensor that it is a part of."""
    if not isinstance(source, Taken):
        source.write(value, {name: buffer})
        return
    places = source.places()
    order = sorted(range(len(places)), key=lambda axis: places[axis][0])
    at = [torch.searchsorted(left[stored], indices) for stored, indices in (places[axis] for axis in order)]
    buffer[torch.meshgrid(*at, indexing="ij")] = value.permute(order).to(buffer.dtype)


def family_layout(model: PreTrainedModel, path: str, experts: nn.Module) -> dict[str, torch.Tensor]:
    """Names and tensors that a family's checkpoints have in the place of a fused module's parameters.

    :param path: of the experts
    :param experts: fused, with or without values
    """
    state = {f"{path}.{name}": parameter.detach() for name, parameter in experts.named_parameters()}
    with own_mappings():
        return revert_weight_conversion(model, state)


def stored_module_names(model: nn.Module, opened: OpenedCheckpoint) -> dict[str, str]:
    """Path of a module -> its name in the files, whatever the family calls it there."""
    return {
        path: _stored_module(origin, path, opened)[0]
        for path, module in model.named_modules()
        if (origin := opened_module(module)) is not None
    }


def _stored_module(origin: OpenedModule, path: str, opened: OpenedCheckpoint) -> tuple[str, str | None]:
    """A module's name in the files, and a stored tensor that it was made of."""
    for known, source in origin.sources.items():
        leaf = next(source.leaves())
        old = origin.path_of(known)
        if leaf.expert is not None:
            holder = moved_name(leaf.name, old, f"{path}.{known}").rpartition(".")[0]
            *experts, expert, projection = path.split(".")
            if holder.rpartition(".")[2] != experts[-1]:
                # Fused under a name of its own; single experts have the model's.
                return path, leaf.parts[0]
            return f"{holder}.{expert}.{projection}", leaf.parts[0]
        module = leaf.name.removesuffix(f".{known}")
        if module != leaf.name:
            return moved_name(module, origin.path, path), leaf.parts[0]
    return moved_name(opened.stored_modules.get(origin.path, origin.path), origin.path, path), None


def _file_order(stored: StoredTensors) -> Iterable[str]:
    return sorted(stored.tensors, key=lambda name: (stored.tensors[name].file, stored.tensors[name].start))


def _tensors(module: nn.Module) -> Iterator[tuple[str, _Value]]:
    """A module's own parameters and persistent buffers."""
    for name in [*module._parameters, *module._buffers]:
        if name in module._non_persistent_buffers_set:
            continue
        tensors = module._parameters if name in module._parameters else module._buffers
        present = tensors.offloaded_values if isinstance(tensors, OffloadCache) else tensors
        if present[name] is not None:
            yield name, _Value(module, name)


def _is_quantized(module: nn.Module) -> bool:
    return getattr(module, "quantization_scheme", None) is not None


def _expert(source: Source) -> bool:
    return any(leaf.expert is not None for leaf in source.leaves())


def copied(stored: StoredTensors, stored_name: str, name: str) -> OutputTensor:
    """A stored tensor under a name, bit for bit."""
    info = stored.tensors[stored_name]
    return OutputTensor(
        name,
        info.dtype,
        info.shape,
        info.nbytes,
        lambda: [FileRange(stored.file(stored_name), info.start, info.nbytes)],
    )


def rows(stored: StoredTensors, stored_name: str, name: str, axis: int, kept: Sequence[int]) -> OutputTensor:
    """Some entries of one axis of a stored tensor, under a name."""
    info = stored.tensors[stored_name]
    shape = (*info.shape[:axis], len(kept), *info.shape[axis + 1 :])
    row = info.nbytes // math.prod(info.shape[: axis + 1])

    def pieces() -> Iterator[FileRange]:
        path = stored.file(stored_name)
        for outer in range(math.prod(info.shape[:axis])):
            begin = info.start + outer * row * info.shape[axis]
            for first, count in _runs(kept):
                yield FileRange(path, begin + first * row, count * row)

    return OutputTensor(name, info.dtype, shape, math.prod(shape[: axis + 1]) * row, pieces)


def _runs(kept: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, length) of the runs of consecutive indices."""
    start = 0
    for position in range(1, len(kept) + 1):
        if position == len(kept) or kept[position] != kept[position - 1] + 1:
            yield kept[start], position - start
            start = position


def _computed(name: str, meta: torch.Tensor, read: Callable[[], torch.Tensor]) -> OutputTensor:
    return OutputTensor(name, _NAMES[meta.dtype], tuple(meta.shape), meta.nbytes, lambda: [read()])
