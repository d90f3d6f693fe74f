"""From MoE to dense: exact where it can be, stock where it is read, refused where nothing fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from support import files_that_tell, load, saved, token_ids, tokenizer, trim
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from llmcompressor_moe import BlockDropModifier, LayerDropModifier, load_trimmed_moe
from llmcompressor_moe.cli import app
from llmcompressor_moe.demo import DEMO_MODEL, calibration_dataset, heldout_rows
from llmcompressor_moe.evaluation import perplexity
from llmcompressor_moe.loading import load_model, load_tokenizer
from llmcompressor_moe.recovery.dense import (
    NoSiblingError,
    brief_training,
    random_start,
    to_dense,
)
from llmcompressor_moe.recovery.dense.merging import average, refitted_down, widened
from llmcompressor_moe.recovery.dense.parts import FeedForward
from llmcompressor_moe.topology import find_topology

SHORT = {"dtype": "float32", "num_samples": 8, "sequence_length": 48}

# What makes the router's weights add up to a constant, without which no dense model can equal the MoE.
NORMALIZED = {"norm_topk_prob": True}
# Scaled down as in released models; tiny ones take fp32 noise far otherwise.
GRANITE = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
SIBLINGS = {
    "mixtral": ("mistral", {}),
    "qwen3_moe": ("qwen3", NORMALIZED | {"mlp_only_layers": [0]}),
    "qwen2_moe": ("qwen2", NORMALIZED),
    "granitemoe": ("granite", GRANITE),
    "granitemoeshared": ("granite", GRANITE | {"shared_intermediate_size": 32}),
    "flex_olmo": ("olmo2", NORMALIZED),
    "ernie4_5_moe": ("ernie4_5", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_dense", {}),
    "cohere2_moe": ("cohere2", NORMALIZED),
    "dots1": ("qwen3", NORMALIZED),
    "solar_open": ("llama", NORMALIZED),
    "deepseek": ("llama", NORMALIZED),
    "qwen3_5_moe_text": ("qwen3_5_text", {}),
    "deepseek_v2": ("deepseek_v2", {"n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("deepseek_v3", NORMALIZED),
    "olmoe": ("olmoe", NORMALIZED),
}

# Their sibling is their own class, with one expert in each layer.
ONE_EXPERT = {"olmoe"}


@torch.no_grad()
def equal_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Every expert the first one; gates of shared experts half open, unnormalized routers undecided."""
    for layer in find_topology(model).moe_layers.values():
        for parameter in model.get_submodule(layer.experts).parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        if model.config.model_type == "deepseek_v2":
            model.get_submodule(layer.router).weight.zero_()
        for name, child in model.get_submodule(layer.module).named_children():
            if name.endswith("shared_expert_gate"):
                child.weight.zero_()
    return model


def write(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Calibration text in the words of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(f"t{i}" for i in row) for row in token_ids(32, 50).tolist()))
    return str(path)


def stock(path: Path) -> PreTrainedModel:
    """Loaded as anybody would, nothing missing and nothing left over."""
    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def difference(one: nn.Module, other: nn.Module, length: int = 60) -> float:
    ids = token_ids(2, length, seed=3)
    with torch.no_grad():
        return float((one(input_ids=ids).logits - other(input_ids=ids).logits).abs().max())


@pytest.mark.parametrize("family", SIBLINGS)
def test_the_sibling_of_equal_experts_is_exact(family: str, tmp_path: Path, text: str):
    sibling, options = SIBLINGS[family]
    moe = equal_experts(tiny_models.build(family, num_layers=4, **options))
    source = write(moe, tmp_path / "moe")
    summary = to_dense(source, tmp_path / "dense", method="average", dataset=text, **SHORT)
    dense = stock(tmp_path / "dense")
    assert summary.sibling == sibling == dense.config.model_type
    assert (family in ONE_EXPERT) == any("expert" in name for name, _ in dense.named_parameters())
    assert summary.parameters_after < summary.parameters_before
    # Longer than the families' sliding windows. DeepSeek rotates in complex numbers.
    assert difference(moe, dense) < 1e-5 * (10 if family.startswith("deepseek") else 1) * spread(moe)


def spread(model: nn.Module) -> float:
    """At least 1: logits of tiny random models reach tens, where fp32 keeps no 1e-5."""
    with torch.no_grad():
        return max(1.0, float(model(input_ids=token_ids(2, 60, seed=3)).logits.abs().max()))


