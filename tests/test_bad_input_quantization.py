"""Every kind of bad input to RouterAwareQuantModifier, from Python, YAML and the command line: an error that
names the field, the value and the way out, before the model has seen any data, and nothing left behind.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from loguru import logger
from safetensors.torch import load_file
from test_bad_input import Watched
from test_cli import compress, recipe, run
from transformers import AutoModelForCausalLM, LlamaConfig

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe import RouterAwareQuantModifier as Quant
from llmcompressor_moe.modifiers.composition import check_recipe
from llmcompressor_moe.quantization.allocation import Option, allocate
from llmcompressor_moe.quantization.routers import check_routers
from llmcompressor_moe.quantization.schemes import resolve_scheme, why_vllm_cannot_serve
from llmcompressor_moe.report import PlanFileError

G32 = {"group_size": 32}
NO_DATA = {"sensitivity": "random"}
ATTENTION = r"re:.*self_attn\.[qkvo]_proj$"
PRESETS = "is not a preset of compressed-tensors; there are FP8, .*W4A16.*Other schemes are written out"


def weights(**fields: Any) -> dict[str, Any]:
    """A written-out scheme of four-bit integers with one scale per channel, but for ``fields``."""
    return {"x": {"weights": {"num_bits": 4, "strategy": "channel", **fields}}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def plans(directory: Path) -> Path:
    """Reports of a mixtral: one scheme per layer, one per expert, one with static inputs, and a drop's."""
    base = support.saved("mixtral", directory)
    folder = directory / "plans"
    for name, data, modifier in (
        ("layer", False, Quant(target_bits=7, **NO_DATA, **G32, report_path=str(folder / "layer.json"))),
        (
            "expert",
            False,
            Quant(
                target_bits=7, granularity="expert", **NO_DATA, **G32, report_path=str(folder / "expert.json")
            ),
        ),
        ("static", True, Quant(schemes=["FP8"], target_bits=9, report_path=str(folder / "static.json"))),
        ("drop", False, LayerDropModifier(layers=[1], report_path=str(folder / "drop.json"))),
    ):
        support.trim(support.load(base), modifier, no_data=not data)
        assert (folder / f"{name}.json").exists()
    return folder


@pytest.fixture(scope="module")
def quantized(directory: Path) -> Path:
    """A checkpoint that this modifier has quantized already."""
    modifier = Quant(target_bits=7, **NO_DATA, **G32)
    model = support.load(support.saved("mixtral", directory))
    support.trim(model, modifier, no_data=True, output_dir=str(directory / "quantized"))
    return directory / "quantized"


@pytest.fixture
def mixtral(directory: Path) -> Watched:
    return Watched(support.load(support.saved("mixtral", directory)))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(
    watched: Watched, recipe: Any, message: str, folder: Path, *, passes: int | None = 0, **options: Any
) -> str:
    """The error, which is ours and comes before any forward pass; files and weights are as they were."""
    files = listing(folder)
    values = {name: value.clone() for name, value in watched.model.state_dict().items()}
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as caught:
        support.trim(watched.model, recipe, output_dir=str(folder / "out"), **options)
    if passes is not None:
        assert watched.passes == passes, "the error must come before calibration"
    assert listing(folder) == files
    # Experts are taken apart before any modifier is asked; what keeps its name keeps its value.
    after = watched.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in values.items() if name in after)
    assert not any(name.endswith(("_scale", "_zero_point", "_observer")) for name in after)
    return str(caught.value)


# Fields, when the recipe is read


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of target_bits, target_size, plan_path; got none"),
        ({"target_bits": 5, "target_size": "1GB"}, "got target_bits and target_size"),
        ({"target_bits": 5, "plan_path": "p.json"}, "got target_bits and plan_path"),
        ({"target_size": 5, "plan_path": "p.json"}, "got target_size and plan_path"),
        ({"target_bits": 0}, r"target_bits=0\.0 must lie between 0 and 32"),
        ({"target_bits": -4.5}, r"target_bits=-4\.5 must lie between 0 and 32"),
        ({"target_bits": 33}, r"target_bits=33\.0 must lie between 0 and 32"),
        ({"target_bits": float("nan")}, "target_bits=nan must lie between 0 and 32"),
        ({"target_bits": float("inf")}, "target_bits=inf must lie between 0 and 32"),
        ({"target_bits": "few"}, "target_bits\n.*valid number.*'few'"),
        ({"target_size": "20GB!!"}, "target_size='20GB!!' is not a size; .*such as '20GiB'"),
        ({"target_size": ""}, "target_size='' is not a size"),
        ({"target_size": "nan"}, "target_size='nan' is not a size"),
        ({"target_size": float("nan")}, "target_size.*finite number"),
        ({"target_size": -5}, "target_size=-5 is not a size"),
        ({"target_size": "-5GB"}, "target_size='-5GB' is not a size"),
        ({"target_size": 0}, "target_size=0 must be at least one byte"),
        ({"target_size": "0.2B"}, "target_size='0.2B' must be at least one byte"),
    ],
    ids=str,
)
def test_budgets_that_are_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        Quant(**fields)


def test_a_size_beyond_every_float_is_a_number_like_others() -> None:
    assert Quant(target_size="9" * 400)._asked.target_size == int("9" * 400)
    assert Quant(target_size="1.1 KB")._asked.target_size == 1100


