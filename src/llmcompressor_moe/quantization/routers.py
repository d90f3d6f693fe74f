"""Round routers to a scheme's grid; they stay stored in 16 bit, because no reader takes packed routers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from compressed_tensors.offload import align_modules, update_offload_parameter
from compressed_tensors.quantization import QuantizationStatus, forward_quantize
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe, update_qparams
from torch import nn

from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.profile.routing import trace_routing
from llmcompressor_moe.quantization.schemes import Candidate, why_not_divisible
from llmcompressor_moe.routing.fidelity import routing_fidelity
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["check_routers", "guard_routers", "restore_routers", "round_routers"]

# (module, parameter name, value before)
Before = list[tuple[nn.Module, str, torch.Tensor]]


def check_routers(session: TrimSession, candidate: Candidate) -> None:
    """Refuse a scheme whose groups do not fit, and a model without anything to round.

    :raises ValueError: names the router, both sizes and a size that fits
    """
    paths = [moe.router for moe in session.topology.moe_layers.values() if moe.router]
    matrices = {
        f"{path}.{name}": parameter
        for path in paths
        for name, parameter in session.model.get_submodule(path).named_parameters()
        if parameter.ndim == 2
    }
    if not matrices:
        raise ValueError(
            f"router={candidate.name!r}: no router of this {session.topology.model_type!r} model has a matrix "
            "that could be rounded; leave router out."
        )
    inputs = [parameter.shape[1] for parameter in matrices.values()]
    for name, parameter in matrices.items():
        reason = why_not_divisible(candidate.scheme, *parameter.shape, inputs)
        if reason is not None:
            raise ValueError(f"router: {candidate.name} cannot round {name}: {reason}.")


@torch.no_grad()
def round_routers(routers: Iterable[nn.Module], candidate: Candidate) -> Before:
    """Round every weight matrix [experts, hidden] of these routers, in place.

    :return: what `restore_routers` needs to undo it
    """
    before: Before = []
    for router in routers:
        for module in router.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim != 2:
                    continue
                with align_modules([module]):
                    value = getattr(module, name).detach().clone()
                before.append((module, name, value))
                update_offload_parameter(module, name, _rounded(value, candidate))
    return before


@torch.no_grad()
def restore_routers(before: Before) -> None:
    """Undo `round_routers`."""
    for module, name, value in before:
        update_offload_parameter(module, name, value)


def guard_routers(
    session: TrimSession,
    candidate: Candidate,
    batches: Sequence[dict[str, Any]],
    limit: float,
    skip_layers: set[int],
) -> float:
    """Round all routers, if that changes few of their decisions.

    :param batches: held-out data
    :param limit: largest share of (token, layer) choices of an expert that may change
    :return: the share that changed
    :raises ValueError: more changed; the routers are as they were
    """
    topology = session.topology_now()
    layers = [layer for layer in session.layers if topology.moe_layers[layer].router]
    modules = [session.model.get_submodule(topology.moe_layers[layer].router) for layer in layers]
    before = trace_routing(session.model, topology, batches, skip_layers=skip_layers)
    undo = round_routers(modules, candidate)
    after = trace_routing(session.model, topology, batches, skip_layers=skip_layers)
    overlaps = [
        routing_fidelity(before[layer], after[layer], total=sum_over_ranks).top_k_overlap for layer in layers
    ]
    change = 1 - sum(overlaps) / max(len(overlaps), 1)
    if change > limit:
        restore_routers(undo)
        raise ValueError(
            f"router={candidate.name!r} would change {100 * change:.3g}% of the routing decisions, more than "
            f"max_routing_change={limit:g} allows. Leave the routers in 16 bit, use a finer scheme, or raise "
            "the limit."
        )
    return change


def _rounded(value: torch.Tensor, candidate: Candidate) -> torch.Tensor:
    linear = nn.Linear(value.shape[1], value.shape[0], bias=False, device=value.device, dtype=value.dtype)
    linear.weight.copy_(value)
    initialize_module_for_quantization(linear, candidate.for_targets(["Linear"]))
    initialize_observer(linear, "weight")
    linear.quantization_status = QuantizationStatus.CALIBRATION
    observe(linear, "weight")
    update_qparams(linear, "weight")
    return forward_quantize(linear, linear.weight, "weight", linear.quantization_scheme.weights)
