"""Checkpoints cut by hand load in `load_trimmed_moe` and compute what the uncut model does with those parts "
"off."""

import json
import pathlib
import shutil
from collections.abc import Callable
from hashlib import sha256

import pytest
import tiny_models
import torch
from cut_by_hand import EXPERTS, REMOVED, Cut, load, logits
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import get_linearized_moes, load_quantizable_moe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier, load_trimmed_moe, open_moe
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.surgery.skipped import SkippedMoE
from llmcompressor_moe.topology import expert_modules, find_topology


@pytest.fixture(scope="module", params=tiny_models.buildable())
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return Cut(request.param, tmp_path_factory.mktemp(request.param))


def test_cut_checkpoint_computes_what_the_uncut_model_does_without_those_parts(
    cut: Cut, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    with cut.off(cut.model, monkeypatch):
        expected = logits(cut.model)
    assert (expected - logits(cut.model)).abs().max() > 0.05
    path = cut.write(cut.whole, tmp_path / "cut")
    with pytest.raises(Exception, match=r"per-layer attribute|per_layer|mismatched"):
        load(path)

    with load_trimmed_moe():
        model, info = load(path)
    assert not any(info.values()), info
    # Rounding of sums differs by machine, in steps of the largest values.
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits(model), expected, atol=1e-5 * scale, rtol=1e-5)

    model.save_pretrained(tmp_path / "again")
    assert "allow_global_per_layer_attribute_access" not in (tmp_path / "again" / "config.json").read_text()
    with pytest.raises(Exception, match=r"per-layer attribute|per_layer|mismatched"):
        load(tmp_path / "again")
    with load_trimmed_moe():
        again, info = load(tmp_path / "again")
    assert not any(info.values()), info
    torch.testing.assert_close(logits(again), logits(model), atol=0, rtol=0)


def test_opened_checkpoint_is_cut_to_the_same_bytes(cut: Cut, tmp_path: pathlib.Path) -> None:
    opened = open_moe(cut.whole)
    opened.set_attn_implementation("eager")
    torch.testing.assert_close(logits(opened), logits(cut.model), atol=2e-4, rtol=1e-5)
    released = as_released(cut.whole, tmp_path / "released")
    before = hashes(released)
    recipe = [ExpertDropModifier(experts={cut.fewer: REMOVED})]
    if cut.dropped is not None:
        recipe.append(LayerDropModifier(layers=[cut.dropped]))
    model = open_moe(released)
    exception = exception_for(find_topology(model).model_type)
    if exception.refuse_expert_drop or exception.refuse_uneven or exception.refuse_layer_drop:
        with pytest.raises(ValueError, match=r"cannot trim|must leave every layer"):
            oneshot(model=model, recipe=recipe)
        return
    oneshot(model=model, recipe=recipe, output_dir=str(tmp_path / "out"))
    assert hashes(tmp_path / "out") == hashes(cut.write(released, tmp_path / "by-hand"))
    assert hashes(released) == before
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"


