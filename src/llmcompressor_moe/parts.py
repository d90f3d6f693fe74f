"""The kinds of parts that a model's weights belong to, told by where they stand."""

from __future__ import annotations

from llmcompressor_moe.topology import Block, Topology

__all__ = [
    "ATTENTION",
    "DENSE",
    "EMBEDDINGS",
    "EXPERTS",
    "HEAD",
    "NORMS",
    "OTHER",
    "PARTS",
    "ROUTER",
    "SHARED",
    "block_of",
    "part_of",
]

EMBEDDINGS, ATTENTION, ROUTER, EXPERTS = "embeddings", "attention", "router", "experts"
SHARED, DENSE, NORMS, HEAD, OTHER = "shared experts", "dense FFN", "norms", "head", "other"
PARTS = (EMBEDDINGS, ATTENTION, ROUTER, EXPERTS, SHARED, DENSE, NORMS, HEAD, OTHER)

_DENSE_NAMES = ("mlp", "feed_forward", "ffn", "shared")


def block_of(name: str, topology: Topology) -> Block | None:
    """The block that a parameter or module belongs to; None outside the stack."""
    prefix = f"{topology.stack}."
    index = name.removeprefix(prefix).split(".", 1)[0]
    return topology.blocks[int(index)] if name.startswith(prefix) and index.isdigit() else None


def part_of(name: str, block: Block | None) -> str:
    """The part that a parameter belongs to; embeddings and head, which have no place of their own, count as
    other.

    :param block: the block that the parameter stands in
    """
    if block is None:
        return NORMS if "norm" in name else OTHER
    moe = block.moe
    if moe is not None:
        if name.startswith(f"{moe.experts}."):
            return EXPERTS
        if any(name.startswith(f"{shared}.") for shared in moe.shared_experts):
            return SHARED
        if (moe.router and name.startswith(f"{moe.router}.")) or (
            not moe.inline and name.startswith(f"{moe.module}.")
        ):
            return ROUTER
    child = name.removeprefix(f"{block.name}.").split(".")[0]
    if "norm" in child:
        return NORMS
    return DENSE if any(word in child for word in _DENSE_NAMES) else ATTENTION