@pytest.mark.parametrize("field", ["schemes", "attention_scheme", "dense_scheme", "router"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("W5A99", f"'W5A99' {PRESETS}"),
        ("", f"'' {PRESETS}"),
        ({}, "{} must be one name with the scheme's fields below it"),
        ({"a": {}, "b": {}}, "must be one name"),
        ({"a": {}}, "a has no weights to quantize; for 16 bit name UNQUANTIZED"),
        ({"a": {"weights": None}}, "a has no weights to quantize"),
        ({"a": {"wieghts": {}}}, "a is not a scheme that compressed-tensors knows: wieghts={}: Extra"),
        ({"weights": {"num_bits": 4}}, "num_bits=4: Extra inputs are not permitted"),
        ({" ": {"weights": {"num_bits": 4}}}, "' ' is not a name for a scheme"),
        (
            {"unquantized": {"weights": {"num_bits": 4}}},
            "'unquantized' is not a name for a scheme that quant",
        ),
        (weights(num_bits="four"), r"weights\.num_bits='four'.*valid integer"),
        (weights(num_bits=0), r"x: weights\.num_bits=0: integers must have 2 to 8 bits"),
        (weights(num_bits=-4), r"weights\.num_bits=-4: integers must have 2 to 8 bits"),
        (weights(num_bits=1), r"weights\.num_bits=1: integers must have 2 to 8 bits"),
        (weights(num_bits=16), r"weights\.num_bits=16: integers must have 2 to 8 bits"),
        (weights(type="float", num_bits=3), "x is not a scheme that compressed-tensors knows: .*num_bits"),
        (weights(type="float"), r"weights\.strategy='channel': 4-bit floats are stored in groups only"),
        (
            weights(type="float", strategy="group", group_size=64),
            r"weights\.group_size=64: 4-bit floats are stored in groups of 16 or 32",
        ),
        (
            weights(strategy="group", group_size=0),
            "group_size.: 0.*requires group_size to be set to a positive",
        ),
        (weights(strategy="group", group_size=-7), r"group_size=-7.*Invalid group size -7"),
        (weights(strategy="group"), "requires group_size to be set"),
        (
            weights(strategy="attn_head"),
            r"weights\.strategy='attn_head' is not for weights; use one of group",
        ),
        (weights(strategy="nope"), "'nope' is not a valid QuantizationStrategy"),
        (weights(dynamic=True, strategy="token"), r"weights\.strategy='token' is not for weights"),
        (weights(dynamic=True, strategy="tensor"), r"weights\.dynamic=True: weights are rounded once"),
        (weights(observer="gut"), r"weights\.observer='gut' is unknown; there are memoryless-minmax"),
        (
            {"x": {**weights()["x"], "input_activations": {"num_bits": 8, "observer": "gut"}}},
            r"input_activations\.observer='gut' is unknown",
        ),
        (
            {"x": {**weights()["x"], "input_activations": {"num_bits": 12}}},
            r"input_activations\.num_bits=12: integers must have 2 to 8 bits",
        ),
        (
            {"x": {**weights()["x"], "output_activations": {"num_bits": 8}}},
            r"x: leave out output_activations=\{'num_bits': 8\}; outputs .* are not quantized",
        ),
        ({"x": {**weights()["x"], "kv_cache_scheme": {"num_bits": 8}}}, "kv_cache_scheme=.*not permitted"),
        ({"x": {**weights()["x"], "targets": ["Linear"]}}, r"leave out targets=\['Linear'\]; the modifier"),
        ({"x": {**weights()["x"], "format": "dense"}}, "leave out format='dense'"),
    ],
    ids=str,
)
def test_schemes_that_are_none(field: str, spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(rf"{field}: .*{message}", re.DOTALL)):
        Quant(target_bits=5, **{field: [spec] if field == "schemes" else spec})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schemes": []}, r"schemes=\[\] must name at least one scheme"),
        ({"schemes": "W4A16"}, "schemes\n.*valid list"),
        ({"schemes": [4]}, r"schemes\.0.*valid string"),
        ({"schemes": ["W4A16", "w4a16"]}, r"schemes=\['W4A16', 'W4A16'\] names a scheme twice"),
        ({"schemes": [weights(), weights(num_bits=8)]}, r"schemes=\['x', 'x'\] names a scheme twice"),
        ({"schemes": ["UNQUANTIZED"]}, r"schemes=\['UNQUANTIZED'\] quantizes nothing; name a scheme"),
        ({"attention_scheme": ["W4A16"]}, "attention_scheme.*valid string"),
        ({"group_size": 0}, "group_size\n.*greater than or equal to 1"),
        ({"group_size": -32}, "group_size\n.*greater than or equal to 1"),
        ({"group_size": 64.5}, "group_size\n.*valid integer"),
        ({"algorithm": "autoround"}, "algorithm\n.*'rtn', 'gptq' or 'awq'.*'autoround'"),
        (
            {"sensitivity": "gut"},
            "sensitivity='gut' is unknown; there are output_error, frequency, weight_error",
        ),
        ({"granularity": "block"}, "granularity\n.*'layer' or 'expert'.*'block'"),
        ({"sample_tokens": 0}, "sample_tokens\n.*greater than or equal to 1.*input_value=0"),
        ({"sample_tokens": -3}, "sample_tokens\n.*greater than or equal to 1.*input_value=-3"),
        ({"max_routing_change": 1.01}, "max_routing_change\n.*less than or equal to 1.*input_value=1.01"),
        ({"max_routing_change": -0.1}, "max_routing_change\n.*greater than or equal to 0"),
        ({"max_routing_change": float("nan")}, "max_routing_change\n"),
        ({"seed": "today"}, "seed\n.*valid integer.*'today'"),
        ({"seed": 1.5}, "seed\n.*valid integer"),
        ({"servable": "perhaps"}, "servable\n.*valid boolean"),
        ({"ignore": "lm_head"}, "ignore\n.*valid list"),
        ({"ignore": ["re:["]}, r"ignore: 're:\[' is not a regular expression: unterminated character set"),
        ({"report_path": "report.txt"}, r"report_path='report\.txt' must end with \.json"),
        ({"report_path": 3}, "report_path\n.*valid string"),
        ({"scheme": ["W4A16"]}, r"scheme\n.*not permitted"),
    ],
    ids=str,
)
def test_other_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        Quant(**{"target_bits": 5, **fields})


