"""Config and tensors agree, however a trimmed model is saved, reloaded and trimmed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import linear_loading
import pytest
import support
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils import match_name
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.atomic import OutputDirectoryError
from llmcompressor_moe.checkpoint.quantized_names import patterns_for
from llmcompressor_moe.report import DropReport


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.saved("mixtral", tmp_path_factory.mktemp("base"))


def cut(base: Path, recipe: Any, out: Path, **options: Any) -> Any:
    return support.trim(support.load(base), recipe, output_dir=str(out), no_data=True, **options)


def same_logits(path: Path, model: Any) -> None:
    torch.testing.assert_close(support.logits(support.load(path)), support.logits(model), atol=1e-5, rtol=0)


def text_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def test_uniform_cut_is_a_stock_checkpoint(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = [BlockDropModifier(blocks=[1]), ExpertDropModifier(experts={0: [1, 2], 2: [0, 7], 3: [4, 5]})]
    model = cut(mixtral, recipe, out)
    assert "per_layer_config" not in text_of(out)
    assert text_of(out)["num_local_experts"] == 6
    stock, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(support.logits(stock.eval()), support.logits(model), atol=1e-5, rtol=0)


def test_uneven_cut_names_each_layer_and_stock_readers_refuse_it(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut(mixtral, [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={0: [1, 2]})], out)
    config = text_of(out)
    assert config["per_layer_config"] == {
        "0": {"num_local_experts": 6},
        "2": {"skip": ["mlp"], "num_local_experts": 0},
    }
    assert "allow_global_per_layer_attribute_access" not in (out / "config.json").read_text()
    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(out)
    names = set(load_file(out / "model.safetensors"))
    assert "model.layers.2.post_attention_layernorm.weight" in names
    assert not any(name.startswith("model.layers.2.block_sparse_moe") for name in names)


def test_save_pretrained_later_and_again(mixtral: Path, tmp_path: Path) -> None:
    model = support.trim(support.load(mixtral), [LayerDropModifier(layers=[1])], no_data=True)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        same_logits(tmp_path / name, model)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()


def test_trimming_a_trimmed_checkpoint(mixtral: Path, tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    cut(mixtral, [LayerDropModifier(layers=[3]), ExpertDropModifier(experts={0: [1, 2]})], one)
    cut(one, [BlockDropModifier(blocks=[1])], two)
    assert text_of(two)["per_layer_config"] == {
        "0": {"num_local_experts": 6},
        "2": {"skip": ["mlp"], "num_local_experts": 0},
    }
    model = cut(two, [ExpertDropModifier(experts={0: [0], 1: [0, 1, 7]})], three)
    # 5 experts in both layers that still have any, but one layer has none: still uneven.
    assert text_of(three)["num_local_experts"] == 5
    assert text_of(three)["per_layer_config"] == {"2": {"skip": ["mlp"], "num_local_experts": 0}}
    same_logits(three, model)


def test_uneven_becomes_uniform_again(mixtral: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    cut(mixtral, [ExpertDropModifier(experts={0: [1, 2]})], one)
    cut(one, [ExpertDropModifier(experts={layer: [0, 1] for layer in (1, 2, 3)})], two)
    assert "per_layer_config" not in text_of(two)
    assert text_of(two)["num_local_experts"] == 6
    AutoModelForCausalLM.from_pretrained(two)


def test_second_recipe_on_the_model_in_memory(mixtral: Path, tmp_path: Path) -> None:
    model = support.trim(support.load(mixtral), [LayerDropModifier(layers=[0])], no_data=True)
    model = support.trim(model, [ExpertDropModifier(num_drop=2), BlockDropModifier(blocks=[2])])
    model.save_pretrained(tmp_path / "out")
    assert text_of(tmp_path / "out")["num_hidden_layers"] == 3
    same_logits(tmp_path / "out", model)
    history = json.loads((tmp_path / "out" / "trimming.json").read_text())
    assert [step["modifier"] for step in history] == [
        "LayerDropModifier",
        "ExpertDropModifier",
        "BlockDropModifier",
    ]


def test_model_loaded_linearized_from_the_start(tmp_path: Path) -> None:
    base = support.saved("qwen3_moe", tmp_path)
    out, expected = tmp_path / "out", tmp_path / "logits.pt"
    assert support.run_forked(linear_loading.main, base, out, expected) == [0]
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(support.logits(stock), torch.load(expected), atol=1e-5, rtol=0)


def test_compressed_attention_and_experts_with_blocks_gone(mixtral: Path, tmp_path: Path) -> None:
    weights = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    four = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    groups = {
        "attention": QuantizationScheme(
            targets=[r"re:.*layers\.(1|3)\.self_attn\.[qkvo]_proj$"], weights=weights
        ),
        "experts": QuantizationScheme(targets=[r"re:.*layers\.3\.mlp\.experts\..*"], weights=four),
    }
    out = tmp_path / "out"
    recipe = [BlockDropModifier(blocks=[0]), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    model = cut(mixtral, recipe, out)
    config = text_of(out)["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert any("(?:0|2)" in target and "self_attn" in target for target in targets), targets
    assert any(r"\d+\.w1" in target for target in targets), targets
    check_checkpoint(out).raise_if_errors()
    same_logits(out, model)


def test_quantized_and_saved_without_compression(mixtral: Path, tmp_path: Path) -> None:
    weights = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    groups = {"attention": QuantizationScheme(targets=[r"re:.*self_attn\.[qkvo]_proj$"], weights=weights)}
    recipe = [LayerDropModifier(layers=[1]), QuantizationModifier(config_groups=groups)]
    model = support.trim(support.load(mixtral), recipe, no_data=True)
    model.save_pretrained(tmp_path / "out", save_compressed=False)
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_model_card_and_history_say_what_was_done(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    support.trim(support.load(mixtral), [LayerDropModifier(num_drop=1)], output_dir=str(out))
    card = (out / "README.md").read_text()
    assert "MoE layers dropped" in card
    assert "LayerDropModifier" in card.split("```yaml")[1]
    assert str(mixtral.parent) not in card
    (step,) = json.loads((out / "trimming.json").read_text())
    assert len(step["dropped"]) == 1
    assert sorted(step["dropped"] + step["kept"]) == [0, 1, 2, 3]
    AutoTokenizer.from_pretrained(out)


def test_crash_while_saving_leaves_no_target(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = support.trim(support.load(mixtral), [LayerDropModifier(layers=[1])], no_data=True)
    monkeypatch.setattr("llmcompressor_moe.saving.save.write_model_card", _fail)
    with pytest.raises(OutputDirectoryError, match="as it was before"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_crash_while_saving_leaves_an_older_checkpoint(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cut(mixtral, [LayerDropModifier(layers=[1])], out)
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    model = support.trim(support.load(mixtral), [BlockDropModifier(blocks=[1])], no_data=True)
    with monkeypatch.context() as patch:
        patch.setattr("llmcompressor_moe.saving.save.write_model_card", _fail)
        with pytest.raises(OutputDirectoryError):
            model.save_pretrained(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    model.save_pretrained(out)
    assert (out / "notes.txt").read_text() == "mine"
    same_logits(out, model)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_illegal_checkpoint_is_not_handed_out(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = support.trim(support.load(mixtral), [ExpertDropModifier(experts={0: [1]})], no_data=True)
    # A save that forgets what changed: the config would lie about the tensors.
    monkeypatch.setattr("llmcompressor_moe.saving.save.write_config_changes", lambda *_: None)
    with pytest.raises(Exception, match="not legal to serve"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_report_can_be_edited_and_applied_again(mixtral: Path, tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    support.trim(support.load(mixtral), [ExpertDropModifier(num_drop=2, report_path=str(report))])
    plan = DropReport.load(report)
    assert set(plan.dropped) == {0, 1, 2, 3}
    assert all(len(plan.scores[layer]) == 8 for layer in plan.scores)
    plan.dropped = {0: plan.dropped[0], 2: [7]}
    plan.save(report)
    out = tmp_path / "out"
    cut(mixtral, [ExpertDropModifier(plan_path=str(report))], out)
    assert text_of(out)["per_layer_config"] == {"0": {"num_local_experts": 6}, "2": {"num_local_experts": 7}}


def test_recipe_as_yaml(mixtral: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "drop_stage:\n  drop_modifiers:\n    LayerDropModifier:\n      num_drop: 1\n    ExpertDropModifier:\n"
        "      num_drop: 2\n      scope: global\n      criterion: reap\n"
    )
    out = tmp_path / "out"
    model = support.trim(support.load(mixtral), str(recipe), output_dir=str(out))
    same_logits(out, model)
    assert len([s for s in text_of(out)["per_layer_config"].values() if s.get("skip")]) == 1


def _fail(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


# Patterns for quantized modules


@st.composite
def linears(draw: st.DrawFn) -> tuple[set[str], set[str], str]:
    """Names of all Linears of a model whose layers differ, those of them that get a scheme (single ones, whole
    layers, single experts, and the first so many experts of a layer), and the path of the layers. Beside them is
    a tower with layers of the same names.
    """
    prefix = draw(st.sampled_from(["model.layers", "model.language_model.layers", "transformer.layers"]))
    tower = draw(st.sampled_from(["vision_model.model.layers", "model.audio_tower.layers", "visual.layers"]))
    experts_in = draw(st.sampled_from(["mlp.experts", "block_sparse_moe.experts", "feed_forward.experts"]))
    inside = draw(st.sampled_from([("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"), ("proj",)]))
    among, names = {"lm_head", "model.embed.proj"}, set()
    for layer in draw(st.lists(st.integers(0, 120), min_size=1, max_size=6, unique=True)):
        plain = [f"{prefix}.{layer}.{path}" for path in ("self_attn.q_proj", "mlp.shared_expert.up_proj")]
        experts = sorted(draw(st.lists(st.integers(0, 140), max_size=13, unique=True)))
        if draw(st.booleans()):
            experts = list(range(len(experts)))
        of = {
            expert: [f"{prefix}.{layer}.{experts_in}.{expert}.{name}" for name in inside]
            for expert in experts
        }
        among.update(plain, *of.values(), [name.replace(prefix, tower) for name in plain])
        names.update(draw(st.lists(st.sampled_from(plain), unique=True)))
        first = draw(st.sampled_from([0, len(experts), draw(st.integers(0, len(experts)))]))
        some = draw(st.lists(st.sampled_from(experts), unique=True)) if experts else []
        chosen = draw(st.sampled_from([experts[:first], some]))
        for expert in chosen:
            names.update(draw(st.sampled_from([of[expert], of[expert][:1]])))
    names.update(draw(st.sampled_from([[], ["lm_head"], sorted(n for n in among if n.startswith(tower))])))
    return names, among, prefix


@settings(max_examples=200, deadline=None)
@given(linears())
@example((set(), {"lm_head"}, "model.layers"))
@example(
    (
        {f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in (1, 11)},
        {
            f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            for layer in (1, 11, 21)
            for expert in range(112)
        },
        "model.layers",
    )
)
def test_patterns_match_what_is_meant_and_nothing_else(drawn: tuple[set[str], set[str], str]) -> None:
    names, among, stack = drawn
    patterns = patterns_for(sorted(names), sorted(among), [stack])
    matched = {name for name in among if any(match_name(name, pattern) for pattern in patterns)}
    assert matched == names
    assert len(patterns) <= len(names)
    assert len(set(patterns)) == len(patterns)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 12))
def test_whole_layers_share_a_pattern_and_the_first_experts_do_not(
    layers: int, experts: int, first: int
) -> None:
    of = {
        layer: [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for expert in range(experts)]
        for layer in range(layers)
    }
    among = [name for names in of.values() for name in names]
    (pattern,) = patterns_for(among, among, ["model.layers"])
    assert all(match_name(name, pattern) for name in among)
    part = of[0][:first]
    found = patterns_for(part, among, ["model.layers"])
    assert [name for name in among if any(match_name(name, pattern) for pattern in found)] == part
