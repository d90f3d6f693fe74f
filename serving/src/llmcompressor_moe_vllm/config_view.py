"""Lets a heterogeneous config answer for one layer while that layer is built.

vLLM's layers read the global config (`config.num_local_experts`), and transformers raises on such a read
when the attribute differs between layers. Models also copy their config, or reach it along several ways, so
the view hangs on the config class, not on one object, and only for as long as a layer is being built.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass
class Reads:
    """What was read from heterogeneous configs while a layer was built."""

    per_layer_config: bool = False
    """The architecture asked for its layer's own config: it knows that layers differ."""


@contextmanager
def layer_view(values: Mapping[str, Any]) -> Iterator[Reads]:
    """Heterogeneous configs answer `values` (canonical attribute -> value) inside; yields the reads."""
    reads = Reads()
    plain = PreTrainedConfig.__getattribute__

    def answering(config: PreTrainedConfig, name: str) -> Any:
        if name == "per_layer_config":
            reads.per_layer_config = True
            return plain(config, name)
        canonical = name if name == "attribute_map" else plain(config, "attribute_map").get(name, name)
        if canonical in values and plain(config, "is_heterogeneous"):
            return values[canonical]
        return plain(config, name)

    PreTrainedConfig.__getattribute__ = answering
    try:
        yield reads
    finally:
        PreTrainedConfig.__getattribute__ = plain


def allow_global_reads(*configs: PreTrainedConfig) -> None:
    """Allow reads of the global value, the largest of all layers', outside of layers.

    Models size their weight loaders' tables by it. Set on configs in this process only; nothing writes them.
    """
    for config in configs:
        if config.is_heterogeneous:
            config.allow_global_per_layer_attribute_access = True


@contextmanager
def global_reads_allowed(*configs: PreTrainedConfig) -> Iterator[None]:
    """Allow such reads inside the block."""
    before = [(config, config.allow_global_per_layer_attribute_access) for config in configs]
    allow_global_reads(*configs)
    try:
        yield
    finally:
        for config, allowed in before:
            config.allow_global_per_layer_attribute_access = allowed
