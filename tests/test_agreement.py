"""Agreement with the base model against scipy's divergences and models whose agreement is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import support
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from llmcompressor_moe.evaluation.agreement import Agreement, agreement, recorded_base
from llmcompressor_moe.profile import divergence
from llmcompressor_moe.profile.computing import fast_dtype
from llmcompressor_moe.profile.divergence import kl_divergence


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_models.build("mixtral", num_layers=2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    return tiny_models.build("mixtral", num_layers=2, max_position_embeddings=64, seed=1)


def compare(base: PreTrainedModel, other: PreTrainedModel, texts=None, **options) -> Agreement:
    texts = support.token_ids(4, 24) if texts is None else texts
    with recorded_base(base, support.tokenizer(), texts, **options) as recording:
        return agreement(recording, other)


def whole_rows(model: PreTrainedModel) -> np.ndarray:
    return (
        support.logits(model, support.token_ids(4, 24))[:, :-1]
        .double()
        .numpy()
        .reshape(-1, tiny_models.VOCAB)
    )


def test_equals_the_divergence_of_scipy(base: PreTrainedModel, other: PreTrainedModel) -> None:
    p, q = (scipy.special.softmax(whole_rows(model), axis=-1) for model in (base, other))
    divergences = scipy.special.rel_entr(p, q).sum(-1)
    found = compare(base, other)
    assert found.tokens == len(divergences) == 4 * 23
    assert found.vocabulary == tiny_models.VOCAB
    assert found.mean_kl == pytest.approx(divergences.mean(), rel=1e-4)
    quantiles = np.quantile(divergences, [0.5, 0.9, 0.99])
    assert [found.median_kl, found.kl_90, found.kl_99] == pytest.approx(quantiles.tolist(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 30.0]))
def test_divergences_of_any_logits_are_those_of_scipy(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 50, generator=generator) * 5
    other = base + torch.randn(3, 50, generator=generator) * scale
    expected = scipy.special.rel_entr(
        scipy.special.softmax(base.double().numpy(), axis=-1),
        scipy.special.softmax(other.double().numpy(), axis=-1),
    ).sum(-1)
    found = kl_divergence(base, other)
    assert found.dtype == torch.float64 and (found >= 0).all()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-14)


def test_tokens_that_the_base_never_says_add_nothing() -> None:
    base, other = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert kl_divergence(base, other).item() == pytest.approx(math.log(1.5))
    assert kl_divergence(base, torch.tensor([[0.0, 0.0, -torch.inf]])).item() == 0.0
    assert kl_divergence(other, base).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_agrees_with_itself_exactly(base: PreTrainedModel, dtype: torch.dtype) -> None:
    model = tiny_models.build("mixtral", num_layers=2).to(dtype)
    with recorded_base(model, support.tokenizer(), support.token_ids(2, 24)) as recording:
        assert recording.values.dtype == fast_dtype(dtype, model.device)
        found = agreement(recording, model)
    assert (found.mean_kl, found.median_kl, found.kl_90, found.kl_99) == (0, 0, 0, 0)
    assert found.top1_agreement == 1


def test_a_model_that_knows_nothing_diverges_by_what_the_base_knows(base: PreTrainedModel) -> None:
    blank = tiny_models.build("mixtral", num_layers=1)
    torch.nn.init.zeros_(blank.lm_head.weight)
    entropy = scipy.special.entr(scipy.special.softmax(whole_rows(base), axis=-1)).sum(-1)
    assert compare(base, blank).mean_kl == pytest.approx(
        math.log(tiny_models.VOCAB) - entropy.mean(), rel=1e-5
    )


@pytest.mark.parametrize("options", [{"length": 8, "stride": 3}, {"length": 8, "stride": 8, "batch_size": 3}])
def test_windows_are_compared_with_the_same_windows(
    base: PreTrainedModel, other: PreTrainedModel, options: dict
) -> None:
    texts = [row[: 10 + 4 * index] for index, row in enumerate(support.token_ids(4, 24).tolist())]
    found = compare(base, other, texts, **options)
    assert (found.length, found.stride) == (8, options["stride"])
    assert found.tokens == sum(len(text) - 1 for text in texts)
    assert compare(base, base, texts, **options).mean_kl == 0
    alone = compare(base, other, texts, **{**options, "batch_size": 1})
    assert found.mean_kl == pytest.approx(alone.mean_kl, rel=1e-5)


def test_blocks_of_rows_do_not_change_the_result(
    base: PreTrainedModel, other: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compare(base, other)
    monkeypatch.setattr(divergence, "_CHUNK", 5 * tiny_models.VOCAB)
    assert compare(base, other).mean_kl == pytest.approx(before.mean_kl, rel=1e-12)


def test_the_file_goes_with_the_context_and_on_errors(base: PreTrainedModel, tmp_path: Path) -> None:
    with recorded_base(base, support.tokenizer(), support.token_ids(2, 24), directory=tmp_path):
        (folder,) = tmp_path.iterdir()
        assert (folder / "logits").stat().st_size == 2 * 23 * tiny_models.VOCAB * 4
    assert not list(tmp_path.iterdir())
    broken = tiny_models.build("mixtral", num_layers=1)
    broken.lm_head.weight.data.fill_(torch.inf)
    with (
        pytest.raises(FloatingPointError, match="logits are NaN or infinite in the window of tokens 0 to 23"),
        recorded_base(broken, support.tokenizer(), support.token_ids(2, 24), directory=tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_one_recording_serves_many_models(base: PreTrainedModel, other: PreTrainedModel) -> None:
    with recorded_base(base, support.tokenizer(), support.token_ids(4, 24)) as recording:
        first, own, again = (agreement(recording, model) for model in (other, base, other))
    assert first == again and own.mean_kl == 0
    assert Agreement.model_validate_json(first.model_dump_json()) == first


def test_a_model_without_gradients_and_mode_afterwards(base: PreTrainedModel, other: PreTrainedModel) -> None:
    other.train()
    compare(base, other)
    assert other.training and not base.training
    other.eval()


def test_names_vocabularies_that_differ(base: PreTrainedModel) -> None:
    wide = tiny_models.build("mixtral", num_layers=1, vocab_size=160)
    with pytest.raises(
        ValueError, match="base model has a vocabulary of 128 tokens, the other model one of 160"
    ):
        compare(base, wide)


def test_names_too_few_positions(base: PreTrainedModel) -> None:
    short = tiny_models.build("mixtral", num_layers=1, max_position_embeddings=16)
    with pytest.raises(ValueError, match="length is 64, but the model has 16 positions"):
        compare(base, short)


def test_names_the_window_that_diverges_infinitely(base: PreTrainedModel) -> None:
    mute = tiny_models.build("mixtral", num_layers=1)
    mute.lm_head = torch.nn.Linear(64, 128)
    mute.lm_head.bias.data[99] = -torch.inf
    with pytest.raises(
        FloatingPointError, match=r"KL divergence .* infinite in the window of tokens 0 to 8 of document 0"
    ):
        compare(base, mute, length=8)


def test_says_when_there_is_no_room(
    base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with (
        pytest.raises(
            ValueError, match=r"46 tokens, vocabulary of 128\) take .* no room \(No space left on device\)"
        ),
        recorded_base(base, support.tokenizer(), support.token_ids(2, 24), directory=tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(base: PreTrainedModel, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"directory is .*missing.* not a folder"),
        recorded_base(base, support.tokenizer(), support.token_ids(2, 24), directory=tmp_path / "missing"),
    ):
        pass
