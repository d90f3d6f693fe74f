"""Make a quantization config name exactly the modules that are quantized, under every name that readers look
up.

A recipe's targets speak of the model as it came: after blocks went, the same layer numbers mean other layers.
And a family with its own names for experts (Mixtral) is looked up under those by vLLM and under
llm-compressor's by others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from compressed_tensors.offload import disable_onloading
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import nn

from llmcompressor_moe.topology import find_topology

__all__ = ["cover_quantized_modules", "patterns_for", "stack_pattern"]

# vLLM's words above the stack of blocks, whatever a family calls it.
_READERS_WORDS = {"model", "language_model"}
_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<expert>\d+)(?P<after>\..+)")


def cover_quantized_modules(
    model: nn.Module, quantization: dict[str, Any], spellings: Callable[[str], list[str]]
) -> None:
    """Rewrite ``ignore`` and the groups' ``targets`` in place.

    :param model: the model as it is saved; every quantized module carries its scheme
    :param quantization: ``quantization_config`` as compressed-tensors wrote it: one group per scheme, in the
        order of first appearance
    :param spellings: path of a module -> every name under which readers look it up, that path first
    """
    groups = list(quantization.get("config_groups", {}).values())
    schemes: list[Any] = []
    members: list[list[str]] = []
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if scheme not in schemes:
            schemes.append(scheme)
            members.append([])
        members[schemes.index(scheme)].append(name)
    stacks = spellings(find_topology(model).stack)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    everything = [spelling for name in linears for spelling in spellings(name)]
    ignored = [spelling for entry in quantization.get("ignore") or [] for spelling in spellings(entry)]
    # Fused experts hold no Linears, but readers look for one per expert and projection.
    fused = [spelling for name in _fused_projections(model) for spelling in spellings(name)]
    experts = [name for name in ignored if _EXPERT.fullmatch(name)]
    quantization["ignore"] = list(
        dict.fromkeys(
            [
                *(name for name in ignored if not _EXPERT.fullmatch(name)),
                # A model may have 50,000 of them.
                *patterns_for([*experts, *fused], [*everything, *fused], stacks),
            ]
        )
    )
    by_class_alone = len(groups) == 1 and groups[0].get("targets") == ["Linear"]
    if by_class_alone or len(groups) != len(schemes):
        return
    for group, quantized in zip(groups, members, strict=True):
        spelled = [spelling for name in quantized for spelling in spellings(name)]
        targets = patterns_for(spelled, everything, stacks)
        expressions = [
            re.compile(target.removeprefix("re:")) for target in targets if target.startswith("re:")
        ]
        others = set(everything) - set(spelled)
        if any(expression.match(name) for expression in expressions for name in others):
            targets = spelled
        group["targets"] = targets


def _fused_projections(model: nn.Module) -> Iterator[str]:
    """Names that the projections of fused experts would have as Linears."""
    for path, experts in get_non_linearized_moes(model):
        with disable_onloading():
            count = len(experts.down_proj)
        for expert in range(count):
            gate = ("gate_proj",) if hasattr(experts, "gate_up_proj") else ()
            yield from (f"{path}.{expert}.{name}" for name in (*gate, "up_proj", "down_proj"))


def patterns_for(names: Iterable[str], among: Iterable[str], stacks: Collection[str]) -> list[str]:
    """Few patterns that match these module names and no others.

    Names that differ only in the block and the expert share a pattern that lists the blocks. A block of which
    all experts are meant is written with any expert number; any other gets a pattern that lists its experts.
    Names outside of the stack of blocks, those of a vision or audio tower among them, are written out: towers
    have layers of the same names.

    :param names: names of Linears
    :param among: names of all Linears that there are, ``names`` among them
    :param stacks: path of the stack of blocks, in every naming
    """
    plain, places = _places(names, stacks)
    _, existing = _places(among, stacks)
    stack = stack_pattern(stacks)
    patterns = []
    for inside, layers in places.items():
        partly = [layer for layer, experts in layers.items() if experts != existing[inside][layer]]
        for layer in sorted(partly):
            chosen = "|".join(str(expert) for expert in sorted(layers.pop(layer)))
            path = re.escape(inside).replace(r"\*", f"(?:{chosen})")
            patterns.append(rf"re:{stack}\.{layer}\.{path}$")
        if not layers:
            continue
        listed = "|".join(str(layer) for layer in sorted(layers))
        path = re.escape(inside).replace(r"\*", r"\d+")
        patterns.append(rf"re:{stack}\.(?:{listed})\.{path}$")
    return [*dict.fromkeys(plain), *patterns]


def stack_pattern(stacks: Collection[str]) -> str:
    """A regular expression for the path of the stack of blocks, to match from the start of a name.

    It fits every naming, that of vLLM included, which puts the same words in another order
    (``model.language_model.layers`` and ``language_model.model.layers``), and no vision or audio tower.

    :param stacks: the path in every naming that is known
    """
    words = {word for stack in stacks for word in stack.split(".")[:-1]} | _READERS_WORDS
    lists = {stack.rpartition(".")[2] for stack in stacks}
    above, name = ("|".join(map(re.escape, sorted(some))) for some in (words, lists))
    return rf"(?:(?:{above})\.)*" + (name if len(lists) == 1 else f"(?:{name})")


def _places(
    names: Iterable[str], stacks: Collection[str]
) -> tuple[list[str], dict[str, dict[int, set[int]]]]:
    """Names outside of the blocks, and path in a block (``*`` for the expert) -> block -> experts (-1: none)."""
    plain: list[str] = []
    places: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    place_of = re.compile(rf"(?:{'|'.join(map(re.escape, stacks))})\.(?P<layer>\d+)\.(?P<inside>.+)")
    for name in names:
        place = place_of.fullmatch(name)
        if place is None:
            plain.append(name)
            continue
        inside, expert = place["inside"], -1
        if match := _EXPERT.fullmatch(inside):
            inside, expert = f"{match['before']}*{match['after']}", int(match["expert"])
        places[inside][int(place["layer"])].add(expert)
    return plain, places