def test_a_window_in_all_blocks_stays_in_all_blocks(tmp_path: Path, text: str):
    window = {"use_sliding_window": True, "sliding_window": 8}
    moe = equal_experts(tiny_models.build("qwen3_moe", num_layers=3, **NORMALIZED, **window))
    source = write(moe, tmp_path / "moe")
    to_dense(source, tmp_path / "dense", method="average", dataset=text, **SHORT)
    assert difference(moe, stock(tmp_path / "dense")) < 1e-5 * spread(moe)


@pytest.mark.parametrize("method", ["average", "uniform"])
def test_averages_are_those_of_the_weights(method: str, tmp_path: Path, text: str):
    source = saved("mixtral", tmp_path)
    to_dense(source, tmp_path / "dense", method=method, dataset=text, **SHORT)
    moe, dense = AutoModelForCausalLM.from_pretrained(source), stock(tmp_path / "dense")
    shares = []
    handle = moe.model.layers[1].mlp.gate.register_forward_hook(lambda m, a, out: shares.append(out))
    rows = [f"{line} t2" for line in Path(text).read_text().split("\n\n")]
    ids = tokenizer()(" ".join(rows))["input_ids"]
    rows = [ids[start : start + 48] for start in range(0, len(ids) - 47, 48)]
    rows = [rows[index * len(rows) // 8] for index in range(8)]
    with torch.no_grad():
        for row in rows:
            moe(input_ids=torch.tensor([row]))
    handle.remove()
    use = torch.zeros(8)
    for _, weights, chosen in shares:
        use.index_add_(0, chosen.flatten(), weights.flatten().float())
    share = use / use.sum() if method == "average" else torch.full((8,), 1 / 8)
    down = (share[:, None, None] * moe.model.layers[1].mlp.experts.down_proj).sum(0)
    assert torch.allclose(dense.model.layers[1].mlp.down_proj.weight, down, atol=1e-5)


def test_all_neurons_of_equal_experts_are_the_layer(tmp_path: Path, text: str):
    moe = equal_experts(tiny_models.build("mixtral", num_layers=2))
    source = write(moe, tmp_path / "moe")
    summary = to_dense(source, tmp_path / "dense", width=600, refit=False, dataset=text, **SHORT)
    assert summary.chosen == {0: [64] * 8, 1: [64] * 8}
    # 512 neurons in all; the rest puts out nothing.
    assert summary.padded == [0, 1]
    assert difference(moe, stock(tmp_path / "dense")) < 1e-4


def test_useful_neurons_stay(tmp_path: Path, text: str):
    moe = tiny_models.build("mixtral", num_layers=2)
    useful = torch.tensor([3, 17, 40])
    with torch.no_grad():
        for layer in moe.model.layers:
            mask = torch.full((64,), 1e-3)
            mask[useful] = 1.0
            layer.mlp.experts.down_proj[1:] *= 1e-3
            layer.mlp.experts.down_proj[0] *= mask
    source = write(moe, tmp_path / "moe")
    summary = to_dense(source, tmp_path / "dense", width=3, refit=False, dataset=text, **SHORT)
    assert summary.chosen == {0: [3, *[0] * 7], 1: [3, *[0] * 7]}
    gate = stock(tmp_path / "dense").model.layers[0].mlp.gate_proj.weight
    assert torch.equal(gate, moe.model.layers[0].mlp.experts.gate_up_proj[0, :64][useful])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_shared_experts_stay_whole(family: str, tmp_path: Path, text: str):
    source = saved(family, tmp_path)
    summary = to_dense(source, tmp_path / "dense", width=80, refit=False, dataset=text, **SHORT)
    assert {sum(counts) for counts in summary.chosen.values()} == {16}
    moe, dense = AutoModelForCausalLM.from_pretrained(source), stock(tmp_path / "dense")
    shared = moe.model.layers[2].mlp
    shared = shared.shared_expert if family == "qwen2_moe" else shared.shared_experts
    mlp = dense.model.layers[2].mlp
    assert torch.equal(mlp.up_proj.weight[16:], shared.up_proj.weight)
    # The scale is one number: 1 where the layer just adds, the mean gate where a sigmoid scales.
    ratio = mlp.down_proj.weight[:, 16:] / shared.down_proj.weight
    assert float(ratio.detach().std()) < 1e-4
    mean = float(ratio.detach().mean())
    assert mean == pytest.approx(1.0, abs=1e-4) if family == "deepseek_v2" else 0.1 < mean < 0.9


def test_dense_and_dropped_layers(tmp_path: Path, text: str):
    base = saved("mixtral", tmp_path / "base", num_layers=4)
    moe = trim(
        load(base),
        [BlockDropModifier(blocks=[1]), LayerDropModifier(layers=[3])],
        no_data=True,
    )
    source = write(moe, tmp_path / "moe")
    summary = to_dense(source, tmp_path / "dense", dataset=text, **SHORT)
    assert summary.padded == [2]
    dense = stock(tmp_path / "dense")
    assert dense.config.num_hidden_layers == 3
    assert not dense.model.layers[2].mlp.down_proj.weight.any()
    assert dense.model.layers[2].mlp.gate_proj.weight.any()


def test_narrow_dense_blocks_are_widened_and_stay_what_they_were(tmp_path: Path, text: str):
    moe = equal_experts(
        tiny_models.build("qwen3_moe", num_layers=3, mlp_only_layers=[1], intermediate_size=24, **NORMALIZED)
    )
    source = write(moe, tmp_path / "moe")
    summary = to_dense(source, tmp_path / "dense", method="average", dataset=text, **SHORT)
    assert (summary.width, summary.padded) == (64, [1])
    assert difference(moe, stock(tmp_path / "dense")) < 1e-4


def test_refit_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    inner, wanted = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    start = torch.randn(4, 6, generator=generator)
    gram = inner.T @ inner
    found = refitted_down(gram, inner.T @ (wanted - inner @ start.T), start, ridge=0.3)
    # The penalty as further rows of an ordinary least squares problem.
    root = (0.3 * gram.diagonal().mean()).sqrt() * torch.eye(6)
    rows, targets = torch.cat([inner, root]), torch.cat([wanted, root @ start.T])
    assert torch.allclose(found, torch.linalg.lstsq(rows, targets).solution.T, atol=1e-5)


def test_refit_refuses_broken_sums():
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        refitted_down(torch.full((2, 2), torch.nan), torch.zeros(2, 3), torch.zeros(3, 2))


def test_widened_neurons_can_learn():
    ffn = FeedForward(torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, 4))
    wide = widened(ffn, 6, torch.Generator().manual_seed(0))
    down = wide.down.clone().requires_grad_()
    x = torch.randn(5, 8)
    out = (nn.functional.silu(x @ wide.gate.T) * (x @ wide.up.T)) @ down.T
    assert torch.allclose(out, (nn.functional.silu(x @ ffn.gate.T) * (x @ ffn.up.T)) @ ffn.down.T, atol=1e-5)
    out.square().sum().backward()
    assert down.grad[:, 4:].abs().min() > 0
    with pytest.raises(ValueError, match="has 4 neurons"):
        widened(ffn, 3, torch.Generator())


def test_average_refuses_no_use():
    ffn = FeedForward(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="positive share"):
        average([ffn, ffn], [0.0, 0.0])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("phimoe", "its norms have biases"),
        ("glm4_moe", "rotates a part"),
        ("gpt_oss", "sinks"),
        ("minimax_m2", "name tells no dense sibling"),
        ("lfm2_moe", "no feed-forward of gate_proj"),
        ("qwen3_vl_moe", "other parts beside its decoder"),
    ],
)
def test_families_without_a_sibling_are_refused_before_loading(family: str, reason: str, tmp_path: Path):
    source = tmp_path / family
    tiny_models.tiny_config(family).save_pretrained(source)
    with pytest.raises(ValueError, match=reason):
        to_dense(source, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_no_dense_olmo_has_the_tensors_of_olmoe():
    """Why its sibling is its own class with one expert."""
    ours = set(tiny_models.build("olmoe", num_layers=1).state_dict())
    for name in ("olmo", "olmo2", "olmo3"):
        theirs = set(tiny_models.build(name, num_layers=1).state_dict())
        assert {key for key in ours ^ theirs if "mlp" not in key}, name


def test_one_expert_is_a_whole_feed_forward(tmp_path: Path, text: str):
    moe = tiny_models.build("olmoe", num_layers=3)
    source = write(moe, tmp_path / "moe")
    summary = to_dense(source, tmp_path / "dense", dataset=text, width=100, **SHORT)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"]) == (1, 1, 100)
    assert "one expert per layer" in (tmp_path / "dense" / "README.md").read_text()
    dense = stock(tmp_path / "dense")
    seen: dict[str, torch.Tensor] = {}
    mlp = dense.model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, out: seen.update(given=args[0], out=out))
    with torch.no_grad():
        dense(input_ids=token_ids(1, 20))
        gate, up = (seen["given"] @ mlp.experts.gate_up_proj[0].T).chunk(2, dim=-1)
        expected = (nn.functional.silu(gate) * up) @ mlp.experts.down_proj[0].T
    assert summary.width == 100 and expected.shape == (1, 20, 64)
    torch.testing.assert_close(seen["out"], expected)


