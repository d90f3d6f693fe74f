"""Sizes after a recipe, foretold from a config: against what recipes really write, and where they cannot be known.
`test_recipes.py` does the same for every recipe in recipes/.
"""

from pathlib import Path

import pytest
import support
from safetensors.torch import load_file
from test_cli import CONFIGS, run

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier, RouterAwareQuantModifier
from llmcompressor_moe.forecast import Step, forecast
from llmcompressor_moe.recipe_file import read_recipe

WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}


def recipe(directory: Path, modifiers: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(f"default_stage: {{default_modifiers: {{{modifiers}}}}}")
    return path


def last_step(model: Path, directory: Path, modifiers: str) -> Step:
    return forecast(model, read_recipe(recipe(directory, modifiers)))[-1]


def written(directory: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())


def test_one_scheme_everywhere_is_foretold_to_the_byte(tmp_path):
    """Attention, shared experts and routed experts, each in a scheme of its own; nothing is left to choose."""
    model = support.saved("qwen2_moe", tmp_path, **WIDE, intermediate_size=128)
    fields = {
        "schemes": ["W4A16"],
        "target_bits": 8.0,
        "attention_scheme": "W8A16",
        "dense_scheme": "FP8_DYNAMIC",
    }
    support.trim(support.load(model), RouterAwareQuantModifier(**fields), output_dir=str(tmp_path / "out"))
    inner = ", ".join(f"{name}: {value}" for name, value in fields.items()).replace("'", "")
    step = last_step(model, tmp_path, f"RouterAwareQuantModifier: {{{inner}}}")
    assert not step.at_most
    assert step.nbytes == written(tmp_path / "out")


def test_a_size_is_kept_and_the_bits_are_those_that_it_leaves(tmp_path):
    model = support.saved(
        "mixtral", tmp_path, num_layers=4, hidden_size=128, intermediate_size=128, head_dim=64
    )
    plain = forecast(model, read_recipe(recipe(tmp_path, "LayerDropModifier: {num_drop: 1}")))[-1].nbytes
    size = plain // 2
    step = last_step(
        model,
        tmp_path,
        f"LayerDropModifier: {{num_drop: 1}}, RouterAwareQuantModifier: {{schemes: [W4A16, W8A16, UNQUANTIZED], "
        f"target_size: {size}}}",
    )
    assert step.at_most and step.nbytes == pytest.approx(size, abs=8)
    slim = RouterAwareQuantModifier(
        schemes=["W4A16", "W8A16", "UNQUANTIZED"], target_size=size, report_path=str(tmp_path / "report.json")
    )
    support.trim(support.load(model), [LayerDropModifier(num_drop=1), slim], output_dir=str(tmp_path / "out"))
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= size
    assert slim._report.mean_bits <= step.bits


def test_what_was_dropped_before_stays_dropped(tmp_path):
    model = support.saved("mixtral", tmp_path)
    once = tmp_path / "once"
    support.trim(support.load(model), LayerDropModifier(layers=[1]), output_dir=str(once), no_data=True)
    twice = tmp_path / "twice"
    support.trim(
        support.load(once), ExpertDropModifier(experts={2: [0, 1]}), output_dir=str(twice), no_data=True
    )
    step = last_step(once, tmp_path, "ExpertDropModifier: {experts: {2: [0, 1]}}")
    assert step.nbytes == written(twice)


@pytest.mark.parametrize(
    "modifiers, words",
    [
        ("LayerDropModifier: {threshold: 0.9}", "threshold"),
        ("ExpertDropModifier: {plan_path: plan.json}", "plan"),
        ("RouterAwareQuantModifier: {plan_path: plan.json}", "plan decides the schemes"),
        ("QuantizationModifier: {targets: [Linear], scheme: W8A8}", "not known from a config"),
        ("LayerDropModifier: {num_drop: 32}", "at least one must stay"),
        ("BlockDropModifier: {num_drop: 31, protect: [0, 1]}", "31 blocks are to go, 30 can"),
        ("RouterAwareQuantModifier: {target_size: 20GiB}", "cannot be smaller than 24.6 GiB"),
        ("RouterAwareQuantModifier: {target_bits: 3.0}", "its smallest scheme takes 4.125"),
        ("RouterAwareQuantModifier: {target_bits: 5, group_size: 96}", "group size 96 does not divide"),
        ("RouterAwareQuantModifier: {target_bits: 5, attention_scheme: W4A61}", "not a preset"),
    ],
)
def test_what_cannot_be_foretold_says_why(modifiers, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        last_step(CONFIGS / "Mixtral-8x7B-v0.1", tmp_path, modifiers)


def test_schemes_that_vllm_cannot_serve_are_refused_as_in_a_run(tmp_path):
    slim = "RouterAwareQuantModifier: {{target_bits: 5, schemes: [MXFP4A16]{}}}"
    with pytest.raises(ValueError, match="cannot serve experts of 'gpt_oss' in MXFP4A16"):
        last_step(CONFIGS / "gpt-oss-20b", tmp_path, slim.format(""))
    step = last_step(CONFIGS / "gpt-oss-20b", tmp_path, slim.format(", servable: false"))
    assert step.nbytes == 13_761_264_768


def test_a_dense_scheme_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"W8A16 does not fit the model's dense FFN and shared experts: .*10944"
    ):
        last_step(
            CONFIGS / "DeepSeek-V2-Lite",
            tmp_path,
            "RouterAwareQuantModifier: {target_bits: 5, dense_scheme: W8A16}",
        )


def test_inspect_shows_the_steps(tmp_path):
    slim = "RouterAwareQuantModifier: {target_size: 3GiB}"
    path = recipe(tmp_path, f"ExpertDropModifier: {{num_drop: 24}}, {slim}")
    result = run("inspect", CONFIGS / "OLMoE-1B-7B-0924", "--recipe", path)
    assert result.exit_code == 0
    for words in ("ExpertDrop: 24 of 64 experts per layer", "8.39 GiB", "at most 3 GiB"):
        assert words in result.output, words
    result = run("inspect", CONFIGS / "OLMoE-1B-7B-0924", "--recipe", recipe(tmp_path, slim))
    assert result.exit_code == 2
    assert "Raise the budget, or drop more before" in result.output
