"""A profile's numbers against a recomputation that shares nothing with the package.

The reference runs the stock transformers model (fused experts) under plain hooks and asks the family's own
experts module for the output of one expert at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from compressed_tensors.offload.module import offload_module, remove_module_offload
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.compat.compressed_tensors import is_offloaded
from llmcompressor_moe.plan import ExpertRoom, experts_to_drop, parts_to_drop
from llmcompressor_moe.profile import Profile, Statistic, collect_profile, divergence_without
from llmcompressor_moe.profile.experts import routed_forward
from llmcompressor_moe.topology import find_topology

EVERYTHING = set(Statistic)
TOLERANCE = 1e-4
# What the family calls its MoE layer, the norm before it (None: attention and MoE side by side), its router.
FAMILIES = {
    "mixtral": ("mlp", "post_attention_layernorm", "gate"),
    "qwen2_moe": ("mlp", "post_attention_layernorm", "gate"),
    "qwen3_moe": ("mlp", "post_attention_layernorm", "gate"),
    "deepseek_v2": ("mlp", "post_attention_layernorm", "gate"),
    "gpt_oss": ("mlp", "post_attention_layernorm", "router"),
    "granitemoe": ("block_sparse_moe", "post_attention_layernorm", "router"),
    "cohere2_moe": ("mlp", None, "gate"),
}
FULL_SOFTMAX = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "cohere2_moe"}


def plain_batches(samples: int = 3, length: int = 12, seed: int = 1) -> list[dict]:
    ids = support.token_ids(samples, length, seed)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]


def padded_batches() -> list[dict]:
    """Two batches of two sequences, padded on the right; 16 tokens each, all of which redundancy looks at."""
    batches = []
    for seed in (1, 2):
        ids = support.token_ids(2, 12, seed)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        mask[1, 10:] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


@dataclass
class Seen:
    """What one MoE layer did: one entry per batch, padding cut out."""

    logits: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    indices: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)  # [experts, tokens, hidden]


@dataclass
class Reference:
    blocks: list[
        list[tuple[torch.Tensor, torch.Tensor]]
    ]  # block -> batch -> (before, after) [tokens, hidden]
    layers: dict[int, list[tuple[torch.Tensor, torch.Tensor]]]
    experts: dict[int, Seen]


def observe(model: PreTrainedModel, model_type: str, batches: list[dict]) -> Reference:
    moe_name, norm_name, router_name = FAMILIES[model_type]
    blocks = list(model.model.layers)
    layers = [i for i, block in enumerate(blocks) if hasattr(getattr(block, moe_name), "experts")]
    found = Reference([[] for _ in blocks], {i: [] for i in layers}, {i: Seen() for i in layers})
    captured: dict = {}
    handles = []

    def watch(key: tuple, module: nn.Module) -> None:
        def hook(_module, args, kwargs, output) -> None:
            captured[key] = (args[0] if args else kwargs["hidden_states"], output)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    for i, block in enumerate(blocks):
        watch(("block", i), block)
        watch(("attention", i), block.self_attn)
        if norm_name:
            watch(("norm", i), getattr(block, norm_name))
        if i in layers:
            watch(("router", i), getattr(getattr(block, moe_name), router_name))
            watch(("experts", i), getattr(block, moe_name).experts)
    for batch in batches:
        with torch.no_grad():
            model(**batch, use_cache=False)
        real = batch["attention_mask"].bool().flatten()
        # The reference below calls the experts again: it must not overwrite what was captured.
        snapshot = dict(captured)
        for i, block in enumerate(blocks):
            before, after = (tensor_of(value) for value in snapshot["block", i])
            found.blocks[i].append((before.flatten(0, 1)[real], after.flatten(0, 1)[real]))
            if i not in layers:
                continue
            x = snapshot["norm", i][0] if norm_name else before + tensor_of(snapshot["attention", i][1])
            found.layers[i].append((x.flatten(0, 1)[real], after.flatten(0, 1)[real]))
            _look_at_experts(found.experts[i], getattr(block, moe_name).experts, snapshot, i, real)
    for handle in handles:
        handle.remove()
    return found


def _look_at_experts(seen: Seen, experts: nn.Module, captured: dict, i: int, real: torch.Tensor) -> None:
    hidden = captured["experts", i][0].reshape(len(real), -1)[real]
    outputs = captured["router", i][1]
    floating = [tensor for tensor in outputs if tensor.is_floating_point()]
    num_experts = experts.num_experts
    seen.logits.append(next(t for t in floating if t.shape[-1] == num_experts).reshape(len(real), -1)[real])
    seen.weights.append(next(t for t in floating if t.shape[-1] != num_experts).reshape(len(real), -1)[real])
    seen.indices.append(next(t for t in outputs if not t.is_floating_point()).reshape(len(real), -1)[real])
    one = torch.ones(len(hidden), 1)
    with torch.no_grad():
        alone = [experts(hidden, torch.full((len(hidden), 1), e), one) for e in range(num_experts)]
    seen.outputs.append(torch.stack(alone))


def tensor_of(value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


def mean_cosine(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    before = torch.cat([pair[0] for pair in pairs]).double()
    after = torch.cat([pair[1] for pair in pairs]).double()
    return float(((before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))).mean())


def check_experts(profile: Profile, reference: Reference, model_type: str) -> None:
    assert set(profile.experts) == set(reference.experts)
    for i, seen in reference.experts.items():
        ours = profile.experts[i]
        indices, weights = torch.cat(seen.indices), torch.cat(seen.weights).double()
        outputs = torch.cat(seen.outputs, dim=1).double()
        norms = outputs.norm(dim=-1)  # [experts, tokens]
        count, gate, norm, weighted = [], [], [], []
        for e in range(len(outputs)):
            chosen, position = torch.where(indices == e)
            count.append(len(chosen))
            gate.append(float(weights[chosen, position].sum()))
            norm.append(float(norms[e, chosen].sum()))
            weighted.append(float((weights[chosen, position] * norms[e, chosen]).sum()))
        assert ours.routed_tokens == count
        assert ours.gate_weight == pytest.approx(gate, rel=TOLERANCE)
        assert ours.output_norm == pytest.approx(norm, rel=TOLERANCE)
        assert ours.weighted_output_norm == pytest.approx(weighted, rel=TOLERANCE)
        unit = outputs / outputs.norm(dim=-1, keepdim=True)
        cosines = torch.einsum("eth,fth->eft", unit, unit).mean(-1)
        torch.testing.assert_close(
            torch.tensor(ours.output_similarity, dtype=torch.float64), cosines, atol=TOLERANCE, rtol=0
        )
        if model_type in FULL_SOFTMAX:
            probability = torch.cat(seen.logits).double().softmax(-1).sum(0)
            assert ours.routing_probability == pytest.approx(probability.tolist(), rel=TOLERANCE)
        else:
            assert ours.routing_probability is None


def profiled(model: PreTrainedModel, batches: list[dict], **options) -> Profile:
    return collect_profile(
        model, find_topology(model), batches, options.pop("statistics", EVERYTHING), **options
    )


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("batches", [plain_batches, padded_batches])
def test_profile_equals_plain_hooks(model_type: str, batches: Callable[[], list[dict]]) -> None:
    model = tiny_models.build(model_type)
    reference = observe(model, model_type, batches())
    linearize_moe(model)
    profile = profiled(model, batches(), run_length=2)

    assert profile.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches())
    assert profile.num_samples == sum(len(batch["input_ids"]) for batch in batches())
    blocks = {i: mean_cosine(pairs) for i, pairs in enumerate(reference.blocks)}
    assert profile.block_similarity == pytest.approx(blocks, abs=TOLERANCE)
    layers = {i: mean_cosine(pairs) for i, pairs in reference.layers.items()}
    assert profile.layer_similarity == pytest.approx(layers, abs=TOLERANCE)
    runs = {
        i: mean_cosine(
            [(a[0], b[1]) for a, b in zip(reference.blocks[i], reference.blocks[i + 1], strict=True)]
        )
        for i in range(len(blocks) - 1)
    }
    assert profile.run_similarity == pytest.approx(runs, abs=TOLERANCE)
    check_experts(profile, reference, model_type)


# Families for which the sentence below is not the definition.
NOT_SILENCED = {
    "granitemoe_swa": "a dense layer stands beside the MoE layer: y holds both",
    "granitemoehybrid": "a dense layer stands beside the MoE layer: y holds both",
    "granitemoeshared": "a dense layer stands beside the MoE layer: y holds both",
    "minimax": "adds to the output of the norm, not to its input",
    "zaya": "scales the residual stream per channel before it adds",
    "deepseek_v4": "several residual streams: x is the mixture that the layer reads",
    "glm5_next": "several residual streams: x is the mixture that the layer reads",
    "hy_v4": "several residual streams: x is the mixture that the layer reads",
    "qwen4_exp_text": "several residual streams: x is the mixture that the layer reads",
}


@pytest.mark.parametrize(
    "model_type", [name for name in tiny_models.buildable() if "streams" in NOT_SILENCED.get(name, "")]
)
def test_several_residual_streams(model_type: str) -> None:
    """x is what the norm before the layer reads, y = x + MoE(norm(x)); blocks are compared over all streams."""
    model = linearize_moe(tiny_models.build(model_type))
    topology = find_topology(model)
    batches = plain_batches(2)
    profile = profiled(model, batches, statistics={Statistic.LAYER, Statistic.BLOCK})
    index, moe = next(iter(topology.moe_layers.items()))
    block, layer = model.get_submodule(topology.blocks[index].name), model.get_submodule(moe.module)
    calls: dict[str, list] = {"norm": [], "layer": [], "block": []}
    handles = [
        child.register_forward_hook(lambda _m, args, output: calls["norm"].append((args[0], output)))
        for name, child in block.named_children()
        if "norm" in name
    ]
    handles.append(
        layer.register_forward_hook(
            lambda _m, args, output: calls["layer"].append((args[0], tensor_of(output)))
        )
    )
    handles.append(
        block.register_forward_hook(
            lambda _m, args, kwargs, output: calls["block"].append(
                (
                    (args or [kwargs["hidden_states"]])[0].flatten(0, 1).flatten(1),
                    tensor_of(output).flatten(0, 1).flatten(1),
                )
            ),
            with_kwargs=True,
        )
    )
    for batch in batches:
        with torch.no_grad():
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    pairs = []
    for received, output in calls["layer"]:
        # A family without a norm there gives the layer the mixture itself.
        x = next(
            (
                x
                for x, normed in calls["norm"]
                if normed.numel() == received.numel() and torch.equal(normed.flatten(), received.flatten())
            ),
            received,
        )
        x = x.reshape(-1, x.shape[-1])
        pairs.append((x, x + output.reshape_as(x)))
    assert profile.layer_similarity[index] == pytest.approx(mean_cosine(pairs), abs=TOLERANCE)
    assert profile.block_similarity[index] == pytest.approx(mean_cosine(calls["block"]), abs=TOLERANCE)


@pytest.mark.parametrize("model_type", [name for name in tiny_models.buildable() if name not in NOT_SILENCED])
def test_layer_score_is_the_cosine_with_and_without_the_layer(model_type: str) -> None:
    """For every family: what a block gives with its MoE layer silenced is the x of the score."""
    model = tiny_models.build(model_type)
    linearize_moe(model)
    topology = find_topology(model)
    batches = plain_batches(2)
    if any(moe.inline for moe in topology.moe_layers.values()):
        pytest.skip("router and experts stand in the block: Layer Drop refuses this family")
    profile = profiled(model, batches, statistics={Statistic.LAYER})
    expected = {}
    for index, moe in topology.moe_layers.items():
        pairs = []
        for batch in batches:
            outputs = []
            for silent in (True, False):
                outputs.append(_block_output(model, topology.blocks[index].name, moe.module, batch, silent))
            pairs.append(tuple(output.reshape(-1, output.shape[-1]) for output in outputs))
        expected[index] = mean_cosine(pairs)
    assert profile.layer_similarity == pytest.approx(expected, abs=TOLERANCE)


def _block_output(model: nn.Module, block: str, moe: str, batch: dict, silent: bool) -> torch.Tensor:
    found = []

    def zero(_module, _args, output):
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = [
        model.get_submodule(block).register_forward_hook(
            lambda _m, _a, output: found.append(tensor_of(output))
        )
    ]
    if silent:
        handles.append(model.get_submodule(moe).register_forward_hook(zero))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found[0]


def test_only_what_was_asked_for_is_collected() -> None:
    model = linearize_moe(tiny_models.build("mixtral"))
    profile = profiled(model, plain_batches(), statistics={Statistic.LAYER})
    assert profile.layer_similarity and not profile.block_similarity and not profile.experts
    routing = profiled(model, plain_batches(), statistics={Statistic.ROUTING}).experts[0]
    assert routing.output_norm is None and routing.output_similarity is None


def test_model_is_left_as_it_was() -> None:
    model = linearize_moe(tiny_models.build("mixtral"))
    before = support.logits(model)
    forwards = own_forwards(model)
    profiled(model, plain_batches(), run_length=2)
    assert own_forwards(model) == forwards
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(support.logits(model), before, atol=0, rtol=0)


def own_forwards(model: nn.Module) -> dict[str, object]:
    """Forwards that stand on a module of the stack itself (upstream's offloading puts some there)."""
    stack = model.model.layers
    return {
        name: module.__dict__["forward"]
        for name, module in stack.named_modules()
        if "forward" in module.__dict__
    }


def test_dropped_parts_are_left_out_and_runs_close_over_them() -> None:
    from llmcompressor_moe.surgery.session import TrimSession

    batches = plain_batches()
    model = tiny_models.build("mixtral", num_layers=5)
    short = copy.deepcopy(model)
    del short.model.layers[2]
    reference = observe(short, "mixtral", batches)
    session = TrimSession.begin(linearize_moe(model))
    session.drop_block(2)
    profile = collect_profile(
        model, session.topology_now(), batches, EVERYTHING, run_length=2, skip_blocks={2}, skip_layers=()
    )
    original = [0, 1, 3, 4]
    expected = {original[i]: mean_cosine(pairs) for i, pairs in enumerate(reference.blocks)}
    assert profile.block_similarity == pytest.approx(expected, abs=TOLERANCE)
    runs = {
        original[i]: mean_cosine(
            [(a[0], b[1]) for a, b in zip(reference.blocks[i], reference.blocks[i + 1], strict=True)]
        )
        for i in range(3)
    }
    assert profile.run_similarity == pytest.approx(runs, abs=TOLERANCE)
    assert set(profile.experts) == set(original)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss", "cohere2_moe"])
@pytest.mark.parametrize("batches", [plain_batches, padded_batches])
def test_offloaded_model_gives_the_same_numbers(
    model_type: str, batches, attention: str, tmp_path: Path
) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    if model_type != "gpt_oss":
        model.config._attn_implementation = attention
    plain = profiled(model, batches(), run_length=2)
    for module in model.modules():
        remove_module_offload(module)  # upstream's linearization leaves some
        offload_module(module, "cpu", "disk", offload_dir=str(tmp_path))
    assert is_offloaded(model)
    offloaded = profiled(model, batches(), run_length=2)
    assert_same_profile(offloaded, plain)
    assert is_offloaded(model), "profiling must not bring the weights back for good"


def assert_same_profile(ours: Profile, theirs: Profile) -> None:
    assert (ours.num_tokens, ours.num_samples) == (theirs.num_tokens, theirs.num_samples)
    for name in ("block_similarity", "layer_similarity", "run_similarity"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-6)
    assert set(ours.experts) == set(theirs.experts)
    for index, experts in theirs.experts.items():
        for name, values in experts.model_dump(exclude={"output_similarity"}).items():
            assert (getattr(ours.experts[index], name) or []) == pytest.approx(values or [], rel=1e-5), name
        torch.testing.assert_close(
            torch.tensor(ours.experts[index].output_similarity),
            torch.tensor(experts.output_similarity),
            atol=1e-5,
            rtol=0,
        )


def _profile_and_plan(batches: list[dict]) -> tuple[Profile, dict[int, float], tuple]:
    model = linearize_moe(tiny_models.build("mixtral"))
    topology = find_topology(model)
    profile = profiled(model, batches, run_length=2)
    divergence = divergence_without(model, topology, batches, [(0,), (1,), (2,), (3,)], "block")
    rooms = {i: ExpertRoom(8, 2) for i in profile.experts}
    scores = {i: experts.weighted_output_norm for i, experts in profile.experts.items()}
    plan = (
        parts_to_drop(profile.block_similarity, count=2),
        parts_to_drop(divergence, count=2, drop_highest=False),
        experts_to_drop(scores, rooms, 3, "global"),
    )
    return profile, divergence, plan


def _rank(directory: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # Uneven shares: one rank sees three sequences, the other one.
    batches = plain_batches(4)
    result = _profile_and_plan(batches[:3] if rank == 0 else batches[3:])
    torch.save([result[0].model_dump(mode="json"), *result[1:]], directory / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_profile_and_plan_of_one(tmp_path: Path) -> None:
    alone = _profile_and_plan(plain_batches(4))
    assert support.run_forked(_rank, tmp_path, ranks=2) == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0] == ranks[1], "every rank must make the same plan"
    profile, divergence, plan = ranks[0]
    assert_same_profile(Profile.model_validate(profile), alone[0])
    assert divergence == pytest.approx(alone[1], rel=1e-5)
    assert plan == alone[2]


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss", "granitemoe", "glm4_moe"]
)
def test_routed_forward_equals_upstream_and_transformers(model_type: str) -> None:
    fused_model = tiny_models.build(model_type)
    model = linearize_moe(copy.deepcopy(fused_model))
    moe = find_topology(model).moe_layers[2]
    fused, linear = fused_model.get_submodule(moe.experts), model.get_submodule(moe.experts)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(10, tiny_models.HIDDEN, generator=generator)
    # Expert 7 gets no token; the others an uneven share.
    indices = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, generator=generator)
    calls = []
    with torch.no_grad():
        ours = routed_forward(linear, hidden, indices, weights, lambda *call: calls.append(call))
        torch.testing.assert_close(ours, linear(hidden, indices, weights), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours, fused(hidden, indices, weights), atol=1e-5, rtol=1e-5)
        for expert, tokens, inputs, gate, outputs in calls:
            rows, columns = torch.where(indices == expert)
            torch.testing.assert_close(inputs, hidden[rows], atol=0, rtol=0)
            assert tokens.tolist() == rows.tolist()
            torch.testing.assert_close(gate, weights[rows, columns], atol=0, rtol=0)
            torch.testing.assert_close(outputs, linear[expert](hidden[rows]), atol=1e-6, rtol=1e-5)
    assert [call[0] for call in calls] == sorted(set(indices.flatten().tolist()))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "gpt_oss", "granitemoe", "cohere2_moe"])
