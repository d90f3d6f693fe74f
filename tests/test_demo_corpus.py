"""The pure parts of making the demo model: reading and dealing documents, baselines, schedule, batches."""

import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcompressor_moe.demo import corpus, train

documents = st.lists(
    st.lists(st.text("abc ", min_size=1, max_size=60), min_size=1, max_size=6), min_size=1, max_size=30
)


@given(documents, st.integers(0, 400), st.integers(0, 400), st.integers(0, 9))
def test_no_paragraph_is_in_two_splits(docs: list[list[str]], some: int, more: int, seed: int) -> None:
    dealt = corpus.split(docs, train=10_000, calibration=some, heldout=more, seed=seed)
    paragraphs = [text for part in vars(dealt).values() for doc in part for text in doc]
    assert len(paragraphs) == len(set(paragraphs))
    assert set(paragraphs) <= {text for doc in docs for text in doc}


def test_a_document_is_in_one_split_only_and_large_ones_are_cut() -> None:
    docs = [[f"{doc}:{line}".ljust(50, ".") for line in range(40)] for doc in range(20)]
    dealt = corpus.split(docs, train=10**6, calibration=4000, heldout=2000, seed=3)
    owners = [{doc[0].split(":")[0] for doc in part} for part in vars(dealt).values()]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    assert [len(doc) for doc in dealt.heldout] == [10, 10, 10, 10]
    assert [len(doc) for doc in dealt.calibration] == [20, 20, 20, 20]
    assert len(dealt.train) == 12 and all(len(doc) == 40 for doc in dealt.train)
    lines = [int(text.split(":")[1].rstrip(".")) for text in dealt.heldout[0]]
    assert lines == list(range(lines[0], lines[0] + 10)) and lines[0] > 0


@given(st.lists(st.text("xy", min_size=1, max_size=30), max_size=20), st.integers(1, 100))
def test_passages_joined_are_the_document(doc: list[str], characters: int) -> None:
    runs = list(corpus.passages(doc, characters))
    assert [line for run in runs for line in run.split("\n")] == doc
    assert all(len(run.replace("\n", "")) >= characters for run in runs[:-1])


def test_prose_is_text_without_code_tables_and_headings() -> None:
    prose = corpus._Prose()
    prose.feed(
        "<title>no</title><h1>no</h1><p>One <b>bold</b> &amp; plain</p><pre>no</pre>"
        "<ul><li>Two<table><tr><td>no</table></ul><script>no</script>"
    )
    assert [text for text in prose.paragraphs if text] == ["One bold & plain", "Two"]


def test_reads_the_character_vectors_of_an_r_lazy_load_database() -> None:
    """Bytes laid out as R Internals describes; the third string is NA, the second record a number."""
    header = b"X\n" + struct.pack(">iii", 3, 0x00040201, 0x00030500) + struct.pack(">i", 5) + b"UTF-8"
    strings = ["Emma", "caf\u00e9", None]
    body = b"".join(
        struct.pack(">ii", 9, -1 if s is None else len(s.encode())) + (s or "").encode() for s in strings
    )
    vector = header + struct.pack(">ii", 16, 3) + body
    number = header + struct.pack(">iii", 13, 1, 42)
    database = b"".join(
        struct.pack(">I", len(data)) + zlib.compress(data) for data in (vector, number, vector)
    )
    assert list(corpus._lazy_load_vectors(database)) == [["Emma", "caf\u00e9", ""]] * 2


def test_unigram_and_bigram_perplexity_of_texts_known_in_closed_form() -> None:
    heldout = torch.tensor([[0, 1, 0, 1]])
    assert train.unigram_perplexity(torch.tensor([0, 1] * 5000), heldout, 2) == pytest.approx(2, rel=1e-3)
    assert train.unigram_perplexity(torch.tensor([], dtype=torch.long), heldout, 16) == pytest.approx(16)
    alternating = torch.tensor([0, 1] * 5000)
    assert train.bigram_perplexity(alternating, heldout, 2, prior=1.0) == pytest.approx(1, rel=1e-3)
    coin = torch.randint(0, 2, (40_000,), generator=torch.Generator().manual_seed(0))
    assert train.bigram_perplexity(coin, coin.view(100, 400), 2) == pytest.approx(2, rel=1e-2)


def test_learning_rate_rises_to_its_peak_and_falls_to_its_end() -> None:
    recipe = train.Recipe(steps=1000, warmup=100)
    rates = [train.learning_rate(step, recipe) for step in range(recipe.steps)]
    assert max(rates) == rates[99] == rates[100] == recipe.learning_rate
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.final_learning_rate, rel=0.01)
    assert rates[550] == pytest.approx((recipe.learning_rate + recipe.final_learning_rate) / 2)


def test_balance_is_judged_layer_by_layer() -> None:
    """Each layer has one busy pair of experts, not the same; pooled, this would look more balanced."""
    config = train.model_config(train.Recipe())
    even = torch.eye(8).repeat(4, 1) * 20 + torch.eye(8).roll(1, 0).repeat(4, 1) * 19
    busy = torch.tensor([20.0, 20.0, 0, 0, 0, 0, 0, 0]).repeat(32, 1)
    assert train.balance_loss((even, even), config).item() == pytest.approx(2, rel=1e-2)
    assert train.balance_loss((busy, busy.roll(2, 1)), config).item() == pytest.approx(8, rel=1e-2)


def test_batches_cover_a_pass_without_repeats_and_are_repeatable() -> None:
    recipe = train.Recipe(sequence_length=4, batch_size=2)
    stream = torch.arange(4 * 20 + 4)
    supply = train.batches(stream, recipe)
    first_pass = torch.stack([next(supply) for _ in range(10)])
    assert first_pass.unique().numel() == first_pass.numel() == 80
    again = train.batches(stream, recipe)
    assert torch.equal(first_pass, torch.stack([next(again) for _ in range(10)]))
    assert len(next(supply)) == recipe.batch_size