FLOAT8 = {"num_bits": 8, "type": "float"}
TOKEN8 = {"num_bits": 8, "strategy": "token", "dynamic": True}
FLOAT_TOKEN8 = {**TOKEN8, "type": "float"}
FLOAT_TENSOR8 = {**FLOAT8, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("args", "inputs", "reason"),
    [
        # `CompressedTensorsMoEMethod.get_moe_method` and the methods' constructors in vLLM 0.32.
        ({"strategy": "channel", "num_bits": 2}, None, None),
        ({"strategy": "channel", "symmetric": False}, None, None),
        ({"strategy": "tensor"}, None, "2 to 8 bits with scales per group or channel"),
        ({"strategy": "block", "block_structure": [16, 16]}, None, "scales per group or channel"),
        ({"strategy": "tensor_group", "group_size": 16}, None, "scales per group or channel"),
        ({"strategy": "channel", "num_bits": 8}, TOKEN8, None),
        ({"strategy": "tensor", "num_bits": 8}, TOKEN8, "only W8A8"),
        ({"strategy": "channel", "num_bits": 8, "symmetric": False}, TOKEN8, "only W8A8"),
        ({"strategy": "channel", "num_bits": 8}, {"num_bits": 8, "strategy": "tensor"}, "only W8A8"),
        ({"strategy": "channel", "num_bits": 6}, TOKEN8, "only W8A8"),
        ({"strategy": "channel"}, {**TOKEN8, "num_bits": 4}, "only W8A8"),
        ({"strategy": "group", "group_size": 64}, TOKEN8, None),
        ({"strategy": "group", "group_size": 128}, FLOAT_TOKEN8, None),
        ({"strategy": "group", "group_size": 64}, FLOAT_TOKEN8, r"W4AFP8 \(groups of 128\)"),
        ({**FLOAT8, "strategy": "channel"}, None, "8-bit float weights need 8-bit float inputs"),
        ({**FLOAT8, "strategy": "group", "group_size": 32}, None, "8-bit float weights need"),
        ({**FLOAT8, "strategy": "channel"}, TOKEN8, "8-bit float weights need 8-bit float inputs"),
        ({**FLOAT8, "strategy": "channel"}, FLOAT_TOKEN8, None),
        ({**FLOAT8, "strategy": "tensor"}, FLOAT_TENSOR8, None),
        ({**FLOAT8, "strategy": "tensor"}, FLOAT_TOKEN8, "must be symmetric, per tensor with inputs per"),
        ({**FLOAT8, "strategy": "channel"}, FLOAT_TENSOR8, "must be symmetric, per tensor with inputs per"),
        ({"type": "float", "strategy": "group", "group_size": 16}, None, "must be MXFP4 .* or NVFP4"),
        ({"type": "float", "strategy": "tensor_group", "group_size": 32}, None, "must be MXFP4 .* or NVFP4"),
        ({"type": "float", "strategy": "tensor_group", "group_size": 16}, FLOAT_TOKEN8, "inputs alike or"),
    ],
    ids=str,
)
def test_what_vllm_has_a_method_for(args: dict[str, Any], inputs: Any, reason: str | None) -> None:
    spec = {"x": {"weights": {"num_bits": 4, **args}, "input_activations": inputs}}
    found = why_vllm_cannot_serve(resolve_scheme(spec, None, "schemes").scheme)
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize(
    ("preset", "servable"),
    [(p, True) for p in ("W4A16", "W8A16", "W2A16", "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC")]
    + [(p, True) for p in ("FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16")]
    + [(p, False) for p in ("W4A4", "W6A8", "W2A8", "W3A4")],
)
def test_presets_that_vllm_has_a_method_for(preset: str, servable: bool) -> None:
    assert (why_vllm_cannot_serve(resolve_scheme(preset, None, "schemes").scheme) is None) == servable


# Budgets that do not fit the model


def smallest_in(message: str) -> str:
    return re.search(r"smallest possible is ([\d.]+)", message)[1]


