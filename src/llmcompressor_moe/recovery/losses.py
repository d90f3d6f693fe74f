"""What a student is trained on: pure functions from tensors to one number that has a gradient.

Every loss is a mean over tokens, so that the mean over equally large batches is the loss of all of them (but
`load_balancing`, which is about one batch). Probabilities are computed in fp32 whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

__all__ = [
    "IGNORED",
    "TopLogits",
    "load_balancing",
    "logits_kl",
    "matching",
    "next_token",
    "predicting",
    "router_kl",
    "top_logits_kl",
]

# transformers and torch.nn.functional.cross_entropy agree on it.
IGNORED = -100
# Nothing is known of a probability below fp32's own step at 1.
_SMALLEST_REST = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class TopLogits:
    """The teacher's highest logits, and what it takes to turn them into probabilities.

    :param values: [..., k] logits
    :param indices: [..., k] int64, their places in the vocabulary
    :param log_normalizer: [...] logsumexp of all logits over ``temperature``
    :param temperature: the one that ``log_normalizer`` is of
    """

    values: torch.Tensor
    indices: torch.Tensor
    log_normalizer: torch.Tensor
    temperature: float = 1.0

    def to(self, device: torch.device) -> TopLogits:
        """The same on another device."""
        moved = (part.to(device) for part in (self.values, self.indices, self.log_normalizer))
        return TopLogits(*moved, self.temperature)


def next_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token given those before it, in nats: what language models are trained on.

    :param logits: [batch, sequence, vocabulary]
    :param labels: [batch, sequence] token ids as they stand in the text, not shifted; -100 is not to be predicted
    :return: the mean over predicted tokens; 0 where there is none
    """
    targets = labels[:, 1:].reshape(-1)
    chosen = targets != IGNORED
    predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
    total = F.cross_entropy(predicted.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / chosen.sum().clamp(min=1)


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Boolean [batch, sequence]: positions whose logits predict a token that counts in `next_token`.

    :param labels: see `next_token`
    """
    last = torch.zeros_like(labels[:, :1], dtype=torch.bool)
    return torch.cat([labels[:, 1:] != IGNORED, last], dim=1)


def logits_kl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """KL(teacher || student) of the predicted tokens, both softened, times the temperature squared; in nats.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (https://arxiv.org/abs/1503.02531),
    section 2: soft targets from logits over T, and gradients scaled by T^2 so that other losses keep their share.

    :param student: [..., vocabulary] logits
    :param teacher: the same shape
    :param mask: boolean [...], the predictions that count; None: all
    :return: the mean over them; 0 where there is none
    :raises ValueError: the shapes differ
    """
    _same_shape(student, teacher, "logits")
    divergence = _divergence(_kept(teacher, mask), _kept(student, mask), temperature)
    return _mean(divergence) * temperature**2


def top_logits_kl(
    student: torch.Tensor, top: TopLogits, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """`logits_kl` where only the teacher's highest logits are known: all other tokens are taken as one outcome.

    A lower bound of `logits_kl` (data processing), equal to it where all logits are known. Taking the rest as one
    outcome is the "ghost token" of Anshumann et al.: Sparse Logit Sampling (https://arxiv.org/abs/2503.16870);
    renormalising the top instead would teach too much confidence.

    :param student: [..., vocabulary] logits
    :param top: of the same predictions
    :param mask: boolean [...], the predictions that count; None: all
    :return: the mean over them, in nats times the temperature squared; 0 where there is none
    :raises ValueError: ``top`` is of another temperature or of other predictions
    """
    if top.temperature != temperature:
        raise ValueError(
            f"temperature is {temperature}, and the teacher's top logits were kept for {top.temperature}: use "
            "that, or keep them again."
        )
    if top.values.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"the teacher's top logits are of predictions {tuple(top.values.shape[:-1])}, the student's of "
            f"{tuple(student.shape[:-1])}: give both the same batch."
        )
    logits = _kept(student, mask).float() / temperature
    values, indices = (_kept(part, mask) for part in (top.values, top.indices))
    normalizer = _kept(top.log_normalizer.unsqueeze(-1), mask).float()
    known = values.float() / temperature - normalizer
    answered = logits.gather(-1, indices) - logits.logsumexp(dim=-1, keepdim=True)
    rest = (1 - known.exp().sum(dim=-1)).clamp(min=_SMALLEST_REST)
    rest_answered = (1 - answered.exp().sum(dim=-1)).clamp(min=_SMALLEST_REST)
    divergence = (known.exp() * (known - answered)).sum(dim=-1) + rest * (rest.log() - rest_answered.log())
    return _mean(divergence) * temperature**2


def router_kl(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    kept: Sequence[int],
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(teacher || student) of a router's probabilities over its experts, in nats.

    Hinton, Vinyals, Dean (https://arxiv.org/abs/1503.02531), section 2, at temperature 1, on a router's logits.
    The teacher's distribution is restricted to the experts that are left and renormalised (a softmax over their
    logits is just that), as `routing.fidelity` measures it. It is not the "Router KD" of Hyeon and Do
    (https://arxiv.org/abs/2603.02217), which trains routers on the teacher's next tokens: that is `logits_kl`.

    :param teacher_logits: [tokens, experts] whose softmax are the router's probabilities
    :param student_logits: [tokens, experts that are left]
    :param kept: the teacher's index of each of the student's experts
    :param mask: boolean [tokens], False for padding; None: all count
    :return: the mean over tokens; 0 where there is none
    :raises ValueError: ``kept`` does not name the student's experts, or the tokens are not the same
    """
    columns, experts = list(kept), teacher_logits.shape[-1]
    if len(set(columns)) != len(columns) or any(not 0 <= column < experts for column in columns):
        raise ValueError(f"kept={columns} must be distinct indices under {experts}, the teacher's experts.")
    if student_logits.shape[-1] != len(columns):
        raise ValueError(
            f"the student's router has {student_logits.shape[-1]} experts and kept names {len(columns)}: name the "
            "teacher's index of each expert that is left."
        )
    teacher = teacher_logits[..., torch.tensor(columns, device=teacher_logits.device)]
    _same_shape(student_logits, teacher, "router logits")
    return _mean(_divergence(_kept(teacher, mask), _kept(student_logits, mask)))


def matching(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error of vectors, over the squared length of the teacher's: 0 is equal, 1 as good as zeros.

    The hidden-state loss of Jiao et al.: TinyBERT (https://arxiv.org/abs/1909.10351), equation 8, without its
    projection (widths are the same) and relative, so that layers of any magnitude count alike. It is relative
    token by token because a few tokens, the first one above all, have activations hundreds of times larger
    (Sun et al., https://arxiv.org/abs/2402.17762) and would be all that counts.

    :param student: [..., width]
    :param teacher: the same shape
    :param mask: boolean [...], False for padding; None: all count
    :return: the mean over tokens whose teacher's vector is not zero, no unit; 0 where there is none
    :raises ValueError: the shapes differ
    """
    _same_shape(student, teacher, "outputs")
    theirs = _kept(teacher, mask).float()
    error = (_kept(student, mask).float() - theirs).square().sum(dim=-1)
    power = theirs.square().sum(dim=-1)
    there = power > 0
    return (error / power.where(there, 1.0)).where(there, 0.0).sum() / there.sum().clamp(min=1)


def load_balancing(router_logits: torch.Tensor, top_k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly a router loads its experts: experts x the sum over them of share of choices x mean probability.

    Fedus, Zoph, Shazeer: Switch Transformers (https://arxiv.org/abs/2101.03961), equations 4 to 6, for top_k
    choices as transformers computes it for one layer: ``top_k`` where all are loaded alike, up to ``experts`` x
    that. Only the probability has a gradient.

    :param router_logits: [tokens, experts] whose softmax are the router's probabilities
    :param mask: boolean [tokens], False for padding; None: all count
    :return: over all tokens of this batch, no unit; 0 where there is none
    """
    probabilities = _kept(router_logits, mask).float().softmax(dim=-1)
    tokens, experts = probabilities.shape
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    share, mean = (values.sum(dim=0) / max(tokens, 1) for values in (chosen, probabilities))
    return experts * (share * mean).sum()


def _divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL of the softmax of two tensors of logits over a temperature, over the last dimension."""
    target, answer = ((logits.float() / temperature).log_softmax(dim=-1) for logits in (teacher, student))
    return F.kl_div(answer, target, reduction="none", log_target=True).sum(dim=-1)


def _kept(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[tokens that count, last dimension]."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if mask is None else flat[mask.reshape(-1).to(flat.device)]


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.sum() / max(values.numel(), 1)


def _same_shape(student: torch.Tensor, teacher: torch.Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's {what} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: give "
            "both the same batch, and a student with the teacher's vocabulary and width."
        )
