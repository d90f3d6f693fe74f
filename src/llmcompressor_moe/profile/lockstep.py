"""Run a model over calibration batches block by block, all batches together.

Each batch runs the model's own forward in a coroutine of its own (a greenlet, because no function in between has
to know of it) that pauses where a block begins, and where a block's routed experts begin. So the weights of a
block are read once for all batches, each expert sees the tokens of all of them at once, and everything else
(masks, several residual streams, states that blocks hand on) is the model's own business.

A run can fork: where a batch enters a block, other runs begin with the same hidden states, compute something else
in that block, and go on beside it. So one pass tells what many changes, each alone, do to the model's output.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import greenlet
import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.offload.utils import send_tensors
from compressed_tensors.quantization import QuantizationStrategy
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes, get_non_linearized_moes
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.cache import read_ahead
from llmcompressor_moe.profile.changes import Change
from llmcompressor_moe.profile.computing import (
    ComputedModules,
    available_memory,
    fast_dtype,
    stored_dtype,
)
from llmcompressor_moe.profile.experts import ExpertRun, routed_forward, run_silenced, scattered_forward
from llmcompressor_moe.profile.options import current_options
from llmcompressor_moe.profile.waiting import Waiting, tensors_in
from llmcompressor_moe.progress import progress
from llmcompressor_moe.surgery.bypass import bypassed, pass_through
from llmcompressor_moe.topology import NotAnMoEError, expert_modules, find_topology, text_config

__all__ = ["Fork", "Snapshot", "run_lockstep"]

Batch = dict[str, Any]
# batch -> what the block gave for it
Snapshot = Callable[[], dict[int, Any]]

# Hidden states, residual, attention's three inputs and its output; the feed-forward has let go of some of them.
_COPIES = 6


@dataclass(frozen=True)
class Fork:
    """A run that begins where a batch enters a block, with the same hidden states, and ends at the LM head.

    :param batch: index of the batch
    :param block: position of the block in the stack
    :param change: what it computes differently in this block; nothing else differs
    """

    batch: int
    block: int
    change: Change


def run_lockstep(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    description: str | None = None,
    on_batch: Callable[[int, Batch], None] | None = None,
    on_wave: Callable[[Sequence[int]], None] | None = None,
    on_logits: Callable[[int, torch.Tensor], None] | None = None,
    on_block_done: Callable[[int, Snapshot], None] | None = None,
    start_block: int = 0,
    resume: Mapping[int, Any] | None = None,
    forks: Sequence[Fork] = (),
    share: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    wave_tokens: int | None = None,
    max_memory: int | None = None,
    scratch: Path | None = None,
) -> None:
    """Run ``model`` once over ``batches``; the caller has put it in eval mode and without a cache, see
    `forward.forwards`.

    Options that are None are those of `options.current_options`, and what `RunOptions` says where these are None.

    :param batches: keyword arguments of the model, on the device that it runs on
    :param description: beside the progress bar, which counts blocks times batches; None: no bar
    :param on_batch: called with a batch's index and the batch before the model, or each of its parts, sees it
    :param on_wave: called with the indices of batches whose tokens the same experts see next, in their order
    :param on_logits: called with a batch's index and its logits [batch, sequence, vocabulary]; without it the
        LM head does not run. A fork's index follows those of the batches and of the forks before it; a batch comes
        first, its forks follow before the next batch
    :param on_block_done: called with a block's index when all batches have passed it, and with a function that
        gives what the block returned for each of them: tensors of the model itself that hold until the callback
        returns, so copy what is kept
    :param start_block: blocks before it do not run; they hand their input on
    :param resume: batch -> what the block before ``start_block`` returned for it
    :param forks: none of a block before ``start_block``; of the callbacks only ``on_logits`` is called for them
    :param share: of the calibration data, that the batches are
    :raises ValueError: ``start_block`` without ``resume``, or forks while somebody watches experts
    """
    options = current_options()
    if start_block and resume is None:
        raise ValueError(f"start_block={start_block} needs resume: what block {start_block - 1} returned.")
    if forks and on_wave is not None:
        raise ValueError("on_wave with forks: experts see tokens of batches and forks together.")
    if not batches:
        return
    device = torch.device(get_execution_device(model))
    dtype = compute_dtype or options.compute_dtype or fast_dtype(stored_dtype(model), device)
    parts = _Parts(model, dtype)
    host = max_memory if max_memory is not None else options.max_memory
    if host is None:
        host = available_memory("cpu") // 2
    on_device = host if device.type == "cpu" else min(host, available_memory(device) // 2)
    events = _Events(on_batch, on_wave, on_logits, on_block_done)
    start = _Start(start_block, resume or {}, device)
    blocks = len(parts.blocks)
    wave = wave_tokens or options.wave_tokens or _wave_tokens(model, parts, device)
    total = (blocks - start_block) * len(batches) + sum(blocks - fork.block for fork in forks)
    with (
        torch.no_grad(),
        Waiting(device, on_device, host, scratch or options.scratch) as waiting,
        progress(total, description, passes=share * total / (blocks * len(batches))) as advance,
    ):
        _Lockstep(model, batches, forks, parts, events, start, wave, waiting, advance).run()


@dataclass(frozen=True)
class _Events:
    on_batch: Callable[[int, Batch], None] | None
    on_wave: Callable[[Sequence[int]], None] | None
    on_logits: Callable[[int, torch.Tensor], None] | None
    on_block_done: Callable[[int, Snapshot], None] | None


@dataclass(frozen=True)
class _Start:
    block: int
    resume: Mapping[int, Any]
    device: torch.device


class _BeforeHead(BaseException):
    """Ends a forward that nobody wants logits of."""


@dataclass(frozen=True)
class _AtStation:
    """A batch waits where a block begins, or the LM head.

    :param position: of the block; the number of blocks for the head
    :param values: the arguments
    """

    position: int
    values: Any


@dataclass(frozen=True)
class _AtExperts:
    """A batch waits where a block's routed experts begin.

    :param hidden: [tokens, hidden], or [experts * tokens, hidden] where ``index`` is None
    :param index: [tokens, top_k]
    :param weights: [tokens, top_k]
    :param kept_channels: see `Change`
    """

    experts: nn.Module
    hidden: torch.Tensor
    index: torch.Tensor | None
    weights: torch.Tensor | None
    kept_channels: torch.Tensor | None = None


@dataclass(eq=False)
class _Run:
    """One batch on its way, or a fork of it.

    :param tokens: padding included
    :param fork: of what it is one; None for a batch itself
    :param forks: runs that begin where this one enters a block
    :param handed: blocks that do not run for it; they hand their input on, and the last gives ``entering``
    :param passed: blocks that it has left
    :param at: where it waits; None before the start and after the end
    :param inside: whether it is inside a block
    :param change: of the block that it is inside of
    :param output: what the last block it left returned
    """

    index: int
    batch: Batch
    tokens: int
    greenlet: greenlet.greenlet
    fork: Fork | None = None
    forks: list[_Run] = field(default_factory=list)
    handed: list[int] = field(default_factory=list)
    entering: Callable[[], Any] | None = None
    passed: list[int] = field(default_factory=list)
    at: _AtStation | _AtExperts | None = None
    inside: bool = False
    change: Change | None = None
    output: Any = None


class _Parts:
    """The model as a pass sees it.

    :ivar blocks: in order
    :ivar block_weights: for each block, its modules without the single experts
    :ivar experts: modules that hold routed experts, linearized or fused
    :ivar single_experts: experts of linearized ones, with their modules
    :ivar embeddings: those outside the blocks, whose rows are cast and not the whole matrix
    :ivar outside: all modules outside the blocks
    :ivar head: what gives the logits
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        stack = model.get_submodule(_stack_path(model))
        self.blocks = list(stack)
        self.experts = [
            module for _, module in [*get_non_linearized_moes(stack), *get_linearized_moes(stack)]
        ]
        single = [
            expert
            for experts in self.experts
            if isinstance(experts, LinearExperts2D)
            for expert in expert_modules(experts)
        ]
        self.single_experts = [(expert, ComputedModules(expert.modules(), dtype)) for expert in single]
        apart = {module for expert in single for module in expert.modules()}
        self.block_weights = [
            ComputedModules([module for module in block.modules() if module not in apart], dtype)
            for block in self.blocks
        ]
        inside = set(stack.modules())
        outside = [module for module in model.modules() if module not in inside]
        self.embeddings = [module for module in outside if type(module) is nn.Embedding]
        whole = set(self.embeddings)
        self.outside = (
            ComputedModules(self.embeddings, None),
            ComputedModules([module for module in outside if module not in whole], dtype),
        )
        self.head = model.get_output_embeddings()
        self.dtype = dtype


