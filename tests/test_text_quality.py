"""Perplexity and bits per byte against transformers' own loss, lm-eval's windows, and one token at a time."""

import math
from itertools import pairwise

import pytest
import support
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmcompressor_moe.demo import DEMO_MODEL, heldout_rows, heldout_texts
from llmcompressor_moe.evaluation.likelihood import perplexity
from llmcompressor_moe.evaluation.text import TextQuality, text_quality
from llmcompressor_moe.evaluation.windows import batches, tokenized, windows

LENGTHS = [3, 17, 40]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_models.build("mixtral", num_layers=2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def rows(lengths=LENGTHS) -> list[list[int]]:
    return [support.token_ids(1, length, seed=length)[0].tolist() for length in lengths]


def quality(model: PreTrainedModel, texts, *arguments, **options) -> TextQuality:
    return text_quality(model, support.tokenizer(), texts, *arguments, **options)


@torch.no_grad()
def last_token_nll(model: PreTrainedModel, context: list[int], token: int) -> float:
    return -model(input_ids=torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token].item()


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 20), st.data())
def test_windows_are_those_of_lm_eval(lengths: list[int], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    found = windows(lengths, length, stride)
    for document, tokens in enumerate(lengths):
        theirs = list(get_rolling_token_windows(list(range(1, tokens)), 0, length, length - stride + 1))
        ours = [window for window in found if window.document == document]
        assert [list(range(w.begin, w.end)) for w in ours] == [fed for fed, _ in theirs]
        assert [list(range(w.end + 1 - w.scored, w.end + 1)) for w in ours] == [
            wanted for _, wanted in theirs
        ]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 20), st.data())
def test_every_token_but_the_first_is_predicted_once_with_enough_context(
    lengths: list[int], length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    predicted = []
    for window in windows(lengths, length, stride):
        assert 1 <= window.end - window.begin <= length
        for target in range(window.end + 1 - window.scored, window.end + 1):
            predicted.append((window.document, target))
            assert target - window.begin >= min(target, length - stride + 1)
    assert sorted(predicted) == [(index, t) for index, tokens in enumerate(lengths) for t in range(1, tokens)]


def test_batches_hold_every_window_once_and_one_shape_each() -> None:
    found = windows([5, 9, 30, 31, 5], 8, 3)
    grouped = batches(found, 2)
    assert sorted(map(str, found)) == sorted(str(window) for batch in grouped for window in batch)
    assert all(len(batch) <= 2 for batch in grouped)
    assert all(len({(w.end - w.begin, w.scored) for w in batch}) == 1 for batch in grouped)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_equals_the_loss_of_transformers_per_window(model: PreTrainedModel, stride: int) -> None:
    length, total, count = 8, 0.0, 0
    for row in rows():
        for context, wanted in get_rolling_token_windows(row[1:], row[0], length, length - stride + 1):
            ids = torch.tensor([[*context, wanted[-1]]])
            labels = ids.clone()
            labels[:, : ids.shape[1] - len(wanted)] = -100
            with torch.no_grad():
                total += model(input_ids=ids, labels=labels).loss.item() * len(wanted)
            count += len(wanted)
    found = quality(model, rows(), length, stride)
    assert found.tokens == count == sum(LENGTHS) - len(LENGTHS)
    assert found.mean_nll == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("length", [8, 60])
def test_stride_one_equals_predicting_one_token_at_a_time(model: PreTrainedModel, length: int) -> None:
    losses = [
        last_token_nll(model, row[max(0, index - length) : index], row[index])
        for row in rows()
        for index in range(1, len(row))
    ]
    assert quality(model, rows(), length, 1).mean_nll == pytest.approx(
        math.fsum(losses) / len(losses), rel=1e-5
    )


@pytest.mark.parametrize("batch_size", [2, 100])
@pytest.mark.parametrize("stride", [3, 8])
def test_does_not_depend_on_the_batch_size(model: PreTrainedModel, stride: int, batch_size: int) -> None:
    alone = quality(model, rows(), 8, stride)
    assert quality(model, rows(), 8, stride, batch_size=batch_size).mean_nll == pytest.approx(
        alone.mean_nll, rel=1e-6
    )


def test_documents_do_not_see_each_other(model: PreTrainedModel) -> None:
    single = [quality(model, [row], 8, 4) for row in rows()]
    together = quality(model, rows(), 8, 4)
    assert together.documents == 3
    assert together.mean_nll * together.tokens == pytest.approx(
        sum(one.mean_nll * one.tokens for one in single), rel=1e-6
    )


def test_a_running_text_is_one_document(model: PreTrainedModel) -> None:
    joined = [token for row in rows() for token in row]
    assert quality(model, rows(), 8, 4, running_text=True) == quality(model, [joined], 8, 4)
    texts = ["t5 t6 t7", "t8 t9"]
    assert quality(model, texts, 8, 4, running_text=True) == quality(model, "t5 t6 t7\n\nt8 t9", 8, 4)


def test_rows_of_a_tensor_equal_the_perplexity_of_whole_rows(model: PreTrainedModel) -> None:
    ids = support.token_ids(6, 24)
    assert quality(model, ids, 23, 23).perplexity == pytest.approx(perplexity(model, ids), rel=1e-6)


def test_the_demo_model_has_the_perplexity_of_its_readme(demo: PreTrainedModel, demo_tokenizer) -> None:
    chosen = heldout_rows(demo_tokenizer)[::8]
    found = text_quality(demo, demo_tokenizer, chosen, 256, 256, batch_size=8)
    assert found.perplexity == pytest.approx(perplexity(demo, torch.tensor(chosen)), rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (512, 512)])
