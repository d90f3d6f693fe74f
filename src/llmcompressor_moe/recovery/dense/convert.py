"""A checkpoint directory of a Mixture of Experts in, one of its dense sibling out."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from llmcompressor_moe.calibration import calibration_samples
from llmcompressor_moe.check.expected import lay_out
from llmcompressor_moe.check.weights import require_weights
from llmcompressor_moe.checkpoint.atomic import check_can_write
from llmcompressor_moe.evaluation.windows import position_limit
from llmcompressor_moe.inspection import inspect_model, read_config
from llmcompressor_moe.loading import DTYPES, load_model, load_tokenizer
from llmcompressor_moe.recovery.dense.merging import (
    average,
    choose_neurons,
    joined,
    refitted_down,
    scaled,
    take,
    widened,
)
from llmcompressor_moe.recovery.dense.parts import (
    FeedForward,
    beside,
    feed_forward,
    feed_forward_width,
    has_feed_forward,
    shared,
)
from llmcompressor_moe.recovery.dense.siblings import Sibling, find_sibling, sibling_of
from llmcompressor_moe.recovery.dense.usage import LayerUsage, collect_usage, fit_outputs
from llmcompressor_moe.recovery.dense.writing import DENSE_FILE, write_dense
from llmcompressor_moe.report import ShownPath
from llmcompressor_moe.saving.save import HISTORY_FILE
from llmcompressor_moe.topology import Block, Topology, expert_modules, find_topology

__all__ = ["DENSE_FILE", "METHODS", "DenseSummary", "to_dense"]

Method = Literal["average", "uniform", "neurons"]
METHODS: tuple[Method, ...] = ("average", "uniform", "neurons")


class DenseSummary(BaseModel):
    """What was made of what; also the content of ``dense.json``.

    :param width: neurons of every feed-forward of the dense model
    :param chosen: MoE layer -> neurons that stayed of each of its experts (``neurons`` only)
    :param scale: MoE layer -> sum of the experts' mean router weights times what the layer does with it
    :param padded: blocks with neurons that put out nothing yet
    :param calibration_tokens: tokens that experts and neurons were judged on
    :param seconds: wall-clock time of everything
    """

    model: ShownPath
    output: ShownPath
    model_type: str
    sibling: str
    method: Method
    width: int
    refitted: bool
    parameters_before: int
    active_before: int
    parameters_after: int
    chosen: dict[int, list[int]]
    scale: dict[int, float]
    padded: list[int]
    calibration_tokens: int
    seed: int
    seconds: float

    @property
    def recover_command(self) -> str:
        """The command that distils the dense model from the model that it came from."""
        student, teacher = shlex.quote(self.output), shlex.quote(self.model)
        return f"llmcompressor-moe recover {student} --teacher {teacher} --data demo --output {student}-recovered"


@dataclass(frozen=True)
class _Merged:
    """One block's feed-forward, and how it came about."""

    ffn: FeedForward
    chosen: list[int] | None = None
    scale: float | None = None


