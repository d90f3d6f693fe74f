"""The loss of a student: against its parts computed alone, and where its gradients go."""

from __future__ import annotations

from typing import Any

import pytest
import support
import tiny_models
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from llmcompressor_moe.recovery.alignment import Alignment, align, layout_for_alignment
from llmcompressor_moe.recovery.losses import IGNORED, TopLogits
from llmcompressor_moe.recovery.objective import LossParts, LossWeights, Objective
from llmcompressor_moe.recovery.teacher import CachedTeacher, LiveTeacher, TeacherSignals
from llmcompressor_moe.topology import find_topology

FAMILIES = ["mixtral", "qwen2_moe", "olmoe", "granitemoe", "deepseek_v3", "glm4_moe"]
ALL = LossWeights(
    next_token=0.3,
    logits_kl=0.5,
    router_kl=0.7,
    expert_output=1.1,
    hidden=1.3,
    load_balancing=0.2,
    temperature=2,
)


def batch(**more: Any) -> dict[str, Any]:
    return {"input_ids": support.token_ids(2, 9), **more}


def only(name: str, **more: Any) -> LossWeights:
    return LossWeights(**{"logits_kl": 0, name: 1, **more})


def aligned(student: PreTrainedModel, teacher: PreTrainedModel) -> Alignment:
    return align(layout_for_alignment(student), layout_for_alignment(teacher))


def loss(
    student: nn.Module, teacher: PreTrainedModel, weights: LossWeights, given: dict[str, Any] | None = None
) -> LossParts:
    alignment = aligned(teacher, teacher)
    given = batch() if given is None else given
    signals = LiveTeacher(teacher, weights, alignment).signals(given)
    return Objective(weights, alignment)(student, given, signals)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_has_nothing_to_learn_from_its_teacher(family: str) -> None:
    teacher, same = tiny_models.build(family), tiny_models.build(family)
    found = loss(same, teacher, ALL)
    for name in ("logits_kl", "router_kl", "expert_output", "hidden"):
        assert abs(found.parts[name]) < 1e-6
    other = loss(tiny_models.build(family, seed=1), teacher, ALL)
    assert all(other.parts[name] > 0.05 for name in other.parts)
    assert found.parts.keys() == other.parts.keys() == set(ALL.used)


def test_the_total_is_the_weighted_sum() -> None:
    teacher, student = tiny_models.build("mixtral"), tiny_models.build("mixtral", seed=1)
    found = loss(student, teacher, ALL)
    expected = sum(getattr(ALL, name) * value for name, value in found.parts.items())
    torch.testing.assert_close(found.total.detach(), expected)
    assert found.total.requires_grad and not any(value.requires_grad for value in found.parts.values())
    for name in ALL.used:
        alone = loss(student, teacher, only(name, temperature=2))
        assert alone.parts.keys() == {name}
        torch.testing.assert_close(alone.total.detach(), found.parts[name])