@pytest.mark.parametrize(
    "schemes",
    [
        ["W4A16", "W8A16"],
        ["W3A16"],
        # 4 + 1 / 2 + 1 / 8 bits with 32-bit scales and packed zero points, which needs more than four digits
        [{"a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}}}],
        [weights(), "UNQUANTIZED"],
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["target_bits", "target_size"])
def test_the_smallest_possible_budget_is_named_and_possible(
    field: str, schemes: list[Any], mixtral: Watched, directory: Path, tmp_path: Path
) -> None:
    fields = {"schemes": schemes, **({} if schemes[0] == "W3A16" else G32), **NO_DATA}
    if schemes[0] == "W3A16":
        fields["group_size"] = 64
    small = 1.5 if field == "target_bits" else "100 KB"
    message = refused(
        mixtral,
        Quant(**{field: small}, **fields),
        rf"{field}=(1\.5|100000 \(97\.7 KiB\)) is impossible with these schemes: the smallest possible is .*"
        rf"Raise {field}.*add a smaller scheme",
        tmp_path,
        no_data=True,
    )
    smallest = smallest_in(message)
    path = tmp_path / "report.json"
    model = support.load(support.saved("mixtral", directory))
    modifier = Quant(**{field: smallest}, **fields, report_path=str(path))
    support.trim(model, modifier, no_data=True, output_dir=str(tmp_path / "out"))
    report = json.loads(path.read_text())
    assert report["mean_bits"] <= float(smallest) * (1 + 1e-9)
    if field == "target_size":
        size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
        assert size <= report["nbytes"] <= int(smallest)


@pytest.mark.parametrize(
    "budget", [{"target_bits": 9.0}, {"target_bits": 32}, {"target_size": "5TB"}], ids=str
)
def test_more_than_everything_is_everything(budget: dict[str, Any], mixtral: Watched) -> None:
    modifier = Quant(**budget, **G32, **NO_DATA)
    support.trim(mixtral.model, modifier, no_data=True)
    assert {plan.scheme for plan in modifier._report.layers.values()} == {"W8A16"}
    assert modifier._report.mean_bits == 9.0


def test_bits_that_no_drop_makes_possible(mixtral: Watched, tmp_path: Path) -> None:
    """Each scheme's bits do not depend on which experts a drop will take, so there is nothing to wait for."""
    recipe = [LayerDropModifier(num_drop=1), ExpertDropModifier(num_drop=2), Quant(target_bits=4.9, **G32)]
    refused(mixtral, recipe, r"target_bits=4\.9 is impossible.*smallest possible is 5 bits", tmp_path)


def test_a_budget_is_not_exceeded_by_the_tolerance_of_a_solver() -> None:
    groups = [[Option(1e10, 1.0), Option(2e10, 0.0)] for _ in range(4)]
    for budget, expected in ((8e10, 4), (8e10 - 10, 3), (6e10 - 1000, 1)):
        chosen = allocate(groups, budget)
        assert sum(chosen) == expected or (budget < 7e10 and sum(chosen) == 1)
        assert sum(options[i].cost for options, i in zip(groups, chosen, strict=True)) <= budget


def test_eight_bit_floats_take_no_more_than_was_promised(directory: Path, tmp_path: Path) -> None:
    """The names of their dtypes are the longest that a header has."""
    spec = {"x": {"weights": {**FLOAT8, "strategy": "group", "group_size": 32}}}
    modifier = Quant(schemes=[spec], target_bits=9, servable=False, **NO_DATA)
    model = support.load(support.saved("mixtral", directory))
    support.trim(model, modifier, no_data=True, output_dir=str(tmp_path / "out"))
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.99 * modifier._report.nbytes <= size <= modifier._report.nbytes


# Schemes that do not fit the model


@pytest.mark.parametrize(("attention", "fitting"), [(None, 48), ("W4A16", 16), ("MXFP4A16", 48)])
def test_the_suggested_group_size_fits_all_weights_that_share_it(
    tmp_path: Path, attention: str | None, fitting: int
) -> None:
    """Experts have 192 and 48 inputs, attention 192 and 64. The groups of MXFP4 are not the recipe's to set."""
    path = support.saved(
        "qwen3_moe", tmp_path, num_layers=2, hidden_size=192, moe_intermediate_size=48, head_dim=32
    )
    fields = {"target_bits": 6, "attention_scheme": attention, "sensitivity": "weight_error"}
    does_not_fit = fields | {"group_size": 96}
    with pytest.raises(ValueError, match=rf"divide its \d+ inputs; group_size={fitting} does"):
        support.trim(support.load(path), Quant(**does_not_fit), no_data=True)
    support.trim(support.load(path), Quant(**fields, group_size=fitting), no_data=True)
    for asked in (fields, does_not_fit):
        written = {"RouterAwareQuantModifier": {name: value for name, value in asked.items() if value}}
        text = json.dumps({"default_stage": {"default_modifiers": written}})
        said = run("inspect", path, "--recipe", recipe(tmp_path, text))
        assert said.exit_code == 2
        assert f"group_size={fitting} does" in " ".join(said.output.split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {},
            r"schemes: W4A16 cannot quantize model\.layers\.0\.mlp\.experts\.0\.\w+: group size 128 does not "
            r"divide its 64 inputs; group_size=64 does",
        ),
        ({"group_size": 48}, r"group size 48 does not divide its 64 inputs; group_size=64 does"),
        (
            {"schemes": ["W8A8"], "attention_scheme": "W4A16"},
            r"attention_scheme: W4A16 cannot quantize model\.layers\.0\.self_attn\.q_proj: group size 128",
        ),
        (
            {"schemes": ["FP8_BLOCK"]},
            r"schemes: FP8_BLOCK cannot quantize .*: blocks of 128x128 do not divide its shape 64x64; use scales",
        ),
        (
            {"schemes": ["W8A8"], "router": "W4A16"},
            r"router: W4A16 cannot round model\.layers\.0\.mlp\.gate\.weight: group size 128 does not divide "
            r"its 64 inputs; group_size=64 does",
        ),
        (
            {"schemes": [weights(strategy="tensor")]},
            r"schemes: vLLM cannot serve experts of 'mixtral' in x: .*another scheme, or set servable=False",
        ),
        (
            {**G32, "ignore": [r"re:.*layers\.1\..*experts\.3\..*"]},
            r"ignore=\[.*experts.*3.*\] leaves out some experts of block 1 and not others.*Ignore all of them",
        ),
        (
            {**G32, "ignore": ["re:.*experts.*"]},
            r"ignore=\['re:\.\*experts\.\*'\] .*leave no routed expert to quantize; ignore fewer",
        ),
    ],
    ids=str,
)
def test_schemes_that_do_not_fit(
    fields: dict[str, Any], message: str, mixtral: Watched, tmp_path: Path
) -> None:
    report = tmp_path / "reports" / "report.json"
    refused(mixtral, Quant(target_bits=9, **fields, report_path=str(report)), message, tmp_path)


def test_dense_layers_that_a_scheme_does_not_fit(directory: Path, tmp_path: Path) -> None:
    model = Watched(support.load(support.saved("qwen2_moe", directory)))
    recipe = Quant(schemes=["W8A8"], target_bits=9, dense_scheme="W4A16")
    refused(
        model, recipe, r"dense_scheme: W4A16 cannot quantize .*shared_expert\.\w+: group size 128", tmp_path
    )


def test_a_family_that_cannot_be_served(directory: Path, tmp_path: Path) -> None:
    base = support.saved("gpt_oss", directory)
    message = "vLLM cannot serve experts of 'gpt_oss' in W4A16: vLLM 0.32 .*or set servable=False"
    refused(Watched(support.load(base)), Quant(target_bits=8, **G32), message, tmp_path)
    modifier = Quant(target_bits=8, servable=False, **G32, **NO_DATA)
    support.trim(support.load(base), modifier, no_data=True, output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").exists()


def test_a_family_that_must_be_quantized_whole(directory: Path, tmp_path: Path) -> None:
    base = support.saved("llama4_text", directory)
    every = "vLLM 0.32 expects .*quantize the experts of all layers, or set servable=False"
    for fields, message in (
        ({"schemes": ["W4A16", "UNQUANTIZED"]}, f"schemes: UNQUANTIZED beside W4A16 .*{every}"),
        ({"ignore": [r"re:.*layers\.1\..*experts.*"]}, f"ignore: layers left out .*{every}"),
    ):
        refused(Watched(support.load(base)), Quant(target_bits=16, **fields, **G32), message, tmp_path)


def test_experts_that_modifiers_of_llm_compressor_leave_out(directory: Path, tmp_path: Path) -> None:
    def others(*ignore: str) -> QuantizationModifier:
        ignored = ["lm_head", r"re:.*router\.?$", r"re:.*vision.*", *ignore]
        return QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=ignored)

    model = Watched(support.load(support.saved("llama4_text", directory)))
    layer, expert = r"re:.*layers\.1\..*experts.*", r"re:.*layers\.1\..*experts\.3\.down_proj"
    for ignored, message in (
        (
            layer,
            r"QuantizationModifier .*of blocks \[0, 3\] .*of blocks \[1\] in 16 bit.*of all blocks",
        ),
        (
            expert,
            r"QuantizationModifier quantizes some experts of block 1 .*'.*experts\.3\.down_proj' for one",
        ),
    ):
        refused(model, [LayerDropModifier(layers=[2]), others(ignored)], message, tmp_path)
    check_recipe([LayerDropModifier(layers=[1]), others(layer)], model.model)
    check_recipe([LayerDropModifier(layers=[2]), others(r"re:.*experts.*")], model.model)
    check_recipe([LayerDropModifier(layers=[2]), others()], model.model)


def test_experts_apart_are_warned_of(mixtral: Watched, warnings: list[str]) -> None:
    support.trim(mixtral.model, Quant(target_bits=7, granularity="expert", **G32, **NO_DATA), no_data=True)
    assert any("granularity='expert': vLLM cannot serve" in text for text in warnings)


def test_ignored_names_that_do_not_exist_are_warned_of(mixtral: Watched, warnings: list[str]) -> None:
    ignore = ["lm_head", "model.layers.1", "re:.*block_sparse_moe.*"]
    support.trim(mixtral.model, Quant(target_bits=7, ignore=ignore, **G32, **NO_DATA), no_data=True)
    about = [text for text in warnings if text.startswith("ignore: ")]
    assert len(about) == 1 and "'re:.*block_sparse_moe.*' matches no module" in about[0]
    assert "'model.layers.0.mlp.experts.0." in about[0]


def test_a_scheme_may_have_the_name_of_a_field(mixtral: Watched) -> None:
    named = {"attention_scheme": weights(num_bits=8)["x"]}
    modifier = Quant(target_bits=9, schemes=[named], attention_scheme="W8A8", **NO_DATA)
    support.trim(mixtral.model, modifier, no_data=True)
    block = mixtral.model.model.layers[0]
    assert block.mlp.experts[0].up_proj.quantization_scheme.input_activations is None
    assert block.self_attn.q_proj.quantization_scheme.input_activations is not None


# Data


@pytest.mark.parametrize(
    ("fields", "way_out"),
    [
        ({}, "use a plan_path or a sensitivity that needs no data"),
        ({"sensitivity": "frequency"}, "use a plan_path or a sensitivity that needs no data"),
        ({**NO_DATA, "algorithm": "gptq"}, "use algorithm='rtn'"),
        ({**NO_DATA, "algorithm": "awq"}, "use algorithm='rtn'"),
        ({**NO_DATA, "schemes": ["FP8"]}, "use schemes with dynamic or 16-bit inputs"),
        ({**NO_DATA, "attention_scheme": "FP8"}, "use schemes with dynamic or 16-bit inputs"),
        ({**NO_DATA, "router": "W8A8"}, "leave router out"),
        (
            {"algorithm": "gptq"},
            "use algorithm='rtn' and use a plan_path or a sensitivity that needs no data",
        ),
    ],
    ids=str,
)
def test_no_data_where_some_is_needed(
    fields: dict[str, Any], way_out: str, mixtral: Watched, tmp_path: Path
) -> None:
    message = f"needs calibration data: pass `dataset=` to oneshot, or {way_out}"
    refused(mixtral, Quant(target_bits=9, **G32, **fields), message, tmp_path, no_data=True)


def test_a_router_that_stays_needs_no_data(mixtral: Watched) -> None:
    modifier = Quant(target_bits=9, router="UNQUANTIZED", **G32, **NO_DATA)
    support.trim(mixtral.model, modifier, no_data=True)
    assert modifier._report.router_change is None


@pytest.mark.parametrize("sensitivity", ["output_error", "weight_error", "random"])
def test_weights_that_are_no_numbers(sensitivity: str, mixtral: Watched, tmp_path: Path) -> None:
    with torch.no_grad():
        mixtral.model.model.layers[3].mlp.experts.down_proj[2, 3, 4] = float("nan")
    report = tmp_path / "report.json"
    modifier = Quant(target_bits=7, sensitivity=sensitivity, report_path=str(report), **G32)
    no_data = sensitivity != "output_error"
    with pytest.raises(FloatingPointError, match=r"block 3.*(NaN or infinite).*Check the weights"):
        support.trim(mixtral.model, modifier, no_data=no_data, output_dir=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# The report


@pytest.mark.parametrize("place", ["directory/report.json", "file/report.json", "link.json"])
def test_a_report_that_cannot_be_written(place: str, mixtral: Watched, tmp_path: Path) -> None:
    (tmp_path / "directory" / "report.json").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link.json").symlink_to(tmp_path / "directory")
    modifier = Quant(target_bits=9, **G32, report_path=str(tmp_path / place))
    refused(mixtral, modifier, rf"report_path='.*{place}' cannot be written: ", tmp_path)


def test_a_report_in_a_directory_that_is_not_there_makes_it(mixtral: Watched, tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "report.json"
    support.trim(mixtral.model, Quant(target_bits=9, **G32, **NO_DATA, report_path=str(path)), no_data=True)
    assert json.loads(path.read_text())["mean_bits"] == 9.0


# Plans


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"plan_path='.*plan\.json' cannot be read: .*No such file"),
        ("{", "plan_path='.*' is not a saved plan: .*EOF"),
        ("", "is not a saved plan: .*EOF"),
        (b"\xff\xfe\x00", "is not a saved plan: .*utf-8"),
        ("[]", "is not a saved plan: .*object"),
        ("{}", "is not a saved plan: .*modifier\n.*required"),
        (
            '{"modifier": "RouterAwareQuantModifier"}',
            "plan_path='.*': schemes is empty; write the scheme out",
        ),
    ],
    ids=repr,
)
def test_a_plan_that_is_none(
    content: str | bytes | None, message: str, mixtral: Watched, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(mixtral, Quant(plan_path=str(path)), message, tmp_path, no_data=True)


def test_a_plan_that_is_a_directory(mixtral: Watched, tmp_path: Path) -> None:
    refused(mixtral, Quant(plan_path=str(tmp_path)), "plan_path='.*' cannot be read: .*directory", tmp_path)


def edited(**changes: Any) -> Callable[[dict], None]:
    return lambda plan: plan.update(changes)


def layer(index: str, scheme: Any) -> Callable[[dict], None]:
    return lambda plan: plan["layers"].setdefault(index, dict(plan["layers"]["0"])).update(scheme=scheme)


def scheme(name: str, value: Any) -> Callable[[dict], None]:
    return lambda plan: plan["schemes"].update({name: value})


TWO_SCHEMES = {str(i): "W4A16" if i < 4 else "W8A16" for i in range(8)}
FOREIGN = "The plan was made for another model or modifier: its"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(modifier="LayerDropModifier"), f"{FOREIGN} modifier is 'LayerDropModifier', here it is 'Rou"),
        (edited(model_type="qwen3_moe"), f"{FOREIGN} model_type is 'qwen3_moe', here it is 'mixtral'"),
        (edited(num_blocks=9), f"{FOREIGN} num_blocks is 9, here it is 4"),
        (edited(num_experts={"0": 8, "1": 8, "2": 8, "3": 4}), f"{FOREIGN} num_experts is .*3: 4"),
        (edited(foo=1), "is not a saved plan: .*foo\n.*not permitted"),
        (edited(layers={}), "names no scheme for the MoE layer of block 0"),
        (lambda plan: plan["layers"].pop("2"), "names no scheme for the MoE layer of block 2"),
        (layer("9", "W4A16"), r"names blocks \[9\]; MoE layers are in blocks \[0, 1, 2, 3\]"),
        (layer("1", "W3A16"), r"gives block 1 the scheme 'W3A16', which its schemes \(W4A16, W8A16\) do not"),
        (layer("1", "UNQUANTIZED"), "gives block 1 the scheme 'UNQUANTIZED', which its schemes"),
        (layer("1", None), r"is not a saved plan: .*layers\.1\.scheme"),
        (layer("1", {"a": "W4A16"}), r"is not a saved plan: .*layers\.1\.scheme"),
        (layer("1", TWO_SCHEMES), r"block 1 different schemes, \['W4A16', 'W8A16'\]; .*granularity='expert'"),
        (layer("1", {"0": "W4A16"}), r"names no scheme for experts \[1, 2, 3, 4, 5, 6, 7\] of block 1"),
        (layer("1", {**TWO_SCHEMES, "8": "W4A16"}), r"names experts \[8\] of block 1, which has 8"),
        (edited(schemes={}), "schemes is empty"),
        (
            scheme("W4A16", None),
            r"schemes\.W4A16 is null, which only UNQUANTIZED may be; write the scheme out",
        ),
        (
            scheme("W4A16", {"weights": {"num_bits": "x"}}),
            r"plan_path='.*': its schemes: W4A16 is not a scheme that.*weights\.num_bits='x'",
        ),
        (
            scheme("W4A16", weights(strategy="group", group_size=48)["x"]),
            r"plan_path='.*': its schemes: W4A16 cannot quantize .*group size 48 does not divide its 64",
        ),
        (scheme("W4A16", weights(strategy="tensor")["x"]), "vLLM cannot serve experts .* in W4A16"),
    ],
)
def test_an_edited_plan(
    edit: Callable[[dict], None], message: str, mixtral: Watched, plans: Path, tmp_path: Path
) -> None:
    plan = json.loads((plans / "layer.json").read_text())
    edit(plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    refused(mixtral, Quant(plan_path=str(path)), message, tmp_path)


def test_plans_of_others(mixtral: Watched, plans: Path, tmp_path: Path) -> None:
    for name, message in (
        ("drop", r"is not a saved plan: .*scores\n.*not permitted"),
        ("expert", "different schemes.*Set granularity='expert' for research"),
    ):
        refused(mixtral, Quant(plan_path=str(plans / f"{name}.json")), message, tmp_path, no_data=True)


def test_a_broken_plan_is_found_before_other_modifiers_calibrate(
    mixtral: Watched, plans: Path, tmp_path: Path
) -> None:
    """What a drop may still take away need not be in the plan; what is in it has to be right."""
    plan = json.loads((plans / "layer.json").read_text())
    del plan["layers"]["0"]
    plan["layers"]["2"]["scheme"] = "W3A16"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    recipe = [LayerDropModifier(num_drop=1), Quant(plan_path=str(path))]
    refused(mixtral, recipe, "gives block 2 the scheme 'W3A16'", tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "way_out"),
    [
        ("layer", {"algorithm": "gptq"}, "use algorithm='rtn'"),
        ("layer", {"router": "W8A8"}, "leave router out"),
        ("static", {}, "use schemes with dynamic or 16-bit inputs"),
    ],
)
def test_plans_that_need_data(
    name: str, fields: dict[str, Any], way_out: str, mixtral: Watched, plans: Path, tmp_path: Path
) -> None:
    recipe = Quant(plan_path=str(plans / f"{name}.json"), **fields)
    refused(mixtral, recipe, f"needs calibration data.*or {way_out}", tmp_path, no_data=True)