def to_dense(
    model: str | Path,
    output: str | Path,
    *,
    method: Method = "neurons",
    width: int | None = None,
    refit: bool = True,
    dataset: str | Path = "demo",
    num_samples: int = 128,
    sequence_length: int = 256,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    announce: Callable[[str], None] = lambda step: None,
) -> DenseSummary:
    """Merge the experts of every MoE layer into one feed-forward and write a stock dense checkpoint.

    What can be wrong without the weights is found before they are read. Before the directory takes its place the
    dense model is loaded from it by stock transformers and compared with the MoE model whose layers compute the
    merged feed-forwards: everything else must mean the same in both architectures.

    :param method: ``average`` (of the experts' weights, by how much the router uses them), ``uniform`` (plain
        average) or ``neurons`` (the most useful neurons of all experts; shared experts' neurons stay)
    :param width: neurons per feed-forward, shared experts' included, for ``neurons``; None: as many as one token
        passes. The averages have the experts' own width
    :param refit: fit the output weights of ``neurons`` to what the MoE layers put out on the data
    :param dataset: see `calibration_samples`
    :param sequence_length: tokens per calibration sample
    :param dtype: of the dense model and all work; ``auto``: as the config says
    :param device: to work on
    :param seed: of the neurons that only fill up a width
    :raises ValueError: an argument, the model or the text; says what would work
    :raises NoSiblingError: no dense architecture computes the same outside of the experts
    :raises FloatingPointError: activations are NaN or infinite
    :raises OutputDirectoryError: the output cannot be written; it is as it was
    """
    started = time.perf_counter()
    _check_arguments(model, output, method, width, num_samples, sequence_length, dtype, device)
    announce("Reading the model's config")
    config = read_config(model)
    sibling_of(config.parsed)
    inspection = inspect_model(model, schemes=())
    if inspection.quantization is not None:
        raise ValueError(
            f"model {str(model)!r} is quantized (quantization_config.quant_method={inspection.quantization!r}); "
            "give the model that it was made from."
        )
    expected = lay_out(config)
    sibling = _plan(expected.model, find_topology(expected.model), method, width)
    require_weights(model)
    announce("Preparing tokenizer and calibration data")
    limit = position_limit(config.parsed)
    if limit is not None and sequence_length > limit:
        raise ValueError(
            f"sequence_length={sequence_length}: the model has {limit} positions (max_position_embeddings); give "
            "at most that."
        )
    tokenizer = load_tokenizer(model)
    rows = calibration_samples(dataset, tokenizer, num_samples, sequence_length)["input_ids"]
    batches = [{"input_ids": torch.tensor([row])} for row in rows]
    announce("Loading the model")
    loaded = linearize_moe(load_model(model, dtype, inspection.architecture)).to(device)
    topology = find_topology(loaded)
    announce("Watching the experts on calibration data")
    usage = collect_usage(loaded, topology, batches)
    announce("Merging experts")
    merged = _merge(loaded, topology, sibling, usage, method, batches if refit else [])
    generator = torch.Generator().manual_seed(seed)
    final = {
        index: widened(part.ffn, sibling.config.intermediate_size, generator)
        for index, part in merged.items()
    }
    announce(f"Writing {output}")
    summary = DenseSummary(
        model=str(model),
        output=str(output),
        model_type=topology.model_type,
        sibling=sibling.model_type,
        method=method,
        width=sibling.config.intermediate_size,
        refitted=refit and method == "neurons",
        parameters_before=inspection.parameters,
        active_before=inspection.active_parameters,
        parameters_after=0,
        chosen={index: part.chosen for index, part in merged.items() if part.chosen is not None},
        scale={index: part.scale for index, part in merged.items() if part.scale is not None},
        padded=[index for index, part in merged.items() if part.ffn.width < final[index].width],
        calibration_tokens=sum(map(len, rows)),
        seed=seed,
        seconds=0.0,
    )

    def finished(parameters: int) -> str:
        summary.parameters_after = parameters
        summary.seconds = time.perf_counter() - started
        return summary.model_dump_json(indent=2)

    write_dense(loaded, topology, sibling, final, tokenizer, output, batches[0]["input_ids"], finished)
    return summary


