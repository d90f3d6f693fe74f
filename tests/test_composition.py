"""Our modifiers with each other and with llm-compressor's, in any order, under both pipelines: run, check,
reload equal, and every modifier's work done.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import composition_table as table
import pytest
import support
import torch
from auto_round.utils.device_manager import CpuARDevice
from composition_effects import Outcome
from llmcompressor.core import reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier, load_trimmed_moe
from llmcompressor_moe.check import check_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _cheap_auto_round() -> Iterator[None]:
    """AutoRound collects garbage dozens of times per block, and by default only uses bfloat16 where the CPU has
    instructions for it.
    """
    logging.getLogger("autoround").setLevel("ERROR")
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuARDevice, "supports_bf16", lambda self: True)
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh_session() -> Iterator[None]:
    """A refused recipe leaves its session behind."""
    yield
    reset_session()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("base")
    return {family: support.saved(family, folder) for family in ("mixtral", *table.BY_FAMILY)}


@pytest.fixture(scope="module")
def base_of(checkpoints: dict[str, Path]) -> Callable[..., PreTrainedModel]:
    """The untouched model of a family in a dtype; the same object every time."""
    return functools.cache(lambda family, dtype: load(checkpoints[family], dtype))


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with load_trimmed_moe():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_case(base_of: Callable[..., PreTrainedModel], tmp_path: Path, case: table.Case) -> None:
    out = tmp_path / "out"
    base = base_of(case.family, case.dtype)
    options = {"pipeline": case.pipeline, "output_dir": str(out)}
    if case.refused is not None:
        message = re.escape(case.refused).replace(r"\.\.\.", ".*")
        with pytest.raises(ValueError, match=message):
            support.trim(copy.deepcopy(base), case.recipe(), **options)
        assert not out.exists()
        return
    model = support.trim(copy.deepcopy(base), case.recipe(), **options)
    check_checkpoint(out).raise_if_errors()
    expected, reloaded = support.logits(model), load(out, case.dtype)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(support.logits(reloaded), expected, atol=1e-5, rtol=0)
    outcome = Outcome(base, model, reloaded, case.order)
    for name in case.order:
        table.PARTS[name].effect(outcome)


DROPS: dict[str, Callable[[], Modifier]] = {
    "layer": lambda: LayerDropModifier(layers=[2]),
    "block": lambda: BlockDropModifier(blocks=[1]),
    "expert": lambda: ExpertDropModifier(experts={layer: [0, 5] for layer in range(4)}),
}


@pytest.mark.parametrize("drop", DROPS)
def test_what_needs_no_data_commutes(base_of: Callable[..., PreTrainedModel], drop: str) -> None:
    """Rounding to nearest looks at one weight at a time: before or after a drop, in either pipeline, what stays
    must come out the same.
    """
    results = []
    for pipeline in table.BOTH:
        for order in ([drop, "quantization"], ["quantization", drop]):
            recipe = [
                modifier
                for name in order
                for modifier in ([DROPS[name]()] if name in DROPS else table.PARTS[name].make())
            ]
            model = support.trim(copy.deepcopy(base_of("mixtral", torch.float32)), recipe, pipeline=pipeline)
            results.append(support.logits(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("drop", DROPS)
def test_auto_round_needs_bfloat16(base_of: Callable[..., PreTrainedModel], drop: str) -> None:
    recipe = [*table.PARTS["autoround"].make(), DROPS[drop]()]
    with pytest.raises(ValueError, match=r"AutoRoundModifier .* torch.float32: load .* dtype=torch.bfloat16"):
        support.trim(copy.deepcopy(base_of("mixtral", torch.float32)), recipe)


def test_the_document_says_what_the_cases_say() -> None:
    assert table.DOCUMENT.read_text() == table.render()


def test_scales_of_a_later_modifier_are_no_weights(base_of: Callable[..., PreTrainedModel]) -> None:
    """Memory that nobody has filled yet holds NaN here."""
    drop = {"num_drop": 2, "criterion": "weight_norm"}
    quantization = QuantizationModifier(
        targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*gate$"]
    )
    reports = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for recipe in ([], [quantization]):
            model = copy.deepcopy(base_of("mixtral", torch.float32))
            reports += support.trim(model, [ExpertDropModifier(**drop), *recipe])._trim_history
    finally:
        torch.use_deterministic_algorithms(False)
    assert reports[0].scores == reports[1].scores