def test_plan_errors_are_value_errors() -> None:
    assert issubclass(PlanFileError, ValueError)


# Models and recipes


def test_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    model = Watched(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"))
    refused(model, Quant(target_bits=5), "LlamaForCausalLM .*'llama'.* has no MoE layer", tmp_path)


def test_a_quantized_checkpoint(quantized: Path, tmp_path: Path) -> None:
    model = support.load(quantized)
    count = [0]
    model.model.layers[0].register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with pytest.raises(ValueError, match=r"quantized already .*quantization_config.*it was made from"):
        support.trim(model, Quant(target_bits=5, **G32), output_dir=str(tmp_path / "out"))
    assert count == [0] and not list(tmp_path.iterdir())


def test_a_model_that_was_quantized_in_memory(directory: Path, tmp_path: Path) -> None:
    modifier = Quant(target_bits=7, **G32, **NO_DATA)
    model = support.trim(support.load(support.saved("mixtral", directory)), modifier, no_data=True)
    with pytest.raises(ValueError, match=r"quantized already|are quantized already, by an earlier"):
        support.trim(model, Quant(target_bits=5, **G32, **NO_DATA), no_data=True)


def w8a8(*targets: str, **fields: Any) -> QuantizationModifier:
    return QuantizationModifier(targets=list(targets), scheme="W8A8", ignore=["lm_head"], **fields)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            lambda: [Quant(target_bits=5, **G32), Quant(target_bits=9, **G32)],
            "several RouterAwareQuantModifiers",
        ),
        (
            lambda: [
                Quant(target_bits=9, ignore=[r"re:.*layers\.0\..*"], **G32),
                Quant(target_bits=9, ignore=[r"re:.*layers\.[123]\..*"], **G32),
            ],
            "several RouterAwareQuantModifiers.*keep one",
        ),
        (
            lambda: [w8a8("Linear"), Quant(target_bits=5, **G32)],
            r"96 modules, '.*experts.*' among them, are quantized already, by an earlier.*\(targets, ignore\)",
        ),
        (
            lambda: [Quant(target_bits=5, **G32), w8a8("Linear")],
            r"QuantizationModifier of the same recipe quantizes 'model\.layers\.0\.mlp\.experts.* as well",
        ),
        (
            lambda: [
                Quant(target_bits=5, **G32),
                GPTQModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"]),
            ],
            "GPTQModifier of the same recipe quantizes",
        ),
        (
            lambda: [w8a8(ATTENTION), Quant(target_bits=5, attention_scheme="W8A16", **G32)],
            r"16 modules, '.*self_attn.*' among them, are quantized already",
        ),
        (
            lambda: [Quant(target_bits=5, attention_scheme="W8A16", **G32), w8a8(ATTENTION)],
            r"QuantizationModifier of the same recipe quantizes '.*self_attn.*' as well",
        ),
        (
            lambda: [Quant(target_bits=5, **G32), AWQModifier(), w8a8(ATTENTION)],
            "AWQModifier searches its scales .*remove it from the recipe and set algorithm='awq'",
        ),
        (
            lambda: [AWQModifier(), w8a8(ATTENTION), Quant(target_bits=5, **G32)],
            "AWQModifier searches its scales .*remove it from the recipe and set algorithm='awq'",
        ),
        (
            lambda: [LayerDropModifier(layers=[0, 1, 2, 3]), Quant(target_bits=5, **G32)],
            r"LayerDropModifier: dropping \[0, 1, 2, 3\] would drop every layer; one must stay",
        ),
        (
            lambda: [
                BlockDropModifier(blocks=[0, 1]),
                LayerDropModifier(layers=[2, 3]),
                Quant(target_bits=5, **G32),
            ],
            "drops before leave no routed expert to quantize; ignore fewer, drop fewer",
        ),
        (
            lambda: [
                LayerDropModifier(layers=[0, 1, 2]),
                Quant(target_bits=5, ignore=[r"re:.*layers\.3\..*"], **G32),
            ],
            r"ignore=\['re:.*3.*'\] and the drops before leave no routed expert to quantize",
        ),
    ],
)
def test_recipes_that_contradict_themselves(
    recipe: Callable[[], list], message: str, mixtral: Watched, tmp_path: Path
) -> None:
    files = listing(tmp_path)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        support.trim(mixtral.model, recipe(), output_dir=str(tmp_path / "out"))
    assert mixtral.passes == 0 and listing(tmp_path) == files


