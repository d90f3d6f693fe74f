"""Perplexity against the loss that transformers itself computes, and against a case known in closed form."""

import math

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from llmcompressor_moe.evaluation import mean_negative_log_likelihood, perplexity


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    )


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 64, (5, 17), generator=torch.Generator().manual_seed(1))


def test_equals_the_loss_of_transformers(model: MixtralForCausalLM, token_ids: torch.Tensor) -> None:
    with torch.no_grad():
        loss = model.eval()(input_ids=token_ids, labels=token_ids).loss.item()
    assert perplexity(model, token_ids) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_does_not_depend_on_the_batch_size(
    model: MixtralForCausalLM, token_ids: torch.Tensor, batch_size: int
) -> None:
    one_by_one = [perplexity(model, row[None]) for row in token_ids]
    mean = sum(map(math.log, one_by_one)) / len(one_by_one)
    assert mean_negative_log_likelihood(model, token_ids, batch_size) == pytest.approx(mean, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(token_ids: torch.Tensor) -> None:
    blank = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )
    torch.nn.init.zeros_(blank.lm_head.weight)
    assert perplexity(blank, token_ids) == pytest.approx(64, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_as_it_was(
    model: MixtralForCausalLM, token_ids: torch.Tensor, training: bool
) -> None:
    model.train(training)
    perplexity(model, token_ids)
    assert model.training is training


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 1), (1, 2, 3)])
def test_names_the_shape_it_cannot_use(model: MixtralForCausalLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"token_ids has shape .* give \(sequences, length\)"):
        perplexity(model, torch.zeros(shape, dtype=torch.long))


def test_names_the_batch_size_it_cannot_use(model: MixtralForCausalLM, token_ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        perplexity(model, token_ids, batch_size=0)