def test_parts_of_a_trimmed_student_by_hand() -> None:
    """A student of blocks 0 and 3 of four: what is compared is written out here once more, from stock outputs."""
    teacher, student = tiny_models.build("mixtral"), tiny_models.build("mixtral", num_layers=2, num_experts=5)
    kept = ((0, 1, 2, 5, 7), (1, 2, 3, 4, 6))
    alignment = Alignment({0: 2, 1: 3}, {0: (0, kept[0]), 1: (3, kept[1])})
    weights = LossWeights(logits_kl=0, router_kl=1, expert_output=1, hidden=1)
    signals = LiveTeacher(teacher, weights, alignment).signals(batch())
    found = Objective(weights, alignment)(student, batch(), signals).parts

    def run(model: PreTrainedModel) -> dict[str, Any]:
        layers, seen = model.model.layers, {"layer": {}, "block": {}}
        for index, block in enumerate(layers):
            for name, module in (("layer", block.mlp), ("block", block)):
                module.register_forward_hook(
                    lambda _m, _a, output, at=index, to=seen[name]: to.__setitem__(at, output.detach())
                )
        output = model(**batch(), output_router_logits=True)
        return {**seen, "router": [logits.detach() for logits in output.router_logits]}

    theirs, ours = run(teacher), run(student)
    divergences, errors, hidden = [], [], []
    for position, (block, names) in alignment.layers.items():
        p = theirs["router"][block].softmax(-1)[:, list(names)]
        p = p / p.sum(-1, keepdim=True)
        q = ours["router"][position].softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1).mean())
        t, s = theirs["layer"][block], ours["layer"][position]
        errors.append((((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean())
    for position, block in alignment.blocks.items():
        t, s = theirs["block"][block], ours["block"][position]
        hidden.append((((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean())
    expected = {"router_kl": divergences, "expert_output": errors, "hidden": hidden}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.stack(values).mean(), atol=1e-5, rtol=1e-4)


# Where gradients go


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_each_loss(family: str) -> None:
    teacher, student = tiny_models.build(family), tiny_models.build(family, seed=1).train()
    topology = find_topology(student)
    last = topology.blocks[-1]
    reached: dict[str, set[str]] = {}
    for name in ("next_token", "logits_kl", "router_kl", "expert_output", "hidden", "load_balancing"):
        student.zero_grad()
        loss(student, teacher, only(name)).total.backward()
        reached[name] = {
            path
            for path, parameter in student.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().max() > 0
        }
        assert any(path.startswith(f"{last.moe.router}.") for path in reached[name])
    head = {name for name, module in student.named_modules() if module is student.get_output_embeddings()}
    (head,) = head
    experts = f"{last.moe.experts}."
    for name, paths in reached.items():
        assert any(path.startswith(head) for path in paths) == (name in ("next_token", "logits_kl"))
        # The last layer's experts stand behind every router.
        assert any(path.startswith(experts) for path in paths) == (
            name not in ("router_kl", "load_balancing")
        )
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["logits_kl", "router_kl", "expert_output", "hidden"])
def test_training_on_a_loss_lowers_it(name: str) -> None:
    teacher, student = (
        tiny_models.build("qwen2_moe", num_layers=2),
        tiny_models.build("qwen2_moe", num_layers=2, seed=1),
    )
    alignment, weights = aligned(student, teacher), only(name)
    signals = LiveTeacher(teacher, weights, alignment).signals(batch())
    objective = Objective(weights, alignment)
    optimizer = torch.optim.Adam(student.train().parameters(), lr=3e-3)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        found = objective(student, batch(), signals)
        found.total.backward()
        optimizer.step()
        values.append(found.total.item())
    assert values[-1] < 0.6 * values[0]


# What counts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_padding_does_not_count(family: str) -> None:
    teacher, student = tiny_models.build(family), tiny_models.build(family, seed=1)
    ids = support.token_ids(1, 9)
    padded = torch.cat([ids, torch.full((1, 4), 3)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.long)], dim=1)
    plain = loss(student, teacher, ALL, {"input_ids": ids})
    found = loss(student, teacher, ALL, {"input_ids": padded, "attention_mask": mask})
    for name, value in plain.parts.items():
        torch.testing.assert_close(found.parts[name], value, atol=1e-4, rtol=1e-4)


def test_labels_say_which_predictions_count() -> None:
    teacher, student = tiny_models.build("mixtral"), tiny_models.build("mixtral", seed=1)
    ids = support.token_ids(1, 9)
    labels = ids.clone()
    labels[:, :6] = IGNORED
    found = loss(student, teacher, ALL, {"input_ids": ids, "labels": labels, "row": torch.tensor([0])})
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits[0, 5:8] for model in (student, teacher))
    torch.testing.assert_close(found.parts["next_token"], F.cross_entropy(ours, ids[0, 6:9]))
    expected = 4 * F.kl_div(
        (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(found.parts["logits_kl"], expected)
    # Inside the model every token counts.
    everywhere = loss(student, teacher, ALL, {"input_ids": ids})
    torch.testing.assert_close(found.parts["router_kl"], everywhere.parts["router_kl"])


def test_next_token_is_the_model_s_own_loss() -> None:
    student = tiny_models.build("olmoe")
    with torch.no_grad():
        expected = student(**batch(labels=batch()["input_ids"]), output_router_logits=False).loss
        found = Objective(only("next_token"))(student, batch())
    torch.testing.assert_close(found.total, expected)


def test_two_batches_have_the_loss_of_one() -> None:
    teacher, student = tiny_models.build("mixtral"), tiny_models.build("mixtral", seed=1)
    weights = ALL.model_copy(update={"load_balancing": 0.0})
    whole = loss(student, teacher, weights).total
    ids = batch()["input_ids"]
    halves = [loss(student, teacher, weights, {"input_ids": ids[row : row + 1]}).total for row in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_only_the_highest_logits_are_known() -> None:
    teacher, student = tiny_models.build("mixtral"), tiny_models.build("mixtral", seed=1)
    weights = LossWeights(logits_kl=1, temperature=2)
    with torch.no_grad():
        logits = teacher(**batch()).logits
    values, indices = logits.topk(128, dim=-1)
    top = TopLogits(values, indices, (logits / 2).logsumexp(-1), 2.0)

    class Kept:
        def top(self, rows: torch.Tensor) -> TopLogits:
            assert rows.tolist() == [7, 5]
            return top

    given = batch(row=torch.tensor([7, 5]))
    found = Objective(weights)(student, given, CachedTeacher(Kept()).signals(given))
    torch.testing.assert_close(found.total, loss(student, teacher, weights).total, atol=1e-4, rtol=1e-4)


# Students of any kind


def test_wrapped_students() -> None:
    teacher, student = tiny_models.build("mixtral"), tiny_models.build("mixtral", seed=1)

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    plain = loss(student, teacher, ALL)
    torch.testing.assert_close(loss(Wrapper(student), teacher, ALL).total, plain.total)


def test_a_dense_student() -> None:
    teacher = tiny_models.build("qwen3_moe")
    config = Qwen3Config(
        vocab_size=tiny_models.VOCAB,
        hidden_size=tiny_models.HIDDEN,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    student = Qwen3ForCausalLM(config)
    weights = LossWeights(next_token=1, logits_kl=1, hidden=1)
    alignment = aligned(student, teacher)
    signals = LiveTeacher(teacher, weights, alignment).signals(batch())
    found = Objective(weights, alignment)(student, batch(), signals)
    found.total.backward()
    assert student.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    with torch.no_grad():
        ours, theirs = (
            model(**batch(), output_hidden_states=True).hidden_states for model in (student, teacher)
        )
    # transformers reports the last block behind the final norm; the others as they are.
    inner = [
        (((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean() for s, t in zip(ours[1:4], theirs[1:4], strict=True)
    ]
    alone = Alignment({index: index for index in range(3)}, {})
    only_hidden = only("hidden")
    signals = LiveTeacher(teacher, only_hidden, alone).signals(batch())
    torch.testing.assert_close(
        Objective(only_hidden, alone)(student, batch(), signals).total, torch.stack(inner).mean()
    )


# Bad input


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"logits_kl": 0}, "all weights are 0.*next_token, logits_kl, router_kl"),
        ({"router_kl": -1}, "router_kl"),
        ({"hidden": float("inf")}, "hidden"),
        ({"logits_kl": float("nan")}, "logits_kl"),
        ({"temperature": 0}, "temperature"),
        ({"kl": 1}, "kl"),
    ],
)
def test_weights_that_make_no_loss(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        LossWeights(**weights)


def test_what_the_losses_lack_is_named() -> None:
    model = tiny_models.build("mixtral", num_layers=2)
    with pytest.raises(ValueError, match="router_kl, hidden compare parts"):
        Objective(LossWeights(router_kl=1, hidden=1))
    with pytest.raises(ValueError, match="hidden compare parts"):
        LiveTeacher(model, LossWeights(hidden=1))
    with pytest.raises(ValueError, match="router_kl need MoE layers, and the student has none"):
        Objective(LossWeights(router_kl=1), Alignment({0: 0}, {}))
    with pytest.raises(ValueError, match="logits_kl needs the teacher's logits"):
        Objective(LossWeights())(model, batch())
    with pytest.raises(ValueError, match="signals have no router_logits of block 0"):
        Objective(only("router_kl"), aligned(model, model))(model, batch(), TeacherSignals())
    dense = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with pytest.raises(ValueError, match="load_balancing needs MoE layers, and Qwen3ForCausalLM has none"):
        Objective(only("load_balancing"))(dense, batch())