def test_attention_quantized_by_a_later_modifier(directory: Path, tmp_path: Path) -> None:
    """Its schemes are there from the start, and nothing is in its scales yet when the experts are done."""
    reports = []
    for name, after in (("alone", []), ("before", [w8a8(ATTENTION)])):
        path = tmp_path / f"{name}.json"
        model = support.load(support.saved("mixtral", directory))
        ours = Quant(target_bits=7, **G32, report_path=str(path))
        model = support.trim(model, [ours, *after], output_dir=str(tmp_path / name))
        reports.append(json.loads(path.read_text())["layers"])
    assert reports[0] == reports[1]
    assert torch.isfinite(support.logits(model)).all()
    stored = load_file(tmp_path / "before" / "model.safetensors")
    assert any("self_attn.q_proj.weight_scale" in name for name in stored)
    torch.testing.assert_close(
        support.logits(support.load(tmp_path / "before")), support.logits(model), atol=1e-5, rtol=0
    )


def test_the_next_recipe_runs_after_a_refused_one(mixtral: Watched, tmp_path: Path) -> None:
    refused(mixtral, Quant(target_bits=1, **G32), "target_bits=1.0 is impossible", tmp_path)
    modifier = Quant(target_bits=7, **G32, **NO_DATA)
    support.trim(mixtral.model, modifier, no_data=True)
    assert modifier._report.mean_bits <= 7