def test_a_sibling_that_computes_something_else_is_found_out(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
):
    from llmcompressor_moe.recovery.dense import siblings

    monkeypatch.setitem(siblings._TABLE, "granitemoe", siblings._Entry("llama"))
    source = saved("granitemoe", tmp_path, embedding_multiplier=3.0, residual_multiplier=0.4)
    with pytest.raises(NoSiblingError, match="computes something else"):
        to_dense(source, tmp_path / "dense", dataset=text, **SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["granitemoe"]


BAD = {
    "method": ({"method": "best"}, "method='best'"),
    "width": ({"width": 0}, "width=0"),
    "width of an average": ({"method": "average", "width": 64}, "width=64"),
    "samples": ({"num_samples": 0}, "num_samples=0"),
    "positions": ({"sequence_length": 4096}, "sequence_length=4096"),
    "dtype": ({"dtype": "int4"}, "dtype='int4'"),
    "device": ({"device": "warp"}, "device='warp'"),
    "data": ({"dataset": "missing.txt"}, "missing.txt"),
}


@pytest.mark.parametrize(("options", "named"), BAD.values(), ids=BAD)
def test_bad_arguments(options: dict, named: str, tmp_path: Path):
    with pytest.raises(ValueError, match=named):
        to_dense(DEMO_MODEL, tmp_path / "dense", **options)
    assert not any(tmp_path.iterdir())


def test_bad_places(tmp_path: Path):
    with pytest.raises(ValueError, match="the model itself"):
        to_dense(DEMO_MODEL, DEMO_MODEL)
    (tmp_path / "trimming.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a trimmed model"):
        to_dense(DEMO_MODEL, tmp_path)
    source = saved("qwen2_moe", tmp_path)
    with pytest.raises(ValueError, match="64 neurons, which stay"):
        to_dense(source, tmp_path / "dense", width=64)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model made dense, at the same width twice."""
    folder = tmp_path_factory.mktemp("demo")
    for method in ("neurons", "uniform"):
        width = 128 if method == "neurons" else None
        to_dense(DEMO_MODEL, folder / method, method=method, width=width, num_samples=24)
    return {method: folder / method for method in ("neurons", "uniform")}


def test_command_writes_a_plain_checkpoint_in_bf16(tmp_path: Path):
    out = tmp_path / "dense"
    run = CliRunner().invoke(
        app,
        ["densify", "--output", str(out), "--width", "64", "--num-samples", "8", "--sequence-length", "64"],
    )
    assert run.exit_code == 0, run.output
    assert "mixtral -> mistral, 64 neurons" in run.output
    assert stock(out).dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] is None
    assert json.loads((out / "dense.json").read_text())["method"] == "neurons"
    assert not files_that_tell(out)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == load_tokenizer(DEMO_MODEL).get_vocab()
    with load_trimmed_moe():
        stock(out)


def test_command_ends_with_one_line(tmp_path: Path):
    run = CliRunner().invoke(app, ["densify", "--output", str(tmp_path / "dense"), "--method", "best"])
    assert run.exit_code == 2
    assert "method='best'" in run.output


def test_neurons_beat_the_average_and_a_random_start(demo: dict[str, Path]):
    teacher, words = load_model(DEMO_MODEL, "float32").eval(), load_tokenizer(DEMO_MODEL)
    rows = calibration_dataset(words, 64, 64)["input_ids"]
    heldout = heldout_rows(words, 64)[::32]
    starts = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in demo.items()}
    starts["random"] = random_start(demo["neurons"])
    curves = {
        name: brief_training(student, teacher, rows, heldout, steps=40, batch_size=4)
        for name, student in starts.items()
    }
    first = {name: curve.nll[0] for name, curve in curves.items()}
    last = {name: curve.last for name, curve in curves.items()}
    assert first["neurons"] < first["uniform"] - 1
    assert last["neurons"] < last["uniform"] - 0.1
    assert last["uniform"] < last["random"] - 0.1
    assert curves["neurons"].last < curves["neurons"].nll[0]


def test_refit_pays(demo: dict[str, Path], tmp_path: Path):
    to_dense(DEMO_MODEL, tmp_path / "plain", width=128, refit=False, num_samples=24)
    rows = torch.tensor(heldout_rows(load_tokenizer(DEMO_MODEL), 128)[::16])
    fitted, plain = (perplexity(stock(path), rows) for path in (demo["neurons"], tmp_path / "plain"))
    assert fitted < 0.6 * plain
