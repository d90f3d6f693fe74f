"""How transformers builds models."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["blocks_built_by", "build", "class_for", "class_named", "initialize"]

Init = Callable[..., None]


@contextlib.contextmanager
def blocks_built_by(
    block_classes: Callable[[type[PreTrainedModel], PreTrainedConfig], Iterable[type[nn.Module]]],
    build_block: Callable[[Init], Init],
    check: Callable[[PreTrainedModel], None],
) -> Iterator[None]:
    """Context in which chosen classes of blocks are built in another way.

    transformers reads ``per_layer_config`` but does not build models from it, and has no hook between a model's
    config and its blocks.

    :param block_classes: classes to be changed for a model that is about to be built, none to leave it alone
    :param build_block: from a block class's ``__init__`` to the one in its place
    :param check: called with every model (and every part that is one) when all its parts stand
    """
    changed: set[type[nn.Module]] = set()

    with contextlib.ExitStack() as patches:

        def before_model(original: Init) -> Init:
            def init(model: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
                if isinstance(config, PreTrainedConfig):
                    for block_cls in set(block_classes(type(model), config)) - changed:
                        changed.add(block_cls)
                        _replace(patches, block_cls, "__init__", build_block)
                original(model, config, *args, **kwargs)

            return init

        def after_model(original: Init) -> Init:
            def post_init(model: PreTrainedModel) -> None:
                check(model)
                original(model)

            return post_init

        _replace(patches, PreTrainedModel, "__init__", before_model)
        _replace(patches, PreTrainedModel, "post_init", after_model)
        yield


def _replace(patches: contextlib.ExitStack, owner: type, name: str, make: Callable[[Init], Init]) -> None:
    """Put ``make(what is there)`` in the place of a class's method until ``patches`` closes."""
    inherited = name not in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))
    patches.callback(lambda: delattr(owner, name) if inherited else setattr(owner, name, original))


def build(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class, with random weights in the config's dtype and attention.

    ``from_config`` is public on Auto classes only, which choose the class themselves. Calling the class leaves
    out the dtype.
    """
    return cls._from_config(config)


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Give one module the values that it has in a new model.

    ``initialize_weights`` is for whole models, and skips modules that it takes for done. Buffers that no
    checkpoint holds get their values here alone.

    :param model: the transformers model that the module is a part of
    """
    model._init_weights(module)


def class_for(auto: type, config: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """The model class that an Auto class builds for a class of configs; None where it has none.

    Its public methods build a model or raise.
    """
    found = auto._model_mapping.get(config, None)
    return found[0] if isinstance(found, tuple) else found


def class_named(name: str) -> type[PreTrainedModel] | None:
    """The model class that an entry of a config's ``architectures`` names; None where there is none.

    Of transformers itself, or registered with `AutoModelForCausalLM`, which finds classes by configs only.
    """
    registered = {cls.__name__: cls for cls in AutoModelForCausalLM._model_mapping._extra_content.values()}
    found = getattr(transformers, name, None) or registered.get(name)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
