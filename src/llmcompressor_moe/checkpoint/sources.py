"""Where the values of a model's tensors come from: stored tensors, and what has to be done to them.

A source behaves like the tensor that it stands for as far as indexing, transposing and shapes go, so code that
splits fused weights can be run on sources and leaves behind a description of the split, without any data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from llmcompressor_moe.checkpoint.encodings import Encoded
from llmcompressor_moe.checkpoint.stored import StoredTensors

__all__ = [
    "Computed",
    "Deinterleaved",
    "Joined",
    "Leaf",
    "Source",
    "Stacked",
    "Taken",
    "View",
    "recorded_copies",
]


_recorder: list[tuple[torch.Tensor, Source]] | None = None


class Source(ABC):
    """A tensor that can be read.

    :param meta: a meta tensor of its shape and dtype
    """

    def __init__(self, meta: torch.Tensor) -> None:
        self.meta = meta

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.meta.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor: the stored one, of encoded tensors the one that they decode to."""
        return self.meta.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.meta.ndim

    @property
    def T(self) -> Source:
        """The transposed matrix."""
        return self.transpose(0, 1)

    def __getitem__(self, index: Any) -> Source:
        """A part of the tensor, by integers and slices."""
        parts = index if isinstance(index, tuple) else (index,)
        source: Source = self
        axis = 0
        for part in parts:
            if part is Ellipsis:
                axis = source.ndim - (len(parts) - parts.index(Ellipsis) - 1)
            elif isinstance(part, int):
                source = source.select(axis, part)
            elif part == slice(None):
                axis += 1
            else:
                source = source.slice(axis, *part.indices(source.shape[axis]))
                axis += 1
        return source

    def select(self, axis: int, index: int) -> Source:
        """One entry of an axis, which goes."""
        return View(self, _Select(axis, index))

    def slice(self, axis: int, start: int, stop: int, step: int = 1) -> Source:
        """A range of an axis."""
        if (start, stop, step) == (0, self.shape[axis], 1):
            return self
        return View(self, _Slice(axis, start, stop, step))

    def transpose(self, first: int, second: int) -> Source:
        """Two axes exchanged."""
        return View(self, _Transpose(first, second))

    @abstractmethod
    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values on the CPU.

        :param dtype: dtype of the result; None keeps the dtype of the source
        """

    @abstractmethod
    def leaves(self) -> Iterator[Leaf]:
        """The stored tensors that it is made of."""

    def places(self) -> list[tuple[int, torch.Tensor]]:
        """For each axis, the axis of the one stored tensor that it runs along, and the indices there.

        :raises ValueError: it is not a part of one stored tensor
        """
        raise ValueError(f"{type(self).__name__} of {[leaf.name for leaf in self.leaves()]} cannot be cut")

    def write(self, value: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        """Write other values into copies of the stored tensors.

        :param value: the tensor's new values
        :param buffers: logical name -> the tensor that will be stored instead
        :raises ValueError: the values cannot be put back into the stored form
        """
        raise ValueError(
            f"{type(self).__name__} of {[leaf.name for leaf in self.leaves()]} cannot be written"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Note ``parameter.copy_(source)`` while `recorded_copies` listens."""
        if func is torch.Tensor.copy_ and _recorder is not None and isinstance(args[1], Source):
            if args[0].shape != args[1].shape:
                raise ValueError(
                    f"a tensor of shape {tuple(args[1].shape)} does not fit {tuple(args[0].shape)}"
                )
            _recorder.append((args[0], args[1]))
            return args[0]
        return NotImplemented


class recorded_copies:
    """Context that yields the list of (tensor, source) of every ``tensor.copy_(source)`` inside it."""

    def __enter__(self) -> list[tuple[torch.Tensor, Source]]:
        global _recorder
        _recorder = []
        return _recorder

    def __exit__(self, *exc: object) -> None:
        global _recorder
        _recorder = None


