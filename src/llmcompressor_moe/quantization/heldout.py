"""What the model does on held-out batches before and after quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.quantization import enable_quantization
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from llmcompressor_moe.profile.computing import computed_in, fast_dtype, stored_dtype
from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.profile.routing import RouterTrace, trace_routing
from llmcompressor_moe.profile.samples import LayerSample, collect_samples
from llmcompressor_moe.routing.fidelity import RoutingFidelity, restricted, routing_fidelity
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["Reference", "judge", "observe_reference"]

_TOKENS_PER_EXPERT = 64


@dataclass
class Reference:
    """What the model did before it was quantized.

    :param batches: the held-out batches
    :param apart: whether nothing was decided on these batches (False: there was only one batch)
    :param expert_ids: layer -> original indices of its experts
    """

    batches: list[dict[str, Any]]
    apart: bool
    traces: dict[int, RouterTrace]
    samples: dict[int, LayerSample]
    expert_ids: dict[int, list[int]]


def observe_reference(
    session: TrimSession, batches: list[dict[str, Any]], apart: bool, skip_layers: set[int]
) -> Reference:
    """Two passes over the held-out batches: the routers' decisions, and samples of the experts' work."""
    topology = session.topology_now()
    return Reference(
        batches=batches,
        apart=apart,
        traces=trace_routing(session.model, topology, batches, skip_layers=skip_layers),
        samples=collect_samples(
            session.model,
            topology,
            batches,
            _TOKENS_PER_EXPERT,
            skip_layers=skip_layers,
            # The samples of all layers wait until the model is quantized.
            keep_in=stored_dtype(session.model),
        ),
        expert_ids={layer: session.expert_ids(layer) for layer in session.layers},
    )


def judge(
    session: TrimSession, reference: Reference, skip_layers: set[int]
) -> tuple[dict[int, RoutingFidelity], dict[int, float], dict[int, float]]:
    """The quantized model on the held-out batches.

    :return: layer -> routing fidelity; layer -> output error, see `LayerPlan`; layer -> power of its output
    """
    routing = _routing_after(session, reference, skip_layers)
    present = [layer for layer in session.layers if layer in reference.samples]
    errors = _measured_errors(
        {layer: session.experts(layer) for layer in present},
        {layer: session.expert_ids(layer) for layer in present},
        reference,
    )
    return routing, errors, {layer: reference.samples[layer].output_power for layer in present}


def _routing_after(
    session: TrimSession, reference: Reference, skip_layers: set[int]
) -> dict[int, RoutingFidelity]:
    """Run the quantized model on the same batches and compare the routers, on the experts that are left."""
    topology = session.topology_now()
    after = trace_routing(session.model, topology, reference.batches, skip_layers=skip_layers, quantized=True)
    found = {}
    for layer, trace in after.items():
        if layer not in reference.traces:
            continue
        columns = [reference.expert_ids[layer].index(expert) for expert in session.expert_ids(layer)]
        found[layer] = routing_fidelity(
            restricted(reference.traces[layer], columns), trace, total=sum_over_ranks
        )
    return found


@torch.no_grad()
def _measured_errors(
    experts: Mapping[int, Sequence[nn.Module]], ids: Mapping[int, Sequence[int]], reference: Reference
) -> dict[int, float]:
    """E over tokens of the sum over experts of ||g (f(x) - f_q(x))||^2, on the inputs that each expert had."""
    found = {}
    for layer, modules in experts.items():
        sample = reference.samples[layer]
        sums = torch.zeros(2, len(modules), dtype=torch.float64)
        whole = []
        for column, (expert, identity) in enumerate(zip(modules, ids[layer], strict=True)):
            work = sample.experts[reference.expert_ids[layer].index(identity)]
            whole.append(work.squared_weight)
            if not len(work.inputs):
                continue
            expert.apply(enable_quantization)
            device = get_execution_device(next(expert.children()))
            dtype = fast_dtype(work.inputs.dtype, device)
            with computed_in(expert.modules(), dtype), HooksMixin.disable_hooks():
                outputs = expert(work.inputs.to(device, dtype))
            gates = work.weights.double().square()
            difference = (work.outputs.double() - outputs.cpu().double()).square().sum(dim=-1)
            sums[0, column] = (gates * difference).sum()
            sums[1, column] = gates.sum()
        sums = sum_over_ranks(sums)
        weights = torch.tensor(whole, dtype=torch.float64)
        per_expert = torch.where(sums[1] > 0, sums[0] * weights / sums[1].clamp(min=1e-300), 0.0)
        found[layer] = float(per_expert.sum()) / max(sample.tokens, 1)
    return found
