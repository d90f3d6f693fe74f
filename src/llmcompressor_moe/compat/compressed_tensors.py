"""compressed-tensors: how it keeps the weights of an offloaded module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from compressed_tensors.offload.cache.base import OffloadCache
from compressed_tensors.utils import patch_attr

__all__ = ["HOLDS_FOR", "caches_of", "is_offloaded"]

HOLDS_FOR = "compressed-tensors>=0.19,<0.20"


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether any module's weights live somewhere else than where they are used.

    compressed-tensors puts a cache in the place of a module's dictionary of parameters and has no function that
    says so for a whole model. Its caches also stand on modules that are not moved, so devices are compared.
    """
    caches = (module._parameters for module in model.modules())
    return any(
        isinstance(cache, OffloadCache) and cache.offload_device != cache.onload_device for cache in caches
    )


@contextlib.contextmanager
def caches_of(cache: type[OffloadCache]) -> Iterator[None]:
    """Context in which `offload_module` gives modules caches of a class of ours.

    compressed-tensors chooses the class by device and has no way to add one.
    """
    with patch_attr(OffloadCache, "cls_from_device", lambda *_: cache):
        yield