@pytest.mark.parametrize("part", ["block", "layer"])
def test_divergence_equals_a_full_pass_without_the_part(model_type: str, part: str) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    topology = find_topology(model)
    forwards = own_forwards(model)
    batches = padded_batches()
    indices = list(topology.moe_layers) if part == "layer" else list(range(len(topology.blocks)))
    ours = divergence_without(model, topology, batches, [(index,) for index in indices], part)
    expected = {index: _divergence(model, topology, batches, (index,), part) for index in indices}
    assert ours == pytest.approx(expected, rel=TOLERANCE, abs=1e-6)
    if part == "block":
        run = divergence_without(model, topology, batches, [(1, 2)], part)
        assert run[1] == pytest.approx(_divergence(model, topology, batches, (1, 2), part), rel=TOLERANCE)
    assert own_forwards(model) == forwards and not any(module._forward_hooks for module in model.modules())


def test_divergence_runs_nothing_before_the_part() -> None:
    model = linearize_moe(tiny_models.build("mixtral", num_layers=6))
    calls = []
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_args, index=index: calls.append(index))
    divergence_without(model, find_topology(model), plain_batches(1), [(i,) for i in range(6)], "block")
    # The intact model once, and for each part the blocks after it: half of all blocks.
    assert len(calls) == 6 + sum(range(6))