def test_equals_the_rolling_likelihood_of_lm_eval(
    demo: PreTrainedModel, demo_tokenizer, length: int, stride: int
) -> None:
    texts = heldout_texts()[:3]
    # The demo's tokenizer adds a BOS, which lm-eval adds as well: without the first of the two they agree.
    harness = HFLM(pretrained=demo, tokenizer=demo_tokenizer, add_bos_token=False, max_length=length)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in texts
    ]
    nats = -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
    found = text_quality(demo, demo_tokenizer, texts, length, stride)
    assert found.mean_nll * found.tokens == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(
        nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5
    )


def test_more_context_predicts_better(demo: PreTrainedModel, demo_tokenizer) -> None:
    texts = heldout_texts()[:2]
    strides = [
        text_quality(demo, demo_tokenizer, texts, 64, stride, batch_size=8).mean_nll
        for stride in (64, 32, 16)
    ]
    assert all(less < more for more, less in pairwise(strides))


def test_a_bos_leaves_every_byte_to_predict(demo_tokenizer) -> None:
    text = "Naïve “Æsir” — 日本語 \N{GRINNING FACE}"
    (document,) = tokenized(demo_tokenizer, text)
    assert document.token_ids[0] == demo_tokenizer.bos_token_id
    assert document.nbytes == len(text.encode())


def test_a_first_token_that_nothing_predicts_has_no_bytes(model: PreTrainedModel) -> None:
    text = "t50 t5 t6"
    (document,) = tokenized(support.tokenizer(), text)
    assert document.token_ids.tolist() == [50, 5, 6]
    assert document.nbytes == len(" t5 t6")
    (row,) = tokenized(support.tokenizer(), [[50, 5, 6]])
    assert row.nbytes == len(" t5 t6")
    found = quality(model, text)
    assert found.nbytes == 6
    assert found.bits_per_byte == pytest.approx(2 * found.mean_nll / math.log(2) / 6)


def test_choices_are_2048_tokens_or_what_the_model_has(model: PreTrainedModel) -> None:
    found = quality(model, rows())
    assert (found.length, found.stride) == (64, 32)
    wide = tiny_models.build("mixtral", num_layers=1, max_position_embeddings=4096)
    assert quality(wide, rows()).length == 2048


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_as_it_was_even_after_an_error(model: PreTrainedModel, training: bool) -> None:
    broken = tiny_models.build("mixtral", num_layers=1)
    broken.lm_head.weight.data.fill_(torch.nan)
    for candidate in (model, broken):
        candidate.train(training)
        try:
            quality(candidate, rows(), 8, 4)
        except FloatingPointError:
            assert candidate is broken
        assert candidate.training is training
    model.eval()


def test_the_result_survives_json(model: PreTrainedModel) -> None:
    found = quality(model, rows(), 8, 4)
    assert TextQuality.model_validate_json(found.model_dump_json()) == found


def test_a_confident_mistake_gives_an_infinite_perplexity_not_an_error() -> None:
    certain = tiny_models.build("mixtral", num_layers=1)
    certain.lm_head.weight.data.mul_(1e5)
    found = quality(certain, rows(), 8, 4)
    assert found.perplexity == math.inf and math.isfinite(found.mean_nll)
    assert TextQuality.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts is empty"),
        ("", {}, r"fewer than the 2 tokens .*: 0 \(0\) \(1 of 1 documents\).*running_text=True"),
        (["t3 t4", "t5", ""], {}, r"their tokens: 1 \(1\), 2 \(0\) \(2 of 3 documents\)"),
        ([[3, 4], [5]], {}, r"1 \(1\)"),
        (["t3 t4", [3, 4]], {}, r"texts\[0\] is str 't3 t4'; give only texts, or only rows"),
        ([3, 4], {}, r"texts\[0\] is int '3'"),
        ([[0.5, 1.0]], {}, r"texts\[0\] is list '\[0.5, 1.0\]'"),
        ([[3, 4]], {"length": 0}, "length is 0; give at least 1"),
        ([[3, 4]], {"length": 8, "stride": 9}, "stride is 9 at length 8; give 1 to 8"),
        ([[3, 4]], {"length": 8, "stride": 0}, "stride is 0 at length 8"),
        ([[3, 4]], {"length": 65}, "length is 65, but the model has 64 positions"),
        ([[3, 4]], {"batch_size": 0}, "batch_size is 0"),
        ([[3, 128]], {}, "token id 128 is not in the model's vocabulary of 128"),
        ([[1, 2, 2]], {}, "nothing but special tokens"),
    ],
)
def test_names_what_it_cannot_use(model: PreTrainedModel, texts, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality(model, texts, **options)


def test_names_the_window_whose_logits_are_not_finite() -> None:
    broken = tiny_models.build("mixtral", num_layers=1)
    broken.get_input_embeddings().weight.data[99] = torch.nan
    documents = rows()
    documents[2][30] = 99
    with pytest.raises(FloatingPointError, match="in the window of tokens 24 to 32 of document 2"):
        quality(broken, documents, 8, 4, batch_size=4)


def test_names_the_window_with_an_impossible_token() -> None:
    mute = tiny_models.build("mixtral", num_layers=1)
    mute.lm_head = torch.nn.Linear(64, 128)
    mute.lm_head.bias.data[99] = -torch.inf
    assert math.isfinite(quality(mute, rows(), 8, 4).mean_nll)
    with pytest.raises(
        FloatingPointError, match="probability zero in the window of tokens 0 to 2 of document 1"
    ):
        quality(mute, [[3, 4, 5], [3, 4, 99]], 8, 4)
