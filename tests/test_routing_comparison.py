"""Routers of trimmed models against the base's: where each part came from, and what its router chooses now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from support import drop_report
from transformers import PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.evaluation.history import (
    ModelLayout,
    kept_parts,
    layout_of,
    match_layouts,
    read_history,
)
from llmcompressor_moe.evaluation.routing import (
    RoutingComparison,
    compare_records,
    compare_routing,
    record_routing,
)
from llmcompressor_moe.report import DropReport
from llmcompressor_moe.surgery.compact import skip_layers
from llmcompressor_moe.topology import find_topology


def batches(samples: int = 3, length: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = support.token_ids(samples, length)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]


# Which parts are left

# A model as nested data: one list per block, of the original names of its experts; None where it is dense.
Nested = list[tuple[int, list[int] | None]]


def count(model: Nested) -> ModelLayout:
    return ModelLayout(
        len(model), {index: len(experts) for index, (_, experts) in enumerate(model) if experts is not None}
    )


def drop_at_random(data: st.DataObject, model: Nested) -> tuple[Nested, list[DropReport]]:
    """One recipe: any drops in any order, all by the indices with which it began; the model cut as told."""
    layout = count(model)
    reports, blocks, layers, experts = [], set(), set(), {}
    for kind in data.draw(st.lists(st.sampled_from(["Block", "Layer", "Expert"]), max_size=4)):
        if kind == "Block":
            gone = data.draw(st.lists(st.integers(0, len(model) - 1), unique=True, max_size=2))
            blocks.update(gone)
        elif kind == "Layer":
            gone = data.draw(st.lists(st.sampled_from(sorted(layout.num_experts)), unique=True, max_size=2))
            layers.update(gone)
        else:
            gone = {}
            for layer, amount in layout.num_experts.items():
                gone[layer] = data.draw(
                    st.lists(st.integers(0, amount - 1), unique=True, max_size=amount // 3)
                )
                experts.setdefault(layer, set()).update(gone[layer])
        reports.append(drop_report(kind, layout, gone))
    cut: Nested = []
    for index, (name, names) in enumerate(model):
        if index in blocks:
            continue
        if names is None or index in layers:
            cut.append((name, None))
        else:
            cut.append((name, [n for place, n in enumerate(names) if place not in experts.get(index, ())]))
    return cut, reports


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([None, 3, 5, 8]), min_size=1, max_size=6), st.integers(0, 4), st.data())
def test_what_is_left_after_any_drops(sizes: list[int | None], runs: int, data: st.DataObject) -> None:
    model: Nested = [(i, None if size is None else list(range(size))) for i, size in enumerate(sizes)]
    base, history = count(model), []
    for _ in range(runs):
        if not any(experts for _, experts in model):
            break
        model, reports = drop_at_random(data, model)
        history += reports
    kept = kept_parts(history, base)
    assert list(kept.blocks) == [name for name, _ in model]
    assert {block: list(ids) for block, ids in kept.experts.items()} == {
        name: experts for name, experts in model if experts is not None
    }
    assert kept.layout == count(model)
    there = dict(model)
    assert kept.dropped_blocks == [block for block in range(len(sizes)) if block not in there]
    assert kept.dropped_layers == [
        block for block, size in enumerate(sizes) if size and block in there and there[block] is None
    ]
    assert match_layouts(base, count(model), history) == kept
    # Seen from a model on the way: the history before it is the base's own.
    if history:
        first = sum(
            1 for r in history if r.num_blocks == base.num_blocks and r.num_experts == base.num_experts
        )
        middle = kept_parts(history[:first], base).layout
        later = match_layouts(middle, count(model), history, history[:first])
        assert later.layout == kept.layout
        assert [kept_parts(history[:first], base).blocks[block] for block in later.blocks] == list(
            kept.blocks
        )


PLAIN = ModelLayout(4, {index: 8 for index in range(4)})
SMALLER = ModelLayout(3, {index: 8 for index in range(3)})


@pytest.mark.parametrize(
    ("history", "compressed", "message"),
    [
        ([], SMALLER, r"no history \(trimming.json\) beside it"),
        (
            [drop_report("Block", SMALLER, [1])],
            SMALLER,
            "The history begins with a model of 3 blocks",
        ),
        ([drop_report("Block", PLAIN, [1])], PLAIN, "its history .* leaves 3 blocks"),
        (
            [drop_report("Block", PLAIN, [1]), drop_report("Layer", ModelLayout(2, {}), [0])],
            SMALLER,
            "has a gap",
        ),
        ([drop_report("Block", PLAIN, [4])], SMALLER, r"dropped names \[4\]"),
        ([drop_report("Layer", ModelLayout(4, {1: 8}), [0])], SMALLER, "The history begins"),
        ([drop_report("Expert", PLAIN, {0: [8]})], SMALLER, r"dropped\[0\] names \[8\]"),
        ([drop_report("Head", PLAIN, [0])], SMALLER, "HeadDropModifier: dropped"),
    ],
)
def test_a_history_that_does_not_lead_there(
    history: list[DropReport], compressed: ModelLayout, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_layouts(PLAIN, compressed, history)


def test_a_base_with_another_past() -> None:
    theirs, ours = drop_report("Block", PLAIN, [1]), drop_report("Block", PLAIN, [2])
    with pytest.raises(ValueError, match="made from another model"):
        match_layouts(SMALLER, SMALLER, [theirs], [ours])
    assert match_layouts(SMALLER, SMALLER, [ours], [ours]).blocks == (0, 1, 2)
    # A copy that says nothing of its past is compared by its layout.
    assert match_layouts(SMALLER, SMALLER, [], [ours]).blocks == (0, 1, 2)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"dropped": 3}]'])
def test_a_broken_history_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "trimming.json").write_text(text)
    with pytest.raises(ValueError, match=r"trimming\.json"):
        read_history(tmp_path)
    assert read_history(tmp_path / "none") == []


# What is chosen


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "llama4_text", "gpt_oss"])
def test_fused_experts_show_the_choices_of_linearized_ones(family: str) -> None:
    model = tiny_models.build(family)
    before = support.logits(model)
    fused = record_routing(model, batches())
    assert torch.equal(support.logits(model), before), "the model was changed"
    linear = record_routing(linearize_moe(model), batches())
    assert fused.tokens == linear.tokens == 48 and fused.widths == linear.widths
    assert fused.traces.keys() == linear.traces.keys() != set()
    for layer, trace in fused.traces.items():
        assert trace.chosen.sum(dim=-1).unique().tolist() == [find_topology(model).moe_layers[layer].top_k]
        assert torch.equal(trace.chosen, linear.traces[layer].chosen)
        assert (trace.probabilities is None) == (linear.traces[layer].probabilities is None)


def test_a_model_and_itself() -> None:
    model = tiny_models.build("mixtral")
    found = compare_routing(model, model, [], batches())
    assert found.tokens == 48 and sorted(found.layers) == [0, 1, 2, 3]
    assert found.dropped_blocks == found.dropped_layers == [] and found.dropped_experts == {}
    assert (found.mean.top_k_overlap, found.mean.top_k_overlap_kept, found.mean.router_kl) == (1, 1, 0)
    assert (found.mean.replaced, found.mean.load_change) == (0, 0)
    assert RoutingComparison.model_validate_json(found.model_dump_json()) == found


def test_padding_and_the_limit_on_tokens() -> None:
    model = tiny_models.build("mixtral")
    ids = support.token_ids(6, 10)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    padded = [{"input_ids": ids[:4], "attention_mask": mask[:4]}, {"input_ids": ids[4:]}]
    assert record_routing(model, padded).tokens == 54
    # Whole sequences of 10, 4, 10, 10, 10, 10 tokens.
    for limit, tokens in ((54, 54), (53, 44), (25, 24), (24, 24), (14, 14), (13, 10), (1, 10)):
        record = record_routing(model, padded, max_tokens=limit)
        assert record.tokens == tokens
        assert all(trace.chosen.shape == (tokens, 8) for trace in record.traces.values())
    whole = record_routing(model, padded)
    alone = record_routing(model, [{"input_ids": ids[1:2, :4]}])
    for layer, trace in alone.traces.items():
        assert torch.equal(trace.chosen, whole.traces[layer].chosen[10:14])


def test_bad_input_is_named() -> None:
    model = tiny_models.build("mixtral", num_layers=2)
    with pytest.raises(ValueError, match="max_tokens=0"):
        record_routing(model, batches(), max_tokens=0)
    with pytest.raises(ValueError, match="batches holds no sequence"):
        record_routing(model, [])
    with pytest.raises(ValueError, match="The base saw 48 tokens, the compressed model 16"):
        compare_records(record_routing(model, batches()), record_routing(model, batches(1)), [])
    with pytest.raises(ValueError, match=r"no history \(trimming.json\)"):
        compare_routing(model, tiny_models.build("mixtral", num_layers=3), [], batches())


# Trimmed, saved and loaded again


def routers(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    return {
        index: next(p for p in model.get_submodule(moe.router).parameters() if p.ndim == 2)
        for index, moe in find_topology(model).moe_layers.items()
    }


def check_origin(base: PreTrainedModel, compressed: PreTrainedModel, found: RoutingComparison) -> None:
    """Every expert's row in the router is where the comparison says it came from."""
    ours, theirs = routers(base), routers(compressed)
    assert {layer.compressed_block for layer in found.layers.values()} == theirs.keys()
    for block, layer in found.layers.items():
        torch.testing.assert_close(theirs[layer.compressed_block], ours[block][layer.kept_experts])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_all_drops_in_one_recipe(family: str, tmp_path: Path) -> None:
    path = support.saved(family, tmp_path, num_layers=6)
    recipe = [
        LayerDropModifier(layers=[4]),
        ExpertDropModifier(experts={0: [1, 6], 1: [0], 3: [2, 3, 7]}),
        BlockDropModifier(blocks=[2]),
    ]
    support.trim(support.load(path), recipe, no_data=True, output_dir=str(tmp_path / "out"))
    base, compressed = support.load(path), support.load(tmp_path / "out")
    found = compare_routing(base, compressed, read_history(tmp_path / "out"), batches())
    assert (found.dropped_blocks, found.dropped_layers) == ([2], [4])
    assert found.dropped_experts == {0: [1, 6], 1: [0], 3: [2, 3, 7]}
    assert {block: layer.compressed_block for block, layer in found.layers.items()} == {
        0: 0,
        1: 1,
        3: 2,
        5: 4,
    }
    check_origin(base, compressed, found)
    # The first router sees what it saw before: it is only masked.
    first = found.layers[0].routing
    assert first.top_k_overlap_kept == 1 and first.top_k_overlap < 1
    assert first.router_kl == pytest.approx(0, abs=1e-6)
    assert first.utilization_after[1] == first.utilization_after[6] == 0
    assert sum(first.utilization_after) == pytest.approx(1)
    # The last one has all its experts, but other inputs.
    last = found.layers[5].routing
    assert last.router_kl > 0 and last.top_k_overlap == last.top_k_overlap_kept < 1
    overlaps = [layer.routing.top_k_overlap for layer in found.layers.values()]
    assert found.mean.layers == 4 and found.mean.top_k_overlap == pytest.approx(sum(overlaps) / 4)