def test_divergence_of_an_offloaded_model(tmp_path: Path) -> None:
    model = linearize_moe(tiny_models.build("mixtral"))
    topology, parts = find_topology(model), [(i,) for i in range(4)]
    plain = divergence_without(model, topology, plain_batches(), parts, "layer")
    for module in model.modules():
        remove_module_offload(module)
        offload_module(module, "cpu", "disk", offload_dir=str(tmp_path))
    assert divergence_without(model, topology, plain_batches(), parts, "layer") == pytest.approx(
        plain, rel=1e-5
    )


def _divergence(model: nn.Module, topology, batches: list[dict], parts: tuple[int, ...], part: str) -> float:
    """KL with hooks that undo the part after it has been computed."""
    total, tokens = 0.0, 0
    for batch in batches:
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            intact = model(**batch, use_cache=False).logits[real].double().log_softmax(-1)
            handles = [_undo(model, topology, index, part) for index in parts]
            without = model(**batch, use_cache=False).logits[real].double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        total += float((intact.exp() * (intact - without)).sum())
        tokens += len(intact)
    return total / tokens


def _undo(model: nn.Module, topology, index: int, part: str):
    block = topology.blocks[index]
    if part == "block":

        def back(_module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            return (before, *output[1:]) if isinstance(output, tuple) else before

        return model.get_submodule(block.name).register_forward_hook(back, with_kwargs=True)

    def zero(_module, _args, output):
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    return model.get_submodule(block.moe.module).register_forward_hook(zero)
