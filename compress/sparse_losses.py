"""Losses against a few of the teacher's probabilities: the top k with a ghost bucket, and random samples.

Both take their targets from a cache, or make them of whole logits. As in `divergences` each has a plain form and one of
rows with the gradient by hand; q = softmax(z / T), where T is the temperature that the targets were taken at.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgewright.compress.divergences import at_least_float32, check_places, check_temperature
from edgewright.compress.targets import Sampled, TopK
from edgewright.errors import RecipeError

SMALLEST_REST = 1e-7
"""What a student leaves to all other tokens counts as at least this, below which float32 cannot tell it from 0."""


def top_k(student_logits: Tensor, teacher_logits: Tensor | TopK, *, k: int = 50, temperature: float = 1.0) -> Tensor:
    """Forward KL over the teacher's k most probable tokens and a ghost bucket for all others.

    sum_K t log(t / q) + (1 - A) log((1 - A) / (1 - Q)), A = sum_K t, Q = sum_K q. Without the bucket the student would
    learn t / A, over-confident (Sparse Logit Sampling, arXiv 2503.16870); with it the mass of the tail is
    right and its shape is free. It is the forward KL of both distributions coarsened, so never more than `forward_kl`.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], or what was kept of them, by rows; then `k` is not used and `temperature` has to be
            theirs.

    Returns:
        Scalar, T^2 * mean over tokens, nats.

    Raises:
        RecipeError: EW-780, a temperature that is not above 0 or not that of the targets; a k above the vocabulary;
            targets of other places.
    """
    check_temperature(temperature)
    if isinstance(teacher_logits, Tensor):
        check_places(student_logits, teacher_logits)
        teacher_logits = TopK.of(by_rows(at_least_float32(teacher_logits)), k, temperature=temperature)
    student_logits = by_rows(student_logits)
    check_places(student_logits, teacher_logits.ids)
    check_taken_at(teacher_logits.temperature, temperature)
    log_q = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_t, tail, filler = _normalised(teacher_logits.within(log_q.shape[-1]))
    log_head = log_q.gather(-1, teacher_logits.within(log_q.shape[-1]).ids)
    rest = (1.0 - log_head.exp().masked_fill(filler, 0.0).sum(-1)).clamp_min(SMALLEST_REST)
    head = (log_t.exp() * (log_t - log_head).masked_fill(filler, 0.0)).sum(-1)
    return temperature**2 * (head + torch.xlogy(tail, tail) - tail * rest.log()).mean()


def top_k_rows(log_q: Tensor, targets: TopK) -> tuple[Tensor, Tensor]:
    """Gradient q - t on the head, q (1 - (1 - A) / (1 - Q)) on the tail."""
    targets = targets.within(log_q.shape[-1])
    log_t, tail, filler = _normalised(targets)
    t, log_head = log_t.exp(), log_q.gather(-1, targets.ids)
    q_head = log_head.exp().masked_fill_(filler, 0.0)
    rest = (1.0 - q_head.sum(-1)).clamp_min_(SMALLEST_REST)
    loss = (t * (log_t - log_head).masked_fill_(filler, 0.0)).sum(-1) + torch.xlogy(tail, tail) - tail * rest.log()
    ratio = (tail / rest)[:, None]
    gradient = log_q.exp().mul_(1.0 - ratio)
    return loss, gradient.scatter_add_(-1, targets.ids, q_head.mul_(ratio).sub_(t))


def rs_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | Sampled,
    *,
    samples: int = 50,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random-sampling distillation: -sum_u w_u log q_u over tokens drawn from the teacher (RS-KD, arXiv 2503.16870).

    The weights have the teacher's probabilities as their mean, and so the gradient that of forward KL: q - t. The value
    has the teacher's entropy in it, which is no part of the gradient, and is not 0 for equal distributions.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], of which samples are drawn, or what was drawn, by rows.
        samples: draws for each token.
        generator: of the draws; None: torch's own.

    Returns:
        Scalar, T^2 * mean over tokens, nats.

    Raises:
        RecipeError: EW-780, a temperature that is not above 0 or not that of the targets; no sample; targets of other
            places.
    """
    check_temperature(temperature)
    if isinstance(teacher_logits, Tensor):
        if samples < 1:
            raise RecipeError("EW-780", "there is nothing to draw", expected="samples of at least 1", found=samples)
        check_places(student_logits, teacher_logits)
        logits = by_rows(at_least_float32(teacher_logits))
        teacher_logits = Sampled.of(logits, samples, temperature=temperature, generator=generator)
    student_logits = by_rows(student_logits)
    check_places(student_logits, teacher_logits.ids)
    check_taken_at(teacher_logits.temperature, temperature)
    log_q = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    targets = teacher_logits.within(log_q.shape[-1])
    return temperature**2 * -(targets.weights * log_q.gather(-1, targets.ids)).sum(-1).mean()


def rs_kd_rows(log_q: Tensor, targets: Sampled) -> tuple[Tensor, Tensor]:
    """Gradient q sum(w) - w."""
    targets = targets.within(log_q.shape[-1])
    weights = targets.weights.to(log_q.dtype)
    loss = -(weights * log_q.gather(-1, targets.ids)).sum(-1)
    return loss, log_q.exp().mul_(weights.sum(-1, keepdim=True)).scatter_add_(-1, targets.ids, -weights)


def by_rows(logits: Tensor) -> Tensor:
    """[..., V] -> [N, V]"""
    return logits.reshape(-1, logits.shape[-1])


def check_taken_at(theirs: float, wanted: float) -> None:
    """Refuse targets of another temperature: what is missing of them cannot be divided again (EW-780)."""
    if theirs != wanted:
        raise RecipeError(
            "EW-780",
            "the targets were taken at another temperature",
            expected=f"temperature: {theirs}, as the targets have",
            found=wanted,
            fix=f"temperature: {theirs} for this loss, or targets taken at {wanted}",
        )


def _normalised(targets: TopK) -> tuple[Tensor, Tensor, Tensor]:
    """(log t [N, K], tail [N], filler [N, K]): together exactly 1, whatever a narrow type made of them."""
    filler = targets.log_probs == -torch.inf
    total = targets.log_probs.exp().sum(-1) + targets.tail
    return targets.log_probs - total.log()[:, None], targets.tail / total, filler
