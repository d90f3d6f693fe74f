"""The bundled demo model and its texts: complete, small, loadable without a network, worth compressing."""

import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerBase

from llmcompressor_moe import demo
from llmcompressor_moe.evaluation import perplexity

LENGTH = 256
SIZE_LIMIT = 12 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo.DEMO_MODEL)


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    model, loading = AutoModelForCausalLM.from_pretrained(
        demo.DEMO_MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def heldout(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Every fourth row, for speed: 40 rows from all kinds of text."""
    return torch.tensor(demo.heldout_rows(tokenizer, LENGTH))[::4]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_model_and_texts_fit_into_the_size_that_was_promised() -> None:
    names = {path.name for path in demo.DEMO_MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert _bytes(demo.DEMO_MODEL) + _bytes(demo.DEMO_HELDOUT.parent) <= SIZE_LIMIT


def test_has_the_shape_that_the_recipes_count_on(model: MixtralForCausalLM) -> None:
    config = model.config
    assert type(model) is MixtralForCausalLM
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (8, 8, 2)
    assert config.hidden_size % 128 == 0 and config.intermediate_size % 128 == 0
    assert AutoModelForCausalLM.from_pretrained(demo.DEMO_MODEL).dtype is torch.bfloat16


def test_tokenizer_gives_every_text_back_after_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in [*demo.heldout_texts()[::10], "Naïve façade — 1,234 \N{SNOWMAN}?\n\tEnd"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 2048
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_predicts_far_better_than_word_frequencies(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, heldout: torch.Tensor
) -> None:
    seen = torch.tensor(demo.token_rows(tokenizer, demo.calibration_texts(), LENGTH)).flatten()
    counts = torch.bincount(seen, minlength=len(tokenizer)).double() + 1
    unigram = math.exp(-(counts / counts.sum()).log()[heldout[:, 1:]].mean().item())
    assert perplexity(model, heldout) < unigram / 15


def test_uses_what_stands_far_before_a_token(model: MixtralForCausalLM, heldout: torch.Tensor) -> None:
    """Four tokens of context are worth far less than 250: this is more than a table of short phrases."""
    next_tokens = heldout[:, -4:].reshape(-1, 1)
    windows = heldout.unfold(1, 5, 1)[:, -4:].flatten(0, 1)
    with torch.no_grad():
        short = model(input_ids=windows[:, :-1]).logits[:, -1].log_softmax(-1)
        long = model(input_ids=heldout[:, :-1]).logits[:, -4:].flatten(0, 1).log_softmax(-1)
    advantage = (long - short).gather(1, next_tokens).mean().item()
    assert advantage > 0.15


def test_every_expert_of_every_layer_gets_its_share(model: MixtralForCausalLM, heldout: torch.Tensor) -> None:
    with torch.no_grad():
        router_logits = model(input_ids=heldout, output_router_logits=True).router_logits
    assert len(router_logits) == 8
    for layer in router_logits:
        chosen = layer.topk(2, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=8) / chosen.numel()
        assert share.min() > 0.01


def test_calibration_and_heldout_share_no_passage_and_no_paragraph() -> None:
    calibration, heldout = demo.calibration_texts(), demo.heldout_texts()
    assert len(calibration) > 90 and len(heldout) > 50

    def paragraphs(texts: list[str]) -> Counter:
        return Counter(line for text in texts for line in text.split("\n"))

    ours, theirs = paragraphs(calibration), paragraphs(heldout)
    assert not ours.keys() & theirs.keys()
    assert max(ours.values()) == max(theirs.values()) == 1


def test_calibration_and_heldout_share_hardly_any_long_phrase() -> None:
    def phrases(texts: list[str], words: int = 12) -> set[tuple[str, ...]]:
        tokens = [text.split() for text in texts]
        return {tuple(t[i : i + words]) for t in tokens for i in range(len(t) - words + 1)}

    heldout = phrases(demo.heldout_texts())
    assert len(heldout & phrases(demo.calibration_texts())) < 0.01 * len(heldout)


def test_texts_hold_no_empty_line_inside_a_passage() -> None:
    for text in (*demo.calibration_texts(), *demo.heldout_texts()):
        assert text and all(line.strip() == line and line for line in text.split("\n"))


@pytest.mark.parametrize(("num_samples", "length"), [(1, 256), (64, 256), (16, 512), (200, 128)])
def test_calibration_dataset_has_exactly_what_was_asked_for(
    tokenizer: PreTrainedTokenizerBase, num_samples: int, length: int
) -> None:
    dataset = demo.calibration_dataset(tokenizer, num_samples, length)
    assert len(dataset) == num_samples
    assert set(dataset.column_names) == {"input_ids", "attention_mask"}
    assert {len(row) for row in dataset["input_ids"]} == {length}
    assert {value for row in dataset["attention_mask"] for value in row} == {1}
    assert len({tuple(row) for row in dataset["input_ids"]}) == num_samples


def test_a_few_calibration_samples_come_from_all_over_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "\n".join(demo.calibration_texts())
    samples = demo.calibration_dataset(tokenizer, 5)["input_ids"]
    longest = [max(re.split(r"\n|<[^<>]+>", tokenizer.decode(ids)), key=len) for ids in samples]
    where = [text.index(line) / len(text) for line in longest]
    assert all(0.15 < later - earlier < 0.25 for earlier, later in pairwise(where))


@pytest.mark.parametrize("num_samples", [0, -1, 100_000])
def test_calibration_dataset_says_how_many_samples_there_are(
    tokenizer: PreTrainedTokenizerBase, num_samples: int
) -> None:
    with pytest.raises(ValueError, match=rf"num_samples is {num_samples}; .* has \d+ samples"):
        demo.calibration_dataset(tokenizer, num_samples)
    with pytest.raises(ValueError, match="sequence_length is 0; give at least 1"):
        demo.calibration_dataset(tokenizer, 1, 0)
