"""Builds the layers of vLLM's transformers backend by a plan.

There transformers constructs the decoder layers, all at once, and vLLM then puts a fused MoE in the place of
each layer's experts. So a layer's values have to hold while transformers constructs its class, and the fused
MoE has to be made with the layer's own count and width.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmcompressor_moe_vllm.config_view import layer_view
from llmcompressor_moe_vllm.layers import BuiltLayer, DroppedFeedForward
from llmcompressor_moe_vllm.overrides import LayerOverride, Plan

Record = Callable[[int, BuiltLayer], None]

# The name under which vLLM looks for experts to replace.
_EXPERTS = "experts"


@contextmanager
def layers_by_plan(plan: Plan, record: Record) -> Iterator[None]:
    """Models of the transformers backend that are built inside follow `plan`; `record` gets every layer."""
    with ExitStack() as patches:
        _replace(patches, PreTrainedModel, "__init__", lambda init: _preparing(init, patches, plan, record))
        try:
            from vllm.model_executor.models.transformers import moe
        except ImportError:
            # A vLLM without this backend, or with another one: the verification refuses what it builds.
            pass
        else:
            _replace(patches, moe, "FusedMoEFactory", lambda make: _counted(make, plan, record))
        yield


def _preparing(init: Callable, patches: ExitStack, plan: Plan, record: Record) -> Callable:
    """`PreTrainedModel.__init__`, which runs before a model makes its layers, preparing their classes."""
    prepared: set[type] = set()

    def prepare(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        for block in _block_classes(type(model)) - prepared:
            prepared.add(block)
            _replace(patches, block, "__init__", lambda block_init: _planned(block_init, plan, record))
        init(model, *args, **kwargs)

    return prepare


def _block_classes(model: type[PreTrainedModel]) -> set[type]:
    """The classes of a model's blocks, which transformers names because no block is split over devices."""
    home = vars(sys.modules[model.__module__])
    return {home[name] for name in model._no_split_modules or () if isinstance(home.get(name), type)}


def _planned(init: Callable, plan: Plan, record: Record) -> Callable:
    """A block class's `__init__`, following the override of the layer that it is called for."""
    parameters = inspect.signature(init)

    def init_by_plan(block: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = parameters.bind(block, *args, **kwargs).arguments
        index = given.get("layer_idx")
        ours = any(isinstance(value, PreTrainedConfig) and value.is_heterogeneous for value in given.values())
        if not ours or index is None:
            # A block of another part of the model, a vision tower say.
            init(block, *args, **kwargs)
            return
        override = plan.get(index, LayerOverride())
        with layer_view(override.values) as reads:
            init(block, *args, **kwargs)
        dropped = _drop_feed_forward(block) if override.dropped else None
        record(index, BuiltLayer(dropped, (), reads.per_layer_config))

    return init_by_plan


def _drop_feed_forward(block: nn.Module) -> str | None:
    """Replace the child of `block` that holds the experts; returns its name, None where no child does."""
    for name, child in block.named_children():
        if any(path.rpartition(".")[2] == _EXPERTS for path, _ in child.named_modules()):
            setattr(block, name, DroppedFeedForward())
            return name
    return None


def _counted(make: Callable, plan: Plan, record: Record) -> Callable:
    """vLLM's constructor of a fused MoE, with the count and the width of the layer that its prefix names."""
    from vllm.model_executor.models.utils import extract_layer_index

    def make_its_own(
        *args: Any, num_experts: int, intermediate_size: int, prefix: str, **kwargs: Any
    ) -> nn.Module:
        index = extract_layer_index(prefix)
        override = plan.get(index, LayerOverride())
        count = override.num_experts or num_experts
        width = override.expert_width or intermediate_size
        record(index, BuiltLayer(None, (count,), False, (width,)))
        return make(*args, num_experts=count, intermediate_size=width, prefix=prefix, **kwargs)

    return make_its_own


def _replace(patches: ExitStack, owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Put `wrapper(owner.name)` in its place until `patches` closes."""
    inherited = name not in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(wrapper(original)))
    patches.callback(lambda: delattr(owner, name) if inherited else setattr(owner, name, original))
