"""Bytes between expert-parallel ranks: counted one by one, by hand, by vLLM's placement, and really sent."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.evaluation.communication import (
    Communication,
    compare_communication,
    linear_placement,
    measure_communication,
    vector_bytes,
    vectors_sent,
)
from llmcompressor_moe.evaluation.history import ModelLayout, read_history
from llmcompressor_moe.evaluation.routing import RoutingRecord, record_routing
from llmcompressor_moe.profile.routing import RouterTrace
from llmcompressor_moe.topology import find_topology

SCRIPT = Path(__file__).parent / "dispatching_rank.py"
FORMATS = ("16-bit", "fp8-per-token", "fp8-per-group")


def record(*chosen: torch.Tensor, width: int = 10) -> RoutingRecord:
    """A model whose layers choose this, boolean [tokens, experts] each."""
    layout = ModelLayout(len(chosen), {index: layer.shape[1] for index, layer in enumerate(chosen)})
    traces = {index: RouterTrace(layer, None) for index, layer in enumerate(chosen)}
    return RoutingRecord(layout, len(chosen[0]), traces, dict.fromkeys(traces, width))


def vllm_placement(experts: int, ranks: int) -> list[int]:
    """`determine_expert_map` of vLLM 0.32 (expert_map_manager.py), linear strategy, in plain numbers."""
    owner = [-1] * experts
    base, remainder = experts // ranks, experts % ranks
    for rank in range(ranks):
        local = base + 1 if rank < remainder else base
        start = rank * base + min(rank, remainder)
        owner[start : start + local] = [rank] * local
    return owner


@given(st.integers(0, 200), st.integers(1, 33))
def test_placement_is_that_of_vllm(count: int, ranks: int) -> None:
    assert linear_placement(count, ranks).tolist() == vllm_placement(count, ranks)
    if count % ranks == 0:
        assert linear_placement(count, ranks).tolist() == [i * ranks // count for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_vectors_counted_one_by_one(tokens: int, experts: int, ranks: int, seed: int) -> None:
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < 0.4
    owners, holders = vllm_placement(tokens, ranks), vllm_placement(experts, ranks)
    once = [[0] * ranks for _ in range(ranks)]
    naive = [[0] * ranks for _ in range(ranks)]
    for token in range(tokens):
        targets = [holders[expert] for expert in range(experts) if chosen[token, expert]]
        for target in targets:
            naive[owners[token]][target] += 1
        for target in set(targets):
            once[owners[token]][target] += 1
    found = vectors_sent(chosen, ranks)
    assert [matrix.tolist() for matrix in found] == [once, naive]
    # The same batch on one rank sends nothing over a link.
    whole = measure_communication(record(chosen), 1)
    assert whole.per_choice.bytes_per_token == 0 and whole.per_choice.heaviest_link is None


def test_three_tokens_on_two_ranks_by_hand() -> None:
    """Experts 0, 1 on rank 0, 2, 3 on rank 1; tokens 0, 1 on rank 0, token 2 on rank 1; vectors of 10 values."""
    chosen = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    found = measure_communication(record(chosen), 2)
    (layer,) = found.layers.values()
    assert layer.experts_per_rank == [2, 2] and layer.width == 10
    # Once per rank: token 0 goes to rank 1, token 1 stays and goes to rank 1, token 2 goes to rank 0.
    assert layer.deduplicated.dispatch == [[20, 40], [20, 0]]
    assert layer.deduplicated.combine == [[20, 20], [40, 0]]
    assert layer.deduplicated.bytes_per_token == (40 + 20 + 40 + 20) / 3
    assert layer.deduplicated.sent == layer.deduplicated.received == [60, 60]
    # Once per choice: token 0 twice to rank 1, token 1 once each, token 2 twice to rank 0.
    assert layer.per_choice.dispatch == [[20, 60], [40, 0]]
    assert layer.per_choice.combine == [[20, 40], [60, 0]]
    assert layer.per_choice.bytes_per_token == 200 / 3
    assert found.deduplicated == layer.deduplicated and found.per_choice == layer.per_choice


def test_the_heaviest_link_and_the_sum_over_layers() -> None:
    one = torch.tensor([[1, 0], [1, 0]], dtype=torch.bool)
    other = torch.tensor([[0, 1], [1, 0]], dtype=torch.bool)
    found = measure_communication(record(one, other), 2, "fp8-per-token")
    # Layer 0: token 1 goes from rank 1 to rank 0 in 14 bytes and its output comes back in 20.
    first = found.layers[0].deduplicated
    assert (first.dispatch, first.combine) == ([[14, 0], [14, 0]], [[20, 20], [0, 0]])
    assert (first.heaviest_link.source, first.heaviest_link.target, first.heaviest_link.nbytes) == (0, 1, 20)
    assert (first.sent, first.received) == ([20, 14], [14, 20])
    # Layer 1: both tokens change the rank, and come back.
    assert found.deduplicated.dispatch == [[14, 14], [28, 0]]
    assert found.deduplicated.combine == [[20, 40], [20, 0]]
    assert found.deduplicated.bytes_per_token == (14 + 28 + 40 + 20) / 2
    assert found.deduplicated.heaviest_link.nbytes == 54
    assert Communication.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("width", "form", "nbytes"),
    [
        (4096, "16-bit", 8192),
        (4096, "fp8-per-token", 4100),
        # DeepSeek-V3 dispatches 7168 values in fp8 with a scale per 128: 7168 + 56 * 4.
        (7168, "fp8-per-group", 7392),
        (192, "fp8-per-group", 200),
    ],
)
def test_bytes_of_a_vector(width: int, form: str, nbytes: int) -> None:
    assert vector_bytes(width, form) == nbytes


def test_bad_input_is_named() -> None:
    some = record(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="ranks=0"):
        measure_communication(some, 0)
    with pytest.raises(ValueError, match="dispatch_format='int4': choose one of 16-bit, fp8"):
        measure_communication(some, 2, "int4")


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": support.token_ids(3, 15)}]


def test_before_and_after_drops(tmp_path: Path) -> None:
    path = support.saved("qwen2_moe", tmp_path, num_layers=5, num_experts=8)
    recipe = [
        LayerDropModifier(layers=[3]),
        ExpertDropModifier(experts={0: [0, 1, 2], 2: [5]}),
        BlockDropModifier(blocks=[1]),
    ]
    support.trim(support.load(path), recipe, no_data=True, output_dir=str(tmp_path / "out"))
    base, after = (record_routing(support.load(p), batches()) for p in (path, tmp_path / "out"))
    found = compare_communication(
        base, after, read_history(tmp_path / "out"), 2, format_after="fp8-per-token"
    )
    assert sorted(found.before.layers) == [0, 1, 2, 3, 4] and sorted(found.after.layers) == [0, 2, 4]
    assert [found.after.layers[block].experts_per_rank for block in (0, 2, 4)] == [[3, 2], [4, 3], [4, 4]]
    for side in (found.before, found.after):
        for way in ("deduplicated", "per_choice"):
            total = getattr(side, way).bytes_per_token
            assert total == pytest.approx(
                sum(getattr(layer, way).bytes_per_token for layer in side.layers.values())
            )
        assert 0 < side.deduplicated.bytes_per_token <= side.per_choice.bytes_per_token
        # Two experts per token, whichever they are, in 16 bit back.
        for layer in side.layers.values():
            assert sum(map(sum, layer.per_choice.combine)) == 45 * 2 * 2 * layer.width
    assert found.after.per_choice.bytes_per_token < found.before.per_choice.bytes_per_token
    with pytest.raises(ValueError, match=r"no history \(trimming.json\)"):
        compare_communication(base, after, [], 2)


@torch.no_grad()
def save_layers(model: PreTrainedModel, path: Path) -> None:
    """What enters and leaves the experts of each MoE layer of a Mixtral on the tokens of `batches`."""
    tensors: dict[str, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(experts: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            values = [*args, output, experts.gate_up_proj, experts.down_proj]
            names = ("hidden", "index", "weights", "output", "gate_up", "down")
            found = {f"{index}.{name}": value for name, value in zip(names, values, strict=True)}
            tensors.update({name: value.detach().clone().contiguous() for name, value in found.items()})

        return hook

    handles = [
        model.get_submodule(moe.experts).register_forward_hook(keep(index))
        for index, moe in find_topology(model).moe_layers.items()
    ]
    model(**batches()[0], use_cache=False)
    for handle in handles:
        handle.remove()
    save_file(tensors, path)


def send(layers: Path, jobs: list[dict], ranks: int, out: Path) -> list[list[dict]]:
    (out.parent / "jobs.json").write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launcher, str(SCRIPT), str(layers), str(out.parent / "jobs.json"), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_send_it_send_as_much(ranks: int, tmp_path: Path) -> None:
    """45 tokens and layers of 8 and 5 experts on gloo ranks: bytes as predicted, outputs as of one process."""
    path = support.saved("mixtral", tmp_path, num_layers=2, num_experts=8, hidden_size=192)
    drop = ExpertDropModifier(experts={1: [0, 3, 4]})
    support.trim(support.load(path), drop, no_data=True, output_dir=str(tmp_path / "out"))
    model = support.load(tmp_path / "out")
    save_layers(model, tmp_path / "layers.safetensors")
    routing = record_routing(model, batches())
    cases = list(itertools.product(routing.traces, FORMATS, (True, False)))
    jobs = [
        {
            "layer": layer,
            "format": form,
            "once": once,
            "counts": vectors_sent(routing.traces[layer].chosen, ranks)[0 if once else 1].tolist(),
        }
        for layer, form, once in cases
    ]
    results = send(tmp_path / "layers.safetensors", jobs, ranks, tmp_path / "rank")
    for number, (layer, form, once) in enumerate(cases):
        predicted = measure_communication(routing, ranks, form).layers[layer]
        way = predicted.deduplicated if once else predicted.per_choice
        assert [rank[number]["dispatched"] for rank in results] == way.dispatch
        assert [rank[number]["combined"] for rank in results] == way.combine
        # What comes back was rounded to bfloat16 once per vector.
        assert all(rank[number]["error"] < 2**-8 for rank in results)
        assert all(rank[number]["drift"] < (2**-7 if form == "16-bit" else 2**-4) for rank in results)


def test_uneven_load_shows_in_the_heaviest_link() -> None:
    """All tokens of four ranks go to one expert: its rank sends and receives all."""
    chosen = torch.zeros(16, 8, dtype=torch.bool)
    chosen[:, 5] = True
    found = measure_communication(record(chosen, width=8), 4).deduplicated
    assert found.sent == [64, 64, 192, 64] and found.received == [64, 64, 192, 64]
    assert found.bytes_per_token == 12 * 2 * 16 / 16