def _check_arguments(
    model: str | Path,
    output: str | Path,
    method: str,
    width: int | None,
    num_samples: int,
    sequence_length: int,
    dtype: str,
    device: str,
) -> None:
    for name, value, known in (("method", method, METHODS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}.")
    numbers = {"num_samples": num_samples, "sequence_length": sequence_length, "width": width}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    if width is not None and method != "neurons":
        raise ValueError(
            f"width={width}: method={method!r} has the experts' own width; leave width out, or "
            "choose method='neurons'."
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used ({str(error).splitlines()[0]}).") from error
    target = Path(output)
    if target.resolve() == Path(model).resolve():
        raise ValueError(f"output={str(output)!r} is the model itself; name another directory.")
    if (target / HISTORY_FILE).exists():
        raise ValueError(
            f"output={str(output)!r} holds a trimmed model ({HISTORY_FILE}), whose history would stay beside the "
            "dense one; name another directory."
        )
    check_can_write(output)


def _plan(model: PreTrainedModel, topology: Topology, method: Method, width: int | None) -> Sibling:
    """The sibling at the width that all blocks get, from shapes alone."""
    inline = [block.index for block in topology.blocks if block.moe is not None and block.moe.inline]
    if inline:
        raise ValueError(
            f"model_type={topology.model_type!r} keeps router and experts beside a dense feed-forward in its "
            f"blocks ({inline[0]} for one); such layers are not merged."
        )
    dense = find_sibling(model, topology, 1)
    widths = []
    for block in topology.blocks:
        kept = sum(feed_forward_width(model.get_submodule(path)) for path in _always(model, block))
        if block.moe is None:
            path = f"{block.name}.{dense.mlp}".rstrip(".")
            widths.append(
                kept + (feed_forward_width(model.get_submodule(path)) if has_feed_forward(model, path) else 0)
            )
            continue
        own = _expert_width(model, block)
        if method != "neurons":
            widths.append(kept + own)
        else:
            wanted = kept + own * block.moe.top_k if width is None else width
            if wanted <= kept:
                raise ValueError(
                    f"width={width}: the shared experts of block {block.index} have {kept} neurons, which stay; "
                    f"give more than that."
                )
            widths.append(wanted)
    return find_sibling(model, topology, max(widths))


def _always(model: nn.Module, block: Block) -> list[str]:
    return [*shared(model, block), *beside(model, block)]


def _expert_width(model: nn.Module, block: Block) -> int:
    experts = model.get_submodule(block.moe.experts)
    matrix = experts.down_proj
    hidden = model.config.hidden_size
    # [experts, hidden, neurons], or transposed.
    return matrix.shape[1] if matrix.shape[2] == hidden and matrix.shape[1] != hidden else matrix.shape[2]


def _merge(
    model: PreTrainedModel,
    topology: Topology,
    sibling: Sibling,
    usage: Mapping[int, LayerUsage],
    method: Method,
    batches: list[dict[str, Any]],
) -> dict[int, _Merged]:
    width = sibling.config.intermediate_size
    merged: dict[int, _Merged] = {}
    for block in topology.blocks:
        if block.moe is not None:
            merged[block.index] = _merge_layer(model, block, usage[block.index], method, width)
        else:
            path = f"{block.name}.{sibling.mlp}".rstrip(".")
            merged[block.index] = _Merged(_dense_block(model, path))
    if method == "neurons" and batches:
        fitted = fit_outputs(
            model,
            topology,
            batches,
            {index: merged[index].ffn for index in topology.moe_layers},
            activation(sibling),
            refitted_down,
        )
        for index, ffn in fitted.items():
            merged[index] = _Merged(ffn, merged[index].chosen, merged[index].scale)
    for block in topology.blocks:
        apart = [feed_forward(model.get_submodule(path)) for path in beside(model, block)]
        if apart:
            one = merged[block.index]
            merged[block.index] = _Merged(joined([one.ffn, *apart]), one.chosen, one.scale)
    return merged


def _dense_block(model: PreTrainedModel, path: str) -> FeedForward:
    if has_feed_forward(model, path):
        return feed_forward(model.get_submodule(path))
    # A block whose MoE layer was dropped: nothing is added to the residual stream.
    hidden = model.config.hidden_size
    return FeedForward(torch.zeros(0, hidden), torch.zeros(0, hidden), torch.zeros(hidden, 0))


def _merge_layer(
    model: PreTrainedModel, block: Block, usage: LayerUsage, method: Method, width: int
) -> _Merged:
    experts = [feed_forward(module) for module in expert_modules(model.get_submodule(block.moe.experts))]
    factor, *gates = usage.factors
    always = [
        scaled(feed_forward(model.get_submodule(path)), gate)
        for path, gate in zip(shared(model, block), gates, strict=True)
    ]
    weights = usage.mean_weight * factor
    total = float(weights.sum())
    if method != "neurons":
        shares = usage.gate_weight.tolist() if method == "average" else [1.0] * len(experts)
        return _Merged(joined([scaled(average(experts, shares), total), *always]), None, total)
    apart = sum(feed_forward_width(model.get_submodule(path)) for path in beside(model, block))
    room = width - apart - sum(ffn.width for ffn in always)
    chosen, counts = _most_useful(experts, usage, weights, room)
    return _Merged(joined([chosen, *always]), counts, total)


def _most_useful(
    experts: list[FeedForward], usage: LayerUsage, weights: torch.Tensor, room: int
) -> tuple[FeedForward, list[int]]:
    """The neurons that move the layer's output most, their router weights folded into the output weights.

    An expert adds g(x) sum_j d_j a_j(x) to the layer's output. A neuron's score is the sum over routed tokens of
    ||g a_j d_j|| = g |a_j| ||d_j||: REAP's criterion for experts (https://arxiv.org/abs/2510.13999), as a sum,
    taken for one neuron. In the dense model the neuron works on every token, so its output weights are
    scaled with the mean of g over all tokens (0 where the expert is not chosen): the expectation of the layer's
    output as far as g and a_j are independent.
    """
    pool = joined([scaled(ffn, float(weight)) for ffn, weight in zip(experts, weights, strict=True)])
    norms = torch.cat([ffn.down.norm(dim=0) for ffn in experts]).double()
    scores = usage.neuron_output.flatten() * norms.to(usage.neuron_output)
    neurons = choose_neurons(scores, room)
    owner = neurons // experts[0].width
    return take(pool, neurons), torch.bincount(owner, minlength=len(experts)).tolist()


def activation(sibling: Sibling) -> nn.Module:
    """The activation function of a sibling's feed-forwards."""
    config = sibling.config
    return ACT2FN[getattr(config, "hidden_act", None) or config.hidden_activation]
