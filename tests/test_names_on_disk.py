"""`attention_scheme` and `dense_scheme` in families whose files call a module otherwise than the model does, or
keep it together with others: what is written is legal and comes back, or the recipe is refused before it runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import support
import tiny_models
import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe import RouterAwareQuantModifier, open_moe
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.module_names import saved_module_names, why_not_stored_alone
from llmcompressor_moe.topology import find_topology

FIELDS = ("attention_scheme", "dense_scheme")
FAMILIES = (
    "axk2",
    "deepseek_v4",
    "glm5_next",
    "hy_v3",
    "hy_v4",
    "inkling_mm_model",
    "kimi_linear",
    "laguna",
    "minimax_m3_vl",
    "step3p7",
)
IN_PARTS = r"keep its weight in parts \(.*gate_proj\.weight and .*up_proj\.weight\).* '(re:.*)' to ignore"
TOGETHER = r"keep its weight and others in one tensor, model\.llm\..*w13_dn\.weight.* '(re:.*)' to ignore"
ANOTHER_FORM = (
    r"transformers saves it in another form .*open the model instead \(llmcompressor_moe\.open_moe\)"
)
SERVED_OTHERWISE = r"vLLM cannot serve experts of 'step3p5' in W8A16"
# Family, and whether it is opened -> field -> why not.
REFUSED = {
    ("inkling_mm_model", False): dict.fromkeys(FIELDS, ANOTHER_FORM),
    ("inkling_mm_model", True): {"dense_scheme": TOGETHER},
    ("minimax_m3_vl", False): {"dense_scheme": ANOTHER_FORM},
    ("minimax_m3_vl", True): {"dense_scheme": IN_PARTS},
    ("step3p7", False): dict.fromkeys(FIELDS, SERVED_OTHERWISE),
    ("step3p7", True): dict.fromkeys(FIELDS, SERVED_OTHERWISE),
}


def never(*_: object, **__: object) -> None:
    raise AssertionError("refusals come before calibration")


def recipe(*fields: str) -> RouterAwareQuantModifier:
    schemes = dict.fromkeys(fields, "W8A16")
    return RouterAwareQuantModifier(
        schemes=["W8A16"], group_size=32, target_bits=9, sensitivity="random", **schemes
    )


@pytest.mark.parametrize("opened", [False, True], ids=["loaded", "opened"])
@pytest.mark.parametrize("family", FAMILIES)
def test_schemes_for_more_than_experts(
    family: str, opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = support.saved(family, tmp_path)
    reasons = REFUSED.get((family, opened), {})
    out = tmp_path / "out"

    def run(*fields: str) -> PreTrainedModel:
        model = open_moe(path) if opened else support.load(path)
        return support.trim(model, recipe(*fields), no_data=True, output_dir=str(out))

    for field, reason in reasons.items():
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=reason):
            patch.setattr(RouterAwareQuantModifier, "on_calibration_start", never)
            run(field)
        assert not out.exists()
    works = [field for field in FIELDS if field not in reasons]
    if works:
        model = run(*works)
        assert not check_checkpoint(out).errors
        torch.testing.assert_close(
            support.logits(support.load(out)), support.logits(model), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", sorted({*tiny_models.buildable(), *tiny_models.multimodal()}))
def test_every_other_family_has_one_name_for_a_module(family: str) -> None:
    model = tiny_models.on_meta(family)
    topology = find_topology(model)
    routers = tuple(moe.router for moe in topology.moe_layers.values())
    saved, why_not = saved_module_names(model), why_not_stored_alone(model)
    unlike = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and path.startswith(f"{topology.stack}.")
        and not path.startswith(routers)
        and (why_not(path) or not saved(path)[0].endswith(path.removeprefix(topology.stack)))
    ]
    assert bool(unlike) == (family in FAMILIES), unlike
