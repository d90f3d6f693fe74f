"""Bytes that a model will take on disk, part by part, before anything is compressed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from llmcompressor_moe.checkpoint.names import ExpertNames, expert_names
from llmcompressor_moe.quantization.schemes import Candidate
from llmcompressor_moe.quantization.sizes import StoredSize, linear_size, tensor_size
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["expert_sizes", "rest_size"]

# A file's header length and metadata.
_PER_FILE = 8 + len('{"__metadata__":{"format":"pt"},}') + 8


def expert_sizes(
    session: TrimSession, experts: Sequence[Mapping[str, nn.Linear]], candidates: Sequence[Candidate]
) -> list[dict[str, StoredSize]]:
    """Candidate -> size, for each expert of a layer.

    :param experts: module path -> Linear, for each expert
    """
    names = _names(session)
    with disable_onloading():
        return [
            {
                candidate.name: sum(
                    (
                        linear_size(_stored(name, names), linear, candidate.scheme)
                        for name, linear in linears.items()
                    ),
                    StoredSize(),
                )
                for candidate in candidates
            }
            for linears in experts
        ]


def rest_size(
    session: TrimSession, schemes: Mapping[str, QuantizationScheme], covered: Collection[str]
) -> StoredSize:
    """Everything but the covered Linears, as it will be stored.

    :param schemes: module path -> scheme that it will get; modules that another modifier gave one keep theirs
    :param covered: module paths to leave out
    """
    model, names = session.model, _names(session)
    gone = tuple(f"{session.topology.blocks[index].name}." for index in session.dropped_blocks) + tuple(
        f"{session.topology.moe_layers[index].module}." for index in session.dropped_layers
    )
    covered = set(covered)
    total = StoredSize(header=_PER_FILE)
    seen: set[int] = set()
    with disable_onloading():
        for name, module in model.named_modules():
            if name in covered or f"{name}.".startswith(gone):
                continue
            scheme = schemes.get(name) or getattr(module, "quantization_scheme", None)
            if isinstance(module, nn.Linear) and scheme is not None and scheme.weights is not None:
                total += linear_size(_stored(name, names), module, scheme)
                continue
            tensors = {
                **module._parameters,
                **{n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set},
            }
            for leaf, tensor in tensors.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    path = f"{name}.{leaf}" if name else leaf
                    total += tensor_size(_stored(path, names), tuple(tensor.shape), tensor.dtype)
    return total


def _names(session: TrimSession) -> ExpertNames | None:
    return expert_names(session.model.config)


def _stored(name: str, names: ExpertNames | None) -> str:
    return names.apply(name) if names else name