class _Lockstep:
    """One pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        forks: Sequence[Fork],
        parts: _Parts,
        events: _Events,
        start: _Start,
        wave_tokens: int,
        waiting: Waiting,
        advance: Callable[[int], Any],
    ) -> None:
        self._model, self._parts, self._events = model, parts, events
        self._wave_tokens, self._waiting, self._advance = wave_tokens, waiting, advance
        self._scheduler = greenlet.getcurrent()
        self._running: _Run | None = None
        self._passed: Counter[int] = Counter()
        self._experts_forward: dict[nn.Module, Callable[..., torch.Tensor]] = {}
        self._bases = [self._base(index, batch, start) for index, batch in enumerate(batches)]
        for number, fork in enumerate(forks):
            base = self._bases[fork.batch]
            run = _Run(len(batches) + number, base.batch, base.tokens, self._coroutine(base.batch), fork=fork)
            base.forks.append(run)
        # In the order in which logits come.
        self._runs = [run for base in self._bases for run in (base, *base.forks)]

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            self._replace_forwards(stack)
            for outside in self._parts.outside:
                stack.enter_context(outside)
            stack.callback(self._abandon)
            for run in self._bases:
                self._resume(run)
            while waiting := [run for run in self._runs if run.at is not None]:
                counts = Counter(run.at.position for run in waiting)
                position = min(counts, key=lambda position: (-counts[position], position))
                there = [run for run in waiting if run.at.position == position]
                for outside in self._parts.outside:
                    outside.release()
                if position == len(self._parts.blocks):
                    for run in there:
                        self._resume(run)
                else:
                    self._visit(position, there)

    def _visit(self, position: int, runs: list[_Run]) -> None:
        """Lead batches through a block; the next one is read meanwhile."""
        if position + 1 < len(self._parts.blocks):
            read_ahead(self._parts.blocks[position + 1].modules())
        with self._parts.block_weights[position]:
            for wave in _waves(runs, self._wave_tokens):
                for run in wave:
                    self._resume(run)
                while here := [run for run in wave if isinstance(run.at, _AtExperts)]:
                    experts = here[0].at.experts
                    self._route([run for run in here if run.at.experts is experts])
                self._advance(len(wave))
        if self._events.on_block_done is not None and self._passed[position] >= len(self._bases):
            self._events.on_block_done(position, lambda: {run.index: run.output for run in self._bases})

    def _route(self, runs: list[_Run]) -> None:
        """Let experts see the tokens of all these batches at once, and give each batch its share."""
        calls = [run.at for run in runs]
        if self._events.on_wave is not None:
            self._events.on_wave([run.index for run in runs])
        for run, output in zip(runs, self._merged(calls), strict=True):
            self._resume(run, output)

    def _merged(self, calls: list[_AtExperts]) -> Sequence[torch.Tensor]:
        experts = calls[0].experts
        hidden = [call.hidden for call in calls]
        copies = 1 if calls[0].index is not None else _num_experts(experts)
        lengths = [len(values) // copies for values in hidden]
        forward = self._experts_forward[experts]
        kept = [call.kept_channels for call in calls]
        if any(mask is not None for mask in kept):
            forward = _routed(experts, run=run_silenced(kept, lengths, hidden[0].device))
        if calls[0].index is not None:
            indices, weights = ([getattr(call, name) for call in calls] for name in ("index", "weights"))
            output = forward(_cat(hidden), _cat(indices), _cat(weights))
            return output.split(lengths)
        # Every expert has its own copy of all tokens.
        views = [values.view(copies, -1, values.shape[-1]) for values in hidden]
        output = forward(_cat(views, dim=1).flatten(0, 1))
        parts = output.view(copies, -1, output.shape[-1]).split(lengths, dim=1)
        return [part.flatten(0, 1) for part in parts]

    def _base(self, index: int, batch: Batch, start: _Start) -> _Run:
        run = _Run(index, batch, _tokens(batch), self._coroutine(batch))
        if start.block:
            run.handed = list(range(start.block))
            run.entering = lambda: send_tensors(start.resume[index], start.device)
        return run

    def _coroutine(self, batch: Batch) -> greenlet.greenlet:
        def forward(_: None) -> Any:
            try:
                return self._model(**batch)
            except _BeforeHead:
                return None

        coroutine = greenlet.greenlet(forward)
        coroutine.gr_context = contextvars.copy_context()
        return coroutine

    def _resume(self, run: _Run, value: Any = None) -> None:
        if self._events.on_batch is not None and run.fork is None:
            self._events.on_batch(run.index, run.batch)
        if isinstance(run.at, _AtStation):
            self._waiting.take(run.index)
        self._running, run.at = run, None
        try:
            found = run.greenlet.switch(value)
        finally:
            self._running = None
        if not run.greenlet.dead:
            run.at = found
            if isinstance(found, _AtStation):
                self._begin_forks(run, found.position)
                self._waiting.put(run.index, self._movable(run, found))
            return
        if run.fork is not None:
            run.output = None
        if self._events.on_logits is not None:
            self._events.on_logits(run.index, found.logits)

    def _begin_forks(self, run: _Run, position: int) -> None:
        """Forks of this block start with copies: some blocks work on their input in place."""
        for other in run.forks:
            if other.fork.block == position:
                other.handed = [*run.handed, *run.passed]
                other.entering = functools.partial(tree_map_only, torch.Tensor, torch.clone, run.output)
                self._resume(other)

    def _movable(self, run: _Run, at: _AtStation) -> list[torch.Tensor]:
        given = {id(value) for value in tensors_in(run.batch)}
        return [value for value in tensors_in([run.output, at.values]) if id(value) not in given]

    def _pause(self, at: _AtStation | _AtExperts) -> Any:
        return self._scheduler.switch(at)

    def _abandon(self) -> None:
        """End forwards that an exception elsewhere has left in the middle."""
        for run in self._runs:
            if run.greenlet:
                run.greenlet.throw()

    def _replace_forwards(self, stack: contextlib.ExitStack) -> None:
        parts = self._parts
        for position, block in enumerate(parts.blocks):
            stack.enter_context(bypassed(block, self._block_forward(position, block, block.forward)))
        for experts in parts.experts:
            own = self._experts_forward[experts] = _unwatched(experts, experts.forward)
            alone = any(map(_rounds_tokens_together, experts.modules()))
            stack.enter_context(bypassed(experts, self._pausing_experts(experts, own, alone)))
        for expert, weights in parts.single_experts:
            stack.enter_context(bypassed(expert, _inside(weights, expert.forward)))
        for embedding in parts.embeddings:
            stack.enter_context(bypassed(embedding, _cast(embedding.forward, parts.dtype)))
        if parts.head is not None:
            stack.enter_context(bypassed(parts.head, self._head_forward(parts.head.forward)))

    def _block_forward(self, position: int, block: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        hand_on = functools.cache(lambda: pass_through(block))

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = self._running
            if run is None or run.inside:
                return own(*args, **kwargs)
            if run.handed and position == run.handed[-1]:
                run.output = run.entering()
                run.entering = None
                return run.output
            if position in run.handed:
                return hand_on()(*args, **kwargs)
            self._pause(_AtStation(position, (args, kwargs)))
            run.inside = True
            run.output = self._through(run, position, block, own)(*args, **kwargs)
            run.inside = False
            run.passed.append(position)
            self._passed[position] += run.fork is None
            return run.output

        return forward

    def _through(
        self, run: _Run, position: int, block: nn.Module, own: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The block as the run goes through it."""
        if run.fork is None or position != run.fork.block:
            return own
        change = run.fork.change

        def changed(*args: Any, **kwargs: Any) -> Any:
            run.change = change
            change.enter()
            try:
                return change.forward(block, own)(*args, **kwargs)
            finally:
                change.leave()
                run.change = None

        return changed

    def _pausing_experts(
        self, experts: nn.Module, own: Callable[..., Any], alone: bool
    ) -> Callable[..., Any]:
        """
        :param alone: whether these experts must not see the tokens of several runs together
        """

        def through(call: _AtExperts) -> torch.Tensor:
            return self._merged([call])[0] if alone else self._pause(call)

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = self._running
            if run is None or not run.inside:
                return own(*args, **kwargs)
            if run.change is None:
                call = None if alone else _call(experts, args, kwargs)
                return own(*args, **kwargs) if call is None else self._pause(call)
            inputs, back = run.change.at_experts(_inputs(experts, args, kwargs))
            run.change.leave()
            call = _call(experts, inputs, {}, run.change.kept_channels)
            output = own(*inputs) if call is None else through(call)
            run.change.enter()
            return back(output)

        return forward

    def _head_forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._events.on_logits is None:
                raise _BeforeHead
            self._pause(_AtStation(len(self._parts.blocks), (args, kwargs)))
            return own(*args, **kwargs)

        return forward