def test_trimmed_in_two_runs_with_a_checkpoint_between(tmp_path: Path) -> None:
    path = support.saved("mixtral", tmp_path, num_layers=5)
    first = [BlockDropModifier(blocks=[1]), ExpertDropModifier(experts={0: [0, 5], 3: [4]})]
    # By the indices of what the first run left: block 0, 2, 3, 4 of the base.
    second = [ExpertDropModifier(experts={0: [0], 2: [3, 4]}), LayerDropModifier(layers=[3])]
    support.trim(support.load(path), first, no_data=True, output_dir=str(tmp_path / "one"))
    middle = support.load(tmp_path / "one")
    support.trim(middle, second, no_data=True, output_dir=str(tmp_path / "two"))
    history = read_history(tmp_path / "two")
    assert [step.modifier for step in history] == [type(step).__name__ for step in (*first, *second)]
    base, compressed = support.load(path), support.load(tmp_path / "two")
    found = compare_routing(base, compressed, history, batches())
    assert (found.dropped_blocks, found.dropped_layers) == ([1], [4])
    assert found.dropped_experts == {0: [0, 1, 5], 3: [3, 4, 5]}
    check_origin(base, compressed, found)
    # Against the checkpoint between.
    middle = support.load(tmp_path / "one")
    step = compare_routing(
        middle, compressed, history, batches(), base_history=read_history(tmp_path / "one")
    )
    assert (step.dropped_blocks, step.dropped_layers, step.dropped_experts) == ([], [3], {0: [0], 2: [3, 4]})
    check_origin(middle, compressed, step)
    # And without what the first run wrote down.
    with pytest.raises(ValueError, match="The history begins with a model of 4 blocks"):
        compare_routing(base, compressed, history[2:], batches())