class Leaf(Source):
    """A logical tensor as it is stored, decoded if its checkpoint is quantized.

    :param expert: the one expert of a fused tensor that this is, None for the whole tensor
    """

    def __init__(
        self,
        stored: StoredTensors,
        name: str,
        dtype: torch.dtype,
        encoded: Encoded | None = None,
        expert: int | None = None,
    ) -> None:
        self.stored, self.name, self.encoded, self.expert = stored, name, encoded, expert
        plain = encoded is None
        meta = stored.meta(name) if plain else torch.empty(encoded.shape, dtype=dtype, device="meta")
        super().__init__(meta if expert is None else meta[expert])

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors that hold it."""
        return (self.name,) if self.encoded is None else tuple(self.encoded.parts.values())

    def select(self, axis: int, index: int) -> Source:
        """One expert of a fused tensor, or one entry of any axis."""
        by_expert = self.encoded is None or self.encoded.codec.expert_axis == 0
        if axis == 0 and self.expert is None and self.ndim > 1 and by_expert:
            return Leaf(self.stored, self.name, self.dtype, self.encoded, index)
        return super().select(axis, index)

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values; plain ones are backed by the file."""
        if self.encoded is None:
            value = self._raw(self.name)
            return value if dtype is None or not value.is_floating_point() else value.to(dtype)
        parts = {role: self._raw(name) for role, name in self.encoded.parts.items()}
        return self.encoded.codec.decode(parts, dtype or self.dtype)

    def _raw(self, name: str) -> torch.Tensor:
        value = self.stored.read(name)
        return value if self.expert is None else value[self.expert]

    def leaves(self) -> Iterator[Leaf]:
        """Itself."""
        yield self

    def places(self) -> list[tuple[int, torch.Tensor]]:
        """All of it."""
        return [(axis, torch.arange(size)) for axis, size in enumerate(self.shape)]

    def write(self, value: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        """Write into the copy of the stored tensor (of one expert's part of it, where this is one expert)."""
        buffers[self.name].copy_(value)


class _Select:
    def __init__(self, axis: int, index: int) -> None:
        self.axis, self.index = axis, index

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.select(self.axis, self.index)

    def places(self, base: list[tuple[int, torch.Tensor]]) -> list[tuple[int, torch.Tensor]]:
        raise ValueError(f"one entry of axis {self.axis} of a stored tensor cannot be cut")


class _Slice:
    def __init__(self, axis: int, start: int, stop: int, step: int) -> None:
        self.axis, self.range = axis, slice(start, stop, step)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[(slice(None),) * self.axis + (self.range,)]

    def places(self, base: list[tuple[int, torch.Tensor]]) -> list[tuple[int, torch.Tensor]]:
        return [
            (stored, indices[self.range] if axis == self.axis else indices)
            for axis, (stored, indices) in enumerate(base)
        ]


class _Transpose:
    def __init__(self, first: int, second: int) -> None:
        self.axes = first, second

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(*self.axes)

    def places(self, base: list[tuple[int, torch.Tensor]]) -> list[tuple[int, torch.Tensor]]:
        first, second = self.axes
        swapped = list(base)
        swapped[first], swapped[second] = base[second], base[first]
        return swapped


Step = _Select | _Slice | _Transpose


class View(Source):
    """A part of another source, or another order of its axes."""

    def __init__(self, base: Source, step: Step) -> None:
        super().__init__(step(base.meta))
        self.base, self.step = base, step

    def select(self, axis: int, index: int) -> Source:
        """One entry of an axis; of a transposed stack, the transposed entry."""
        if axis == 0 and isinstance(self.step, _Transpose) and self.ndim > 2:
            axes = self.step.axes
            if 0 not in axes:
                return self.base.select(0, index).transpose(axes[0] - 1, axes[1] - 1)
        return super().select(axis, index)

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values."""
        return self.step(self.base.read(dtype))

    def leaves(self) -> Iterator[Leaf]:
        """Those of the base."""
        return self.base.leaves()

    def places(self) -> list[tuple[int, torch.Tensor]]:
        """Those of the base, after the step."""
        return self.step.places(self.base.places())

    def write(self, value: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        """Write into the same part of the stored tensor."""
        chain: list[Step] = []
        base: Source = self
        while isinstance(base, View):
            chain.append(base.step)
            base = base.base
        if not isinstance(base, Leaf):
            super().write(value, buffers)
        target = buffers[base.name]
        for step in reversed(chain):
            target = step(target)
        target.copy_(value)


class Stacked(Source):
    """Tensors of one shape, stacked on a new first axis."""

    def __init__(self, children: Sequence[Source]) -> None:
        self.children = list(children)
        first = self.children[0].meta
        super().__init__(first.new_empty((len(self.children), *first.shape)))

    def select(self, axis: int, index: int) -> Source:
        """One of the tensors."""
        return self.children[index] if axis == 0 else super().select(axis, index)

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values."""
        return torch.stack([child.read(dtype) for child in self.children])

    def leaves(self) -> Iterator[Leaf]:
        """Those of all tensors."""
        for child in self.children:
            yield from child.leaves()

    def write(self, value: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        """Write each tensor."""
        for child, part in zip(self.children, value, strict=True):
            child.write(part, buffers)


class Joined(Source):
    """Tensors joined along an axis."""

    def __init__(self, children: Sequence[Source], axis: int) -> None:
        self.children, self.axis = list(children), axis
        super().__init__(torch.cat([child.meta for child in self.children], dim=axis))

    def select(self, axis: int, index: int) -> Source:
        """One entry of another axis is joined of the children's entries."""
        if axis == self.axis:
            return super().select(axis, index)
        children = [child.select(axis, index) for child in self.children]
        return Joined(children, self.axis - (axis < self.axis))

    def slice(self, axis: int, start: int, stop: int, step: int = 1) -> Source:
        """A range; where it is a child, that child."""
        if axis == self.axis and step == 1:
            position = 0
            for child in self.children:
                if (start, stop) == (position, position + child.shape[axis]):
                    return child
                position += child.shape[axis]
        return super().slice(axis, start, stop, step)

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values."""
        return torch.cat([child.read(dtype) for child in self.children], dim=self.axis)

    def leaves(self) -> Iterator[Leaf]:
        """Those of all tensors."""
        for child in self.children:
            yield from child.leaves()

    def write(self, value: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        """Write each tensor's range."""
        sizes = [child.shape[self.axis] for child in self.children]
        for child, part in zip(self.children, value.split(sizes, dim=self.axis), strict=True):
            child.write(part, buffers)


class Deinterleaved(Source):
    """A tensor of which an axis is stored alternating: its first half are the even entries, its second the odd."""

    def __init__(self, base: Source, axis: int) -> None:
        super().__init__(base.meta)
        self.base, self.axis = base, axis

    def select(self, axis: int, index: int) -> Source:
        """One entry of another axis."""
        if axis == self.axis:
            return super().select(axis, index)
        return Deinterleaved(self.base.select(axis, index), self.axis - (axis < self.axis))

    def slice(self, axis: int, start: int, stop: int, step: int = 1) -> Source:
        """A range; halves are every other entry of what is stored."""
        size = self.shape[axis]
        if axis == self.axis and step == 1 and (start, stop) in ((0, size // 2), (size // 2, size)):
            return self.base.slice(axis, int(start > 0), size, 2)
        return super().slice(axis, start, stop, step)

    def _halves(self) -> list[Source]:
        size = self.shape[self.axis]
        return [self.base.slice(self.axis, first, size, 2) for first in (0, 1)]

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values."""
        return torch.cat([half.read(dtype) for half in self._halves()], dim=self.axis)

    def leaves(self) -> Iterator[Leaf]:
        """Those of the base."""
        return self.base.leaves()

    def write(self, value: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        """Write even and odd entries."""
        for half, part in zip(self._halves(), value.chunk(2, dim=self.axis), strict=True):
            half.write(part, buffers)


class Taken(Source):
    """Some entries of an axis, in a given order: what is left of a per-expert tensor, or of an expert."""

    def __init__(self, base: Source, axis: int, kept: Sequence[int]) -> None:
        self.base, self.axis, self.kept = base, axis, tuple(kept)
        super().__init__(
            base.meta.index_select(axis, torch.empty(len(kept), dtype=torch.long, device="meta"))
        )

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values."""
        return self.base.read(dtype).index_select(self.axis, torch.tensor(self.kept))

    def places(self) -> list[tuple[int, torch.Tensor]]:
        """Those of the base that are left."""
        kept = torch.tensor(self.kept)
        return [
            (stored, indices[kept] if axis == self.axis else indices)
            for axis, (stored, indices) in enumerate(self.base.places())
        ]

    def leaves(self) -> Iterator[Leaf]:
        """Those of the base."""
        return self.base.leaves()


class Computed(Source):
    """What a function makes of whole tensors."""

    def __init__(
        self,
        children: Sequence[Source],
        function: Callable[[list[torch.Tensor]], torch.Tensor],
        meta: torch.Tensor,
    ) -> None:
        super().__init__(meta)
        self.children, self.function = list(children), function

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values."""
        value = self.function([child.read() for child in self.children])
        return value if dtype is None or not value.is_floating_point() else value.to(dtype)

    def leaves(self) -> Iterator[Leaf]:
        """Those of all arguments."""
        for child in self.children:
            yield from child.leaves()