# Routers


@pytest.mark.parametrize("spec", ["W4A16", {"coarse": {"weights": {"num_bits": 2, "strategy": "channel"}}}])
def test_routers_that_would_route_otherwise(
    spec: Any, mixtral: Watched, directory: Path, tmp_path: Path
) -> None:
    base = support.saved("mixtral", directory)
    on_disk = listing(base)
    name = spec if isinstance(spec, str) else "coarse"
    modifier = Quant(
        target_bits=9,
        router=spec,
        max_routing_change=0.005,
        report_path=str(tmp_path / "report.json"),
        **G32,
    )
    message = refused(
        mixtral,
        modifier,
        rf"router='{name}' would change [\d.]+% of the routing decisions, more than max_routing_change=0.005 "
        "allows. Leave the routers in 16 bit, use a finer scheme, or raise the limit",
        tmp_path,
        passes=None,
    )
    assert float(re.search(r"([\d.]+)%", message)[1]) > 0.5
    assert listing(base) == on_disk


def test_a_model_without_routers_to_round() -> None:
    moe = SimpleNamespace(router=None)
    session = SimpleNamespace(topology=SimpleNamespace(moe_layers={0: moe}, model_type="odd"))
    candidate = resolve_scheme("W8A8", None, "router")
    with pytest.raises(
        ValueError, match=r"router='W8A8': no router of this 'odd' model .*; leave router out"
    ):
        check_routers(session, candidate)


# YAML and the command line