def as_released(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """The checkpoint in bfloat16 with vectors (score corrections, sinks, decays) in float32, and a processor."""
    shutil.copytree(source, target)
    tensors = {
        name: tensor.bfloat16() if tensor.ndim > 1 and tensor.is_floating_point() else tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    for level in (config, config.get("text_config", {})):
        level["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config))
    (target / "preprocessor_config.json").write_text("{}")
    return target


def hashes(directory: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Tensor -> dtype, shape and hash of its bytes."""
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), sha256(bytes_of(tensor)).hexdigest())
        for name, tensor in load_file(directory / "model.safetensors").items()
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_family_is_built_or_says_why_not() -> None:
    named = {family.model_type for family in tiny_models.families()}
    assert len(named) > 50
    assert set(tiny_models.unbuildable()) <= named
    assert set(tiny_models.buildable()) | set(tiny_models.unbuildable()) == named


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("plain")
    tiny_models.build("mixtral").save_pretrained(path)
    return path


@pytest.fixture
def rewrite(mixtral: pathlib.Path, tmp_path: pathlib.Path) -> Callable[[dict], pathlib.Path]:
    """Give the plain Mixtral a `per_layer_config` without touching its tensors."""

    def write(per_layer: dict) -> pathlib.Path:
        config = json.loads((mixtral / "config.json").read_text()) | {"per_layer_config": per_layer}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").symlink_to(mixtral / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("per_layer", "message"),
    [
        ({"1": {"skip": ["attention"]}}, r"\[.attention.\]; only \"mlp\""),
        ({"1": {"num_local_experts": 0}}, r"num_local_experts is 0; it must be a whole number above 0"),
        ({"1": {"num_local_experts": 2.5}}, r"num_local_experts.*2\.5"),
        ({"1": {"num_local_experts": -3, "skip": ["mlp"]}}, r"num_local_experts is -3"),
        ({"1": {"num_local_experts": 1}}, r"num_local_experts is 1, fewer than the 2"),
        ({"4": {"skip": ["mlp"]}}, r"range \[0, 4\).*\[4\]"),
        ({"x": {"skip": ["mlp"]}}, r"'x'"),
    ],
)
def test_config_that_cannot_be_meant_is_refused(
    rewrite: Callable[[dict], pathlib.Path], per_layer: dict, message: str
) -> None:
    path = rewrite(per_layer)
    with load_trimmed_moe(), pytest.raises(Exception, match=message):
        load(path)


@pytest.mark.parametrize("override", [{"skip": ["mlp"], "n_routed_experts": 0}, {"n_routed_experts": 6}])
def test_dense_layer_is_no_moe(tmp_path: pathlib.Path, override: dict) -> None:
    tiny_models.build("deepseek_v3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"per_layer_config": {"0": override}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with load_trimmed_moe(), pytest.raises(ValueError, match=r"DeepseekV3DecoderLayer\) has no MoE"):
        load(tmp_path)


def test_experts_that_do_not_divide_into_groups_are_refused() -> None:
    config = tiny_models.tiny_config("deepseek_v3", per_layer_config={"1": {"n_routed_experts": 5}})
    with load_trimmed_moe(), pytest.raises(ValueError, match=r"n_routed_experts is 5.*2 groups"):
        AutoModelForCausalLM.from_config(config)


def test_family_with_experts_in_the_block_cannot_skip_them() -> None:
    config = tiny_models.tiny_config("gemma4_text")
    config.per_layer_config = {"0": {"skip": ["mlp"], "num_experts": 0}}
    with load_trimmed_moe(), pytest.raises(ValueError, match=r"Gemma4TextDecoderLayer keeps its router"):
        AutoModelForCausalLM.from_config(config)


def test_builds_from_a_config_by_auto_class_and_by_model_class() -> None:
    config = tiny_models.tiny_config(
        "mixtral",
        per_layer_config={"1": {"skip": ["mlp"], "num_local_experts": 0}, "2": {"num_local_experts": 5}},
    )
    with load_trimmed_moe():
        for model in (AutoModelForCausalLM.from_config(config), MixtralForCausalLM(config)):
            blocks = model.model.layers
            assert isinstance(blocks[1].mlp, SkippedMoE) and not list(blocks[1].mlp.parameters())
            assert [blocks[i].mlp.experts.down_proj.shape[0] for i in (0, 2, 3)] == [EXPERTS, 5, EXPERTS]
            # attention follows what is set on the model later
            assert blocks[1].self_attn.config is blocks[2].self_attn.config is model.config


def test_model_with_every_moe_dropped_is_only_attention() -> None:
    per_layer = {str(i): {"skip": ["mlp"], "num_local_experts": 0} for i in range(4)}
    with load_trimmed_moe():
        model = AutoModelForCausalLM.from_config(
            tiny_models.tiny_config("mixtral", per_layer_config=per_layer)
        )
    assert all(isinstance(block.mlp, SkippedMoE) for block in model.model.layers)
    assert logits(model).isfinite().all()


def test_plain_checkpoint_loads_as_it_does_outside(mixtral: pathlib.Path) -> None:
    outside, _ = load(mixtral)
    with load_trimmed_moe():
        inside, info = load(mixtral)
    assert not any(info.values())
    assert [type(m) for m in inside.modules()] == [type(m) for m in outside.modules()]
    torch.testing.assert_close(logits(inside), logits(outside), atol=0, rtol=0)


def test_load_balancing_loss_reads_the_general_count() -> None:
    config = tiny_models.tiny_config(
        "mixtral",
        per_layer_config={"3": {"skip": ["mlp"], "num_local_experts": 0}},
        output_router_logits=True,
    )
    with load_trimmed_moe():
        model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(3, 15)[None]
    assert model(input_ids=ids, labels=ids).aux_loss > 0


def test_classes_are_as_before_after_the_context_and_after_an_error(
    rewrite: Callable[[dict], pathlib.Path],
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    def state() -> list:
        return [PreTrainedModel.__init__, PreTrainedModel.post_init, MixtralDecoderLayer.__init__]

    before = state()
    path = rewrite({"1": {"num_local_experts": 1}})
    with pytest.raises(ValueError, match="fewer than"), load_trimmed_moe(), load_trimmed_moe():
        load(path)
    assert state() == before
    with load_trimmed_moe():
        with load_trimmed_moe():
            pass
        # the inner context must not end what the outer one began
        model = AutoModelForCausalLM.from_config(
            tiny_models.tiny_config("mixtral", per_layer_config={"2": {"num_local_experts": 5}})
        )
        assert model.model.layers[2].mlp.experts.down_proj.shape[0] == 5
    assert state() == before


def test_missing_tensors_are_reported_not_invented(mixtral: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A count in the config that the tensors do not have fails instead of loading part of them."""
    config = json.loads((mixtral / "config.json").read_text())
    config["per_layer_config"] = {"1": {"num_local_experts": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(mixtral / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.7.w1.weight" in load_file(mixtral / "model.safetensors")
    with load_trimmed_moe(), pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path)


def test_loads_with_linear_experts_for_calibration(tmp_path: pathlib.Path) -> None:
    """Together with llm-compressor's own context."""
    cut = Cut("mixtral", tmp_path)
    path = cut.write(cut.whole, tmp_path / "cut")
    with load_trimmed_moe():
        fused, _ = load(path)
        with load_quantizable_moe():
            linear = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert [len(expert_modules(experts)) for _, experts in get_linearized_moes(linear)] == [8, 8, 6]
    torch.testing.assert_close(logits(linear), logits(fused), atol=1e-5, rtol=1e-5)
