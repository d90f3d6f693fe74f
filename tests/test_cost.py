"""What a model costs, held against torch's counter of operations, safetensors' reader and a filled KV cache."""

import itertools
import json
import math
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from llmcompressor_moe import LayerDropModifier, RouterAwareQuantModifier
from llmcompressor_moe.demo import DEMO_MODEL
from llmcompressor_moe.evaluation.cost import ModelCost, expected_distinct_experts
from llmcompressor_moe.evaluation.cost_reading import model_cost
from llmcompressor_moe.topology import find_topology

# Shared experts, a router's bias, latent attention, sliding windows, fused experts, values of another size than
# keys, dense layers, a tied head, experts beside a dense feed-forward.
FAMILIES = (
    "deepseek_v2",
    "gemma4_text",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "mimo_v2_flash",
    "mixtral",
    "olmoe",
    "qwen2_moe",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cost")


@pytest.fixture(scope="module")
def layer_dropped(folder):
    path = folder / "layer-dropped"
    model = support.trim(support.load(support.saved("qwen2_moe", folder)), LayerDropModifier(num_drop=1))
    model.save_pretrained(path)
    return path


def counted(model, **inputs) -> int:
    """Operations of a forward by torch's counter, but for the rotary tables: their angles, positions times
    frequencies, are an outer product that the counter takes for a matrix multiplication.
    """
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    rotary = sum(
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.rpartition(".")[2].startswith("rotary_emb")
    )
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family, folder):
    path = support.saved(family, folder)
    model = support.load(path)
    model.set_attn_implementation("eager")
    # Eager attention multiplies the masked half too: every token sees the whole prompt.
    length = 16
    operations = counted(model, input_ids=support.token_ids(1, length), use_cache=False)
    cost = model_cost(path, contexts=(length,))
    assert cost.notes == []
    assert length * cost.flops[0].total == operations