def test_the_history_survives_saving_over_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    path = support.saved("mixtral", tmp_path)
    out = tmp_path / "out"
    support.trim(support.load(path), BlockDropModifier(blocks=[1]), no_data=True, output_dir=str(out))
    model = support.load(out)
    support.trim(model, LayerDropModifier(layers=[0]), no_data=True, output_dir=str(out))
    model.save_pretrained(out)
    steps = json.loads((out / "trimming.json").read_text())
    assert [step["dropped"] for step in steps] == [[1], [0]]
    assert kept_parts(read_history(out), layout_of(support.load(path))).layout == layout_of(support.load(out))


def test_a_model_without_any_moe_layer_left() -> None:
    base, left = (tiny_models.build("mixtral", num_layers=2) for _ in range(2))
    skip_layers(left, find_topology(left), [0, 1])
    history = [drop_report("Layer", layout_of(base), [0, 1])]
    found = compare_routing(base, left, history, batches())
    assert (found.mean, found.layers, found.dropped_layers, found.tokens) == (None, {}, [0, 1], 48)


# Quantized


def test_a_quantized_checkpoint_runs_as_it_will_be_served(tmp_path: Path) -> None:
    """Activations are rounded, too: what is recorded is what a plain forward of the loaded model decides."""
    path = support.saved("mixtral", tmp_path)
    base = support.load(path)
    scheme = QuantizationScheme(
        **preset_name_to_scheme("W8A8", [r"re:.*experts\.\d+\..*_proj$"]).model_dump()
    )
    support.trim(
        support.load(path), QuantizationModifier(config_groups={"e": scheme}), output_dir=str(tmp_path / "q")
    )
    model = support.load(tmp_path / "q")
    seen: dict[int, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(moe.router).register_forward_hook(
            lambda _module, _args, output, index=index: seen.setdefault(index, []).append(output[0])
        )
        for index, moe in find_topology(model).moe_layers.items()
    ]
    with torch.no_grad():
        for batch in batches():
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    record = record_routing(model, batches())
    for index, logits in seen.items():
        expected = torch.cat(logits).float().softmax(-1)
        apart = (record.traces[index].probabilities - expected).abs().amax(dim=-1)
        # Tokens of all samples are multiplied together: a value between two steps of 8 bits may round otherwise.
        assert (apart < 1e-5).float().mean() > 0.9 and apart.max() < 5e-3
    found = compare_records(record_routing(base, batches()), record, read_history(tmp_path / "q"))
    assert found.layers[0].routing.router_kl == 0
    assert 0 < found.mean.router_kl < 0.1 and found.mean.top_k_overlap > 0.8