YAML = [
    ("schemes: [W4A16, W5A99], target_bits: 5", "schemes: 'W5A99' is not a preset"),
    ("schemes: W4A16, target_bits: 5", "schemes='W4A16': Input should be a valid list"),
    (
        "schemes: [{x: {weights: {num_bits: 0}}}], target_bits: 5",
        "x: weights.num_bits=0: integers must have 2",
    ),
    ("target_size: 20GB!!", "target_size='20GB!!' is not a size"),
    ("target_bits: .nan", "target_bits=nan must lie between 0 and 32"),
    ("target_bits: 5, target_size: 1GB", "got target_bits and target_size"),
    ("", "got none"),
    ("target_bits: 5, algorithm: gut", "algorithm='gut': Input should be 'rtn', 'gptq' or 'awq'"),
    ("target_bits: 5, group_size: -1", "group_size=-1: Input should be greater than or equal to 1"),
    (
        "target_bits: 5, max_routing_change: 2",
        "max_routing_change=2: Input should be less than or equal to 1",
    ),
    ("target_bits: 5, report_path: r.txt", "report_path='r.txt' must end with .json"),
    ("target_bits: 5, ignore: ['re:(']", "ignore: 're:(' is not a regular expression"),
    ("target_bits: 5, target_bit: 4", "target_bit=4: Extra inputs are not permitted"),
]


def yaml(fields: str) -> str:
    return f"default_stage: {{default_modifiers: {{RouterAwareQuantModifier: {{{fields}}}}}}}"


@pytest.mark.parametrize(("fields", "words"), YAML, ids=[fields for fields, _ in YAML])
def test_the_command_refuses_fields_before_the_model_is_read(fields: str, words: str, tmp_path: Path) -> None:
    """The model does not even exist."""
    result = compress(tmp_path / "absent", yaml(fields), tmp_path / "out", "--dataset", "demo")
    assert result.exit_code == 2
    assert "RouterAwareQuantModifier" in result.output and words in result.output
    assert result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(("fields", "words"), YAML[:4], ids=[fields for fields, _ in YAML[:4]])
def test_recipes_in_yaml(fields: str, words: str, mixtral: Watched, tmp_path: Path) -> None:
    path = recipe(tmp_path, yaml(fields))
    words = words.replace("schemes='W4A16': ", "")
    refused(mixtral, str(path), re.escape(words), tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("target_bits: 8", "schemes: W4A16 cannot quantize model.layers.0.mlp.experts.0."),
        ("target_bits: 3, group_size: 32", "target_bits=3.0 is impossible with these schemes: the smallest"),
        (
            "target_size: 10 KB, group_size: 32",
            "target_size=10000 (9.77 KiB) is impossible with these schemes",
        ),
        ("plan_path: none.json", "plan_path='none.json' cannot be read"),
        ("target_bits: 8, group_size: 48, sensitivity: random, algorithm: gptq", "group_size=64 does"),
    ],
)
def test_the_command_leaves_nothing_behind(fields: str, words: str, directory: Path, tmp_path: Path) -> None:
    model = support.saved("mixtral", directory)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"t{3 + (i * d) % 100}" for i in range(40)) for d in range(1, 5)))
    fields += ", report_path: " + str(tmp_path / "new" / "report.json")
    result = compress(model, yaml(fields), tmp_path / "out", "--dataset", text)
    assert result.exit_code == 2
    assert words in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "text.txt"}


@pytest.mark.parametrize(
    ("family", "modifier", "words"),
    [
        ("gemma4_text", "QuantizationModifier: {scheme: FP8_DYNAMIC, ", r"'re:.*router\.proj\.?$'"),
        ("qwen2_moe", "SparseGPTModifier: {sparsity: 0.5, ", r"'re:.*mlp\.shared_expert_gate\.?$'"),
        ("gpt_oss", "GPTQModifier: {scheme: W8A16, ", "vLLM cannot serve quantized experts of 'gpt_oss'"),
    ],
)
def test_the_command_refuses_what_modifiers_of_llm_compressor_reach(
    family: str, modifier: str, words: str, directory: Path, tmp_path: Path
) -> None:
    """Before weights are read, and in recipes without any modifier of ours."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"t{3 + (i * d) % 100}" for i in range(40)) for d in range(1, 5)))
    content = f"default_stage: {{default_modifiers: {{{modifier}targets: [Linear], ignore: [lm_head]}}}}}}"
    result = compress(support.saved(family, directory), content, tmp_path / "out", "--dataset", text)
    assert result.exit_code == 2 and words in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "text.txt"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("target_bits: 8", "or use a plan_path or a sensitivity that needs no data"),
        ("target_bits: 8, sensitivity: random, algorithm: gptq", "or use algorithm='rtn'"),
        ("plan_path: plan.json, algorithm: awq", "or use algorithm='rtn'"),
    ],
)
def test_the_command_without_data(fields: str, words: str, directory: Path, tmp_path: Path) -> None:
    """Found before weights are read: there are none."""
    model = tmp_path / "model"
    model.mkdir()
    for file in support.saved("mixtral", directory).iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    result = compress(model, yaml(fields), tmp_path / "out", "--sequence-length", 16)
    assert result.exit_code == 2
    assert f"RouterAwareQuantModifier needs calibration data: give a dataset, {words}" in result.output


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("target_size: 5KB", "the model cannot be smaller than"),
        ("target_bits: 3", "leaves 3 bits per expert weight, and its smallest scheme takes"),
        ("target_bits: 5, schemes: [FP8_BLOCK]", "blocks of 128x128 do not divide"),
        ("target_bits: 5, schemes: [W6A8]", "vLLM cannot serve experts"),
        ("target_bits: 5, attention_scheme: W4A61", "attention_scheme: 'W4A61' is not a preset"),
        ("target_bits: 9, attention_scheme: FP8_BLOCK", "FP8_BLOCK does not fit the model's attention"),
        ("plan_path: plan.json", "a plan decides the schemes"),
    ],
)
def test_inspect_refuses_recipes(fields: str, words: str, directory: Path, tmp_path: Path) -> None:
    content = yaml(f"{fields}, group_size: 32")
    result = run("inspect", support.saved("mixtral", directory), "--recipe", recipe(tmp_path, content))
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output


def test_fields_are_not_changed_by_being_looked_at() -> None:
    fields = {"schemes": [weights()], "target_bits": 5, "ignore": ["lm_head"]}
    before = copy.deepcopy(fields)
    Quant(**fields)
    assert fields == before