def test_flops_of_a_layer_dropped_model(layer_dropped):
    model = support.load(layer_dropped)
    assert len(find_topology(model).moe_layers) == 3
    model.set_attn_implementation("eager")
    operations = counted(model, input_ids=support.token_ids(1, 16), use_cache=False)
    assert 16 * model_cost(layer_dropped, contexts=(16,)).flops[0].total == operations


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_flops_of_a_decode_step(family, folder):
    path = support.saved(family, folder)
    model = support.load(path)
    model.set_attn_implementation("eager")
    ids, context = support.token_ids(1, 13), 13
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    operations = counted(model, input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    # transformers expands the latents of all earlier tokens again in every step.
    again = sum(
        2 * module.weight.numel() * (context - 1)
        for name, module in model.named_modules()
        if name.endswith("kv_b_proj")
    )
    assert model_cost(path, contexts=(context,)).flops[0].total + again == operations


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_cache_is_what_transformers_fills(family, folder):
    path, context = support.saved(family, folder), 9
    model = support.load(path)
    with torch.no_grad():
        cache = model(input_ids=support.token_ids(2, context), use_cache=True).past_key_values
    filled = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert model_cost(path).decode_at(batch=2, context=context).kv_cache == filled


def test_a_window_bounds_attention_and_cache(folder):
    cost = model_cost(support.saved("gpt_oss", folder))
    windows = [layer.window for layer in cost.attention]
    assert windows == [32, None, 32, None]
    near, far = cost.flops_at(32).attention, cost.flops_at(64).attention
    assert far == near * 3 // 2
    assert cost.decode_at(context=64).kv_cache == cost.decode_at(context=32).kv_cache * 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_hold_all_bytes(family, folder):
    path = support.saved(family, folder)
    cost = model_cost(path)
    stored = load_file(path / "model.safetensors")
    assert sum(part.nbytes for part in cost.parts) == cost.nbytes == sum(t.nbytes for t in stored.values())
    assert cost.nbytes + cost.header_nbytes == (path / "model.safetensors").stat().st_size
    buffers = {name: b for name, b in support.load(path).named_buffers() if name in stored}
    assert 4 * cost.parameters + sum(b.nbytes for b in buffers.values()) == cost.nbytes
    for part in cost.parts:
        if part.part not in ("router", "attention"):  # which may hold buffers
            assert part.nbytes == 4 * part.parameters
    assert cost.parameters == sum(p.numel() for p in support.load(path).parameters())


def test_decode_of_one_token_reads_two_of_eight_experts():
    stored = load_file(DEMO_MODEL / "model.safetensors")
    experts = sum(t.nbytes for name, t in stored.items() if ".experts." in name)
    table = stored["model.embed_tokens.weight"]
    others = sum(t.nbytes for t in stored.values()) - experts - table.nbytes
    cost = model_cost(DEMO_MODEL, contexts=(10,))
    (decode,) = cost.decode
    assert decode.weights == others + table[0].nbytes
    assert decode.experts == experts / 4
    assert decode.kv_cache == 10 * 8 * 2 * 2 * 32 * 2
    assert decode.step == decode.per_token
    assert sum(part.read_nbytes for part in cost.parts) == decode.weights + decode.experts


def test_a_tied_head_is_read_whole(tmp_path):
    path = support.saved("mixtral", tmp_path, tie_word_embeddings=True)
    untied = model_cost(support.saved("mixtral", tmp_path / "untied"))
    tied = model_cost(path)
    assert tied.nbytes < untied.nbytes
    assert tied.decode == untied.decode
    assert tied.linear_flops == untied.linear_flops


@pytest.mark.parametrize(("experts", "top_k", "batch"), [(4, 2, 1), (4, 2, 3), (5, 1, 4), (3, 3, 2)])
def test_distinct_experts_by_enumeration(experts, top_k, batch):
    choices = list(itertools.combinations(range(experts), top_k))
    sizes = [len(set().union(*tokens)) for tokens in itertools.product(choices, repeat=batch)]
    assert expected_distinct_experts(experts, top_k, batch) == pytest.approx(sum(sizes) / len(sizes))


def test_routing_shares_by_enumeration(folder):
    """Two tokens routed by an uneven distribution over pairs of experts, all combinations weighed."""
    path = support.saved("mixtral", folder)
    cost = model_cost(path)
    pairs = list(itertools.combinations(range(8), 2))
    weights = [1.0 + 3 * a + b * b for a, b in pairs]
    chances = [weight / math.fsum(weights) for weight in weights]
    shares = [math.fsum(c for c, pair in zip(chances, pairs, strict=True) if e in pair) for e in range(8)]
    expected = sum(
        p * q * len({*first, *second})
        for (p, first), (q, second) in itertools.product(zip(chances, pairs, strict=True), repeat=2)
    )
    one = cost.experts[0].nbytes[0]
    routing = {layer.block: shares for layer in cost.experts}
    assert cost.decode_at(batch=2, routing=routing).experts == pytest.approx(4 * one * expected)
    assert cost.decode_at(batch=2, routing=routing).experts < cost.decode_at(batch=2).experts
    assert model_cost(path, routing=routing, batches=(2,)).decode[0].experts == pytest.approx(
        4 * one * expected
    )


def test_quantized_parts_hold_their_scales(folder):
    path = folder / "quantized"
    base = support.saved("granitemoe", folder)  # stores its experts fused; quantized ones come apart
    recipe = RouterAwareQuantModifier(
        target_bits=6.0, group_size=32, schemes=["W4A16_ASYM", "W8A16"], attention_scheme="W8A16"
    )
    support.trim(support.load(base), recipe).save_pretrained(path)
    cost, plain = model_cost(path), model_cost(base)
    with safe_open(path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    parts = {part.part: part for part in cost.parts}
    assert sum(part.nbytes for part in cost.parts) == sum(stored.values()) == cost.nbytes
    assert parts["experts"].nbytes == sum(n for name, n in stored.items() if ".experts." in name)
    attention = [n for name, n in stored.items() if ".self_attn." in name]
    assert parts["attention"].nbytes == sum(attention)
    assert any(name.endswith("zero_point") for name in stored)
    read = [n for name, n in stored.items() if ".experts." in name and not name.endswith("weight_shape")]
    assert cost.decode_at().experts == pytest.approx(sum(read) / 4)
    assert (cost.parameters, cost.active_parameters) == (plain.parameters, plain.active_parameters)
    assert cost.flops == plain.flops
    assert cost.notes == []


def test_fewer_bits_of_the_cache(tmp_path):
    path = support.saved("mixtral", tmp_path)
    plain = model_cost(path).decode[0].kv_cache
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        "config_groups": {},
    }
    (path / "config.json").write_text(json.dumps(config))
    assert model_cost(path).decode[0].kv_cache == plain / 4


def test_tensors_of_no_module_are_stored_but_not_read(tmp_path):
    path = support.saved("mixtral", tmp_path)
    before = model_cost(path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.9.eh_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    after = model_cost(path)
    assert after.nbytes == before.nbytes + 64
    assert {part.part: part.nbytes for part in after.parts}["other"] == 64
    assert after.decode == before.decode
    assert "64 bytes" in after.notes[0]


def test_other_mixers_are_named(folder):
    notes = model_cost(support.saved("qwen3_next", folder)).notes
    assert any("GatedDeltaNet" in note and "blocks [0, 1, 2]" in note for note in notes)


def test_json_and_back(folder):
    cost = model_cost(support.saved("mixtral", folder), contexts=(8, 16), batches=(1, 4))
    again = ModelCost.model_validate_json(cost.model_dump_json())
    assert again == cost.model_copy(
        update={"path": Path(cost.path).name}
    )  # reports show names, no absolute paths
    assert again.decode_at(4, 16) == cost.decode[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": (0,)}, "contexts=0 must be at least 1"),
        ({"batches": (2, -1)}, "batches=-1 must be at least 1"),
        ({"routing": {0: [0.25] * 8}}, r"block 1 has an MoE layer too"),
        ({"routing": {i: [0.25] * 7 for i in range(4)}}, r"routing\[0\] has 7 shares.*8 experts"),
        ({"routing": {i: [0.125] * 8 for i in range(4)}}, r"routing\[0\] adds up to 1;.*top-k, 2"),
        ({"routing": {i: [2.0] + [0.0] * 7 for i in range(4)}}, r"routing\[0\] goes from 0.0 to 2.0"),
    ],
)
def test_bad_numbers(options, message, folder):
    with pytest.raises(ValueError, match=message):
        model_cost(support.saved("mixtral", folder), **options)


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        model_cost(tmp_path)
    tiny_models.tiny_config("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no safetensors file"):
        model_cost(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"model\.safetensors: the header claims 16 bytes"):
        model_cost(tmp_path)
