"""One of several expert-parallel ranks that really exchange hidden vectors: run by test_communication.py through
torch.distributed.run.

python -m torch.distributed.run --nproc_per_node 2 tests/dispatching_rank.py LAYERS JOBS OUT

LAYERS is a safetensors file: per layer what entered and left its experts, and their weights. JOBS is JSON: a list
of {layer, format, once, counts}; ``counts`` [from, to] are the vectors that were predicted. Writes OUT-RANK.json:
bytes put on the way to each rank, and how far the layer's output is from one process's, given the same rounded
vectors (error) and as the model computed it (drift).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import distributed as dist

FP8 = torch.float8_e4m3fn


def pack(vectors: torch.Tensor, form: str) -> torch.Tensor:
    """Vectors as they travel, uint8 [n, bytes]."""
    if form == "16-bit":
        return vectors.bfloat16().contiguous().view(torch.uint8)
    rows = []
    for vector in vectors.float():
        groups = [vector] if form == "fp8-per-token" else vector.split(128)
        scales = torch.stack([group.abs().max().clamp(min=1e-12) / 448 for group in groups])
        values = torch.cat([group / scale for group, scale in zip(groups, scales, strict=True)]).to(FP8)
        rows.append(torch.cat([values.view(torch.uint8), scales.view(torch.uint8)]))
    return torch.stack(rows) if rows else torch.zeros(0, 0, dtype=torch.uint8)


def unpack(packed: torch.Tensor, form: str, width: int) -> torch.Tensor:
    """What arrives, fp32 [n, width]."""
    if form == "16-bit":
        return packed.contiguous().view(torch.bfloat16).float()
    values = packed[:, :width].contiguous().view(FP8).float()
    scales = packed[:, width:].contiguous().view(torch.float32)
    size = width if form == "fp8-per-token" else 128
    return values * scales.repeat_interleave(size, dim=1)[:, :width]


def exchange(rows: torch.Tensor, sent: list[int], received: list[int]) -> tuple[torch.Tensor, list[int]]:
    """All-to-all of uint8 rows; also the bytes that went to each rank."""
    length = torch.tensor(rows.shape[1] if len(rows) else 0)
    dist.all_reduce(length, op=dist.ReduceOp.MAX)
    out = torch.empty(sum(received), int(length), dtype=torch.uint8)
    dist.all_to_all_single(
        out, rows.reshape(-1, int(length)).contiguous(), output_split_sizes=received, input_split_sizes=sent
    )
    return out, [count * int(length) for count in sent]


def tokens_for(
    mine: range, index: torch.Tensor, holders: list[range], *, once: bool
) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Per rank, what it gets from the rank whose tokens are ``mine``: a token and the choices it is sent for."""
    plan = []
    for held in holders:
        parcels = []
        for token in mine:
            choices = [c for c, expert in enumerate(index[token].tolist()) if expert in held]
            parcels += [(token, tuple(choices))] if once and choices else [(token, (c,)) for c in choices]
        plan.append(parcels)
    return plan


def shares(count: int, ranks: int) -> list[range]:
    """Consecutive shares, as even as possible, the first ones larger."""
    found, start = [], 0
    for part in torch.arange(count).tensor_split(ranks):
        found.append(range(start, start + len(part)))
        start += len(part)
    return found


def experts_output(
    layer: dict[str, torch.Tensor], inputs: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of SwiGLU experts, fp64 [hidden]; inputs [hidden], index and weights [choices]."""
    output = torch.zeros(len(inputs), dtype=torch.float64)
    for expert, weight in zip(index.tolist(), weights.double(), strict=True):
        gate, up = (layer["gate_up"][expert].double() @ inputs.double()).chunk(2)
        output += weight * (layer["down"][expert].double() @ (torch.nn.functional.silu(gate) * up))
    return output


def run(job: dict, layer: dict[str, torch.Tensor]) -> dict:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hidden, index, weights = (layer[name] for name in ("hidden", "index", "weights"))
    width = hidden.shape[1]
    holders, owners = shares(len(layer["down"]), ranks), shares(len(hidden), ranks)
    plans = [tokens_for(mine, index, holders, once=job["once"]) for mine in owners]
    counts = job["counts"]
    outgoing = [parcel for parcels in plans[rank] for parcel in parcels]
    incoming = [parcel for plan in plans for parcel in plan[rank]]
    there = [counts[rank][other] for other in range(ranks)]
    back = [counts[other][rank] for other in range(ranks)]
    assert [len(parcels) for parcels in plans[rank]] == there

    packed = pack(hidden[[token for token, _ in outgoing]], job["format"])
    arrived, dispatched = exchange(packed, there, back)
    inputs = unpack(arrived, job["format"], width)

    results = torch.zeros_like(inputs)
    for row, (token, choices) in enumerate(incoming):
        picked = index[token, list(choices)]
        assert all(expert in holders[rank] for expert in picked.tolist())
        results[row] = experts_output(layer, inputs[row], picked, weights[token, list(choices)])
    returned, combined = exchange(pack(results, "16-bit"), back, there)

    output = torch.zeros(len(hidden), width, dtype=torch.float64)
    for (token, _), vector in zip(outgoing, unpack(returned, "16-bit", width), strict=True):
        output[token] += vector.double()
    mine = list(owners[rank])
    rounded = unpack(pack(hidden[mine], job["format"]), job["format"], width)
    whole = torch.stack(
        [experts_output(layer, *rows) for rows in zip(rounded, index[mine], weights[mine], strict=True)]
    )
    return {
        "dispatched": dispatched,
        "combined": combined,
        "error": relative(output[mine], whole),
        "drift": relative(output[mine], layer["output"][mine]),
    }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected.double()).norm() / expected.double().norm())


def main(layers: Path, jobs: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tensors = load_file(layers)
    found = []
    for job in json.loads(jobs.read_text()):
        prefix = f"{job['layer']}."
        layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        found.append(run(job, layer))
    Path(f"{out}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