def _inside(weights: ComputedModules, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with weights:
            return own(*args, **kwargs)

    return forward


def _cast(own: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        rows = own(*args, **kwargs)
        return rows.to(dtype) if rows.element_size() == 2 else rows

    return forward


def _unwatched(experts: nn.Module, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Experts on routed tokens only, which upstream's are not while a recipe calibrates; those that somebody
    watches see to that themselves.
    """
    if not isinstance(experts, LinearExperts2D) or getattr(own, "__self__", None) is not experts:
        return own
    return _routed(experts)


def _routed(experts: nn.Module, **how: ExpertRun) -> Callable[..., torch.Tensor]:
    """
    :param how: see `experts.routed_forward`
    """

    def forward(hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        return (routed_forward if routing else scattered_forward)(experts, hidden_states, *routing, **how)

    return forward


def _rounds_tokens_together(module: nn.Module) -> bool:
    """Whether a module's scale for its input depends on which tokens it gets at once."""
    scheme = getattr(module, "quantization_scheme", None)
    inputs = getattr(scheme, "input_activations", None)
    return (
        inputs is not None
        and inputs.dynamic is True
        and inputs.strategy == QuantizationStrategy.TENSOR
        and getattr(module, "quantization_enabled", True)
    )


def _call(
    experts: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    kept_channels: torch.Tensor | None = None,
) -> _AtExperts | None:
    """A call of experts that can be merged with others, None for any other one.

    :raises TypeError: only some channels are kept, and the experts are fused or called in a way that does not say
        which tokens each of them sees
    """
    values = _arguments(args, kwargs)
    if values is not None and all(value.ndim == 2 for value in values):
        hidden, index, weights = values if len(values) == 3 else (*values, None, None)
        mergeable = index is None or len(hidden) == len(index) == len(weights)
        if mergeable and (kept_channels is None or isinstance(experts, LinearExperts2D)):
            return _AtExperts(experts, hidden, index, weights, kept_channels)
    if kept_channels is not None:
        raise TypeError(
            f"{type(experts).__name__}: what its block does with fewer channels can be measured only where "
            "experts are separate modules that get hidden states, indices and weights of two dimensions each."
        )
    return None


def _inputs(experts: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Arguments of a call of experts by a block that is changed."""
    values = _arguments(args, kwargs)
    if values is None:
        raise TypeError(
            f"{type(experts).__name__} is called with other arguments than {', '.join(_ARGUMENTS)}: what its "
            "block does with fewer experts cannot be measured."
        )
    return values


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """Hidden states, or hidden states, indices and weights; None for any other arguments."""
    rest = dict(kwargs)
    values = [*args, *(rest.pop(name) for name in _ARGUMENTS[len(args) :] if name in rest)]
    if rest or len(values) not in (1, 3) or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    return values


_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def _cat(values: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.cat(values, dim=dim)


def _num_experts(experts: nn.Module) -> int:
    return len(expert_modules(experts)) or experts.num_experts


def _tokens(batch: Batch) -> int:
    ids = batch.get("input_ids")
    return ids.numel() if ids is not None else batch["inputs_embeds"].shape[:-1].numel()


def _waves(runs: Sequence[_Run], limit: int) -> Iterator[list[_Run]]:
    wave: list[_Run] = []
    for run in runs:
        if wave and sum(other.tokens for other in wave) + run.tokens > limit:
            yield wave
            wave = []
        wave.append(run)
    yield wave


def _wave_tokens(model: PreTrainedModel, parts: _Parts, device: torch.device) -> int:
    copies = _COPIES
    for experts in parts.experts:
        if len(inspect.signature(type(experts).forward).parameters) == 2:
            # Only hidden states: every expert gets a copy of them, and gives one.
            copies = max(copies, _COPIES + 2 * _num_experts(experts))
    size = text_config(model.config).hidden_size * parts.dtype.itemsize * copies
    most = max(1, available_memory(device) // 4 // size)
    # A power of two, so that a little more or less free memory does not change the order of sums.
    return 1 << (most.bit_length() - 1)


def _stack_path(model: PreTrainedModel) -> str:
    """Module path of the ModuleList that holds the blocks."""
    with contextlib.suppress(NotAnMoEError):
        return find_topology(model).stack
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    known = {
        name: module
        for name, module in lists.items()
        if all(type(child).__name__ in blocks for child in module)
    }
    found = known or lists
    if not found:
        raise ValueError(f"{type(model).__name__} has no ModuleList that could be its stack of blocks.")
    return max(found, key=lambda name: len(found[name]))
