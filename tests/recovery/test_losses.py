"""Every loss against a computation by hand, in plain Python or by somebody else's code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llmcompressor_moe.profile.routing import RouterTrace
from llmcompressor_moe.recovery import losses
from llmcompressor_moe.recovery.losses import TopLogits
from llmcompressor_moe.routing.fidelity import routing_fidelity


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    highest = max(values)
    powers = [math.exp((value - highest) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def top_of(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    values, indices = logits.topk(k, dim=-1)
    return TopLogits(values, indices, (logits / temperature).logsumexp(dim=-1), temperature)


# Next token


def test_next_token_by_hand() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]]])
    labels = torch.tensor([[0, 2, 1]])
    expected = -(math.log(softmax([0, 1, 2])[2]) + math.log(softmax([3, 0, 0])[1])) / 2
    assert losses.next_token(logits, labels).item() == pytest.approx(expected)


def test_next_token_is_what_transformers_trains_on() -> None:
    logits, labels = random(2, 7, 11), torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    labels[0, :3] = losses.IGNORED
    labels[1, 6] = losses.IGNORED
    expected = ForCausalLMLoss(logits, labels, vocab_size=11)
    torch.testing.assert_close(losses.next_token(logits, labels), expected)
    assert losses.predicting(labels).sum() == 4 + 5


def test_predictions_that_count() -> None:
    labels = torch.tensor([[5, 6, losses.IGNORED, 7]])
    assert losses.predicting(labels).tolist() == [[True, False, True, False]]


# Logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logits_kl_by_hand(temperature: float) -> None:
    student, teacher = random(2, 3, 5), random(2, 3, 5, seed=1)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    divergences = [
        divergence(softmax(theirs, temperature), softmax(ours, temperature))
        for ours, theirs in zip(student[mask].tolist(), teacher[mask].tolist(), strict=True)
    ]
    expected = temperature**2 * sum(divergences) / 4
    found = losses.logits_kl(student, teacher, mask, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_of_logits_kl_is_the_difference_of_the_probabilities() -> None:
    # Hinton et al., equation 2: (softmax(z / T) - softmax(v / T)) / T, here times T^2 and over 6 predictions.
    student, teacher = random(2, 3, 5).requires_grad_(), random(2, 3, 5, seed=1)
    losses.logits_kl(student, teacher, temperature=2.0).backward()
    expected = 2.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 6
    torch.testing.assert_close(student.grad, expected.detach())


def test_half_precision_is_computed_in_full() -> None:
    student, teacher = random(4, 32).bfloat16(), random(4, 32, seed=1).bfloat16()
    found = losses.logits_kl(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses.logits_kl(student.float(), teacher.float()))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_logits_by_hand(temperature: float) -> None:
    student, teacher = random(4, 9), random(4, 9, seed=1)
    expected = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        highest = sorted(range(9), key=lambda token: -theirs[token])[:3]
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        known, answered = ([values[token] for token in highest] for values in (p, q))
        expected += divergence([*known, 1 - sum(known)], [*answered, 1 - sum(answered)])
    found = losses.top_logits_kl(student, top_of(teacher, 3, temperature), temperature=temperature)
    assert found.item() == pytest.approx(expected * temperature**2 / 4, rel=1e-4)


@given(st.integers(0, 2**16), st.integers(1, 12), st.sampled_from([0.7, 1.0, 3.0]))
def test_top_logits_are_a_lower_bound_that_all_logits_reach(seed: int, k: int, temperature: float) -> None:
    student, teacher = random(5, 12, seed=seed), random(5, 12, seed=seed + 1)
    full = losses.logits_kl(student, teacher, None, temperature).item()
    some, more = (
        losses.top_logits_kl(student, top_of(teacher, n, temperature), None, temperature).item()
        for n in (k, min(k + 1, 12))
    )
    slack = 1e-4 * (1 + full)
    assert -slack <= some <= more + slack and more <= full + slack
    if k == 12:
        assert some == pytest.approx(full, abs=slack)


@pytest.mark.parametrize("k", [1, 6])
def test_gradients_of_top_logits_stay_finite(k: int) -> None:
    # All of the vocabulary, and a teacher that is certain: nothing is left for the rest.
    teacher = torch.tensor([[80.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    for logits in ([0.0, 40.0, 0.0, 0.0, 0.0, 0.0], [90.0, 0.0, 0.0, 0.0, 0.0, 0.0]):
        student = torch.tensor([logits], requires_grad=True)
        losses.top_logits_kl(student, top_of(teacher, k)).backward()
        expected = student.softmax(-1) - teacher.softmax(-1)
        torch.testing.assert_close(student.grad, expected.detach(), atol=1e-5, rtol=0)


# Routers


@given(st.data())
def test_router_kl_over_the_experts_left_by_brute_force(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 7))
    kept = data.draw(
        st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts, unique=True).map(sorted)
    )
    seed, tokens = data.draw(st.integers(0, 2**16)), data.draw(st.integers(1, 5))
    mask = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    teacher, student = random(tokens, experts, seed=seed), random(tokens, len(kept), seed=seed + 1)
    divergences = []
    for token in range(tokens):
        if mask[token]:
            whole = softmax(teacher[token].tolist())
            left = [whole[expert] for expert in kept]
            renormalised = [value / sum(left) for value in left]
            divergences.append(divergence(renormalised, softmax(student[token].tolist())))
    expected = sum(divergences) / len(divergences) if divergences else 0.0
    found = losses.router_kl(teacher, student, kept, torch.tensor(mask)).item()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_router_kl_is_what_evaluation_reports() -> None:
    teacher, student, kept = random(20, 6), random(20, 4, seed=1), [0, 2, 3, 5]
    traces = [
        RouterTrace(torch.zeros_like(logits, dtype=torch.bool), logits.softmax(-1))
        for logits in (teacher, student)
    ]
    expected = routing_fidelity(*traces, kept).router_kl
    assert losses.router_kl(teacher, student, kept).item() == pytest.approx(expected, rel=1e-5)


def test_a_router_that_only_lost_experts_agrees() -> None:
    teacher, kept = random(9, 8), (1, 4, 6)
    student = teacher[:, list(kept)].clone().requires_grad_()
    loss = losses.router_kl(teacher, student, kept)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6


# What layers and blocks return


def test_matching_by_hand() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    student = torch.tensor([[3.0, 3.0], [2.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    mask = torch.tensor([True, True, True, False])
    # 1 of 25, 8 of 4; the third has no length to be held against.
    assert losses.matching(student, teacher, mask).item() == pytest.approx((1 / 25 + 8 / 4) / 2)


@given(st.integers(0, 2**16), st.floats(1e-3, 1e3))
def test_matching_has_no_unit(seed: int, scale: float) -> None:
    student, teacher = random(6, 8, seed=seed), random(6, 8, seed=seed + 1)
    torch.testing.assert_close(
        losses.matching(student * scale, teacher * scale),
        losses.matching(student, teacher),
        rtol=1e-4,
        atol=0,
    )
    assert losses.matching(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
    assert losses.matching(teacher, teacher).item() == 0


# Load


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_load_balancing_is_what_transformers_computes(top_k: int) -> None:
    logits, mask = random(24, 8), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    for given_mask in (None, mask):
        expected = load_balancing_loss_func((logits,), 8, top_k, given_mask)
        found = losses.load_balancing(
            logits, top_k, None if given_mask is None else given_mask.bool().reshape(-1)
        )
        torch.testing.assert_close(found, expected)


def test_load_balancing_at_its_ends() -> None:
    everyone = torch.eye(4) * 50
    assert losses.load_balancing(everyone, 1).item() == pytest.approx(1)
    one = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    assert losses.load_balancing(one, 1).item() == pytest.approx(4)


# All of them

LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "logits_kl": lambda student, mask: losses.logits_kl(student, random(6, 5, seed=9), mask, 2.0),
    "top_logits_kl": lambda student, mask: losses.top_logits_kl(
        student, top_of(random(6, 5, seed=9), 2), mask
    ),
    "router_kl": lambda student, mask: losses.router_kl(random(6, 8, seed=9), student, [0, 1, 3, 6, 7], mask),
    "matching": lambda student, mask: losses.matching(student, random(6, 5, seed=9), mask),
    "load_balancing": lambda student, mask: losses.load_balancing(student, 2, mask),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student = random(6, 5)
    mask = torch.tensor([True, True, False, True, False, True])
    ours = student.clone().requires_grad_()
    LOSSES[name](ours, mask).backward()
    assert ours.grad[mask].abs().max() > 1e-3 and ours.grad[~mask].abs().max() == 0
    step = 1e-2
    for place in [(0, 1), (3, 4), (5, 0)]:
        moved = [student.clone(), student.clone()]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (LOSSES[name](values, mask).item() for values in moved)
        assert ours.grad[place].item() == pytest.approx((up - down) / (2 * step), abs=2e-3, rel=2e-2)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "load_balancing"])
def test_two_halves_have_the_loss_of_the_whole(name: str) -> None:
    student = random(6, 5)
    halves = [torch.arange(6) < 3, torch.arange(6) >= 3]
    mean = sum(LOSSES[name](student, half) for half in halves) / 2
    torch.testing.assert_close(mean, LOSSES[name](student, None))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_from_is_no_loss(name: str) -> None:
    student = random(6, 5).requires_grad_()
    loss = LOSSES[name](student, torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_nothing_to_predict_is_no_loss() -> None:
    logits = random(1, 4, 5).requires_grad_()
    loss = losses.next_token(logits, torch.full((1, 4), losses.IGNORED))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.logits_kl(random(2, 5), random(2, 6)), r"\(2, 5\), the teacher's \(2, 6\)"),
        (lambda: losses.matching(random(2, 5), random(3, 5)), r"outputs have shape \(2, 5\)"),
        (lambda: losses.router_kl(random(2, 4), random(2, 2), [0, 1, 2]), "has 2 experts and kept names 3"),
        (lambda: losses.router_kl(random(2, 4), random(2, 2), [0, 4]), r"kept=\[0, 4\] must be distinct"),
        (lambda: losses.router_kl(random(2, 4), random(2, 2), [1, 1]), r"kept=\[1, 1\] must be distinct"),
        (lambda: losses.router_kl(random(2, 4), random(3, 2), [0, 1]), "router logits have shape"),
        (
            lambda: losses.top_logits_kl(random(2, 5), top_of(random(2, 5), 2), temperature=2.0),
            "temperature is 2.0, and the teacher's top logits were kept for 1.0",
        ),
        (lambda: losses.top_logits_kl(random(3, 5), top_of(random(2, 5), 2)), r"predictions \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
