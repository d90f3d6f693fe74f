"""Which modifiers a recipe can name."""

from __future__ import annotations

from llmcompressor.modifiers.factory import ModifierFactory

__all__ = ["known_modifiers", "load_modifiers"]


def load_modifiers() -> None:
    """Find llm-compressor's own modifiers, once.

    ``create`` does not find them before ``refresh`` has, and ``refresh`` imports all of them every time.
    """
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()


def known_modifiers() -> list[str]:
    """Names of llm-compressor's modifiers and of registered ones, sorted; nothing public lists them."""
    registries = (ModifierFactory._main_registry, ModifierFactory._registered_registry)
    return sorted({name for registry in registries for name in registry})
