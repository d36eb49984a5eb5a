"""Divergences between the teacher's and the student's distribution of the next token.

Each has two forms. The plain one, named as in recipes, is the textbook formula on whole logits, differentiated by
torch: for small work, and as the reference of the other. The one of rows, `*_rows`, takes log-probabilities of a few
tokens and gives the loss of each with the gradient derived by hand, so that nothing is kept for a backward pass.

q = softmax(z / T) of the student's logits z, t = softmax(z_t / T) of the teacher's, u = z / T. Plain forms are
T^2 * (mean over tokens): with the factor T^2 the size of the gradient stays about the same for every temperature
(Hinton et al., 2015, arXiv 1503.02531). Forms of rows are without T: their gradients are those with respect to u.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgewright.errors import RecipeError

RowDivergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log q [R, V], log t [R, V], both only read) -> (loss [R], gradient with respect to u [R, V], new memory)."""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward KL divergence, sum_v t log(t / q): covers all that the teacher deems possible (arXiv 1503.02531).

    Args:
        student_logits: [..., V]; teacher_logits: the same shape.
        temperature: T > 0.

    Returns:
        Scalar, T^2 * mean over tokens, nats; in the logits' precision, at least float32. So do all of this file.

    Raises:
        RecipeError: EW-780, a temperature that is not above 0, or logits of two shapes.
    """
    log_q, log_t = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_t, log_q).mean()


def forward_kl_rows(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient q - t."""
    t, gap = log_t.exp(), log_t - log_q
    loss = gap.mul_(t).sum(-1)
    return loss, torch.exp(log_q, out=gap).sub_(t)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Reverse KL divergence, sum_v q log(q / t): seeks the teacher's modes (MiniLLM, arXiv 2306.08543).

    MiniLLM takes it over whole sequences that the student writes; here it is that of each next token on given text.
    """
    log_q, log_t = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_q, log_t).mean()


def reverse_kl_rows(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient q (s - sum q s), s = log(q / t)."""
    return students_mean(log_q.exp(), log_q - log_t)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence, beta KL(t|m) + (1 - beta) KL(q|m), m = beta t + (1 - beta) q (GKD).

    Agarwal et al., 2024, arXiv 2306.13649, equation 1. It is continuous in beta: 0 at both ends, where J / beta tends
    to forward KL and J / (1 - beta) to reverse KL. The references put those two KLs themselves in place of the ends, so
    that their loss jumps there from almost 0.

    Args:
        beta: 0 to 1; 0.5 is the symmetric Jensen-Shannon divergence.
    """
    _share("beta", beta)
    log_q, log_t = log_probabilities(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(beta, log_t, log_q)
    return temperature**2 * (beta * _kl(log_t, log_m) + (1.0 - beta) * _kl(log_q, log_m)).mean()


def jsd_rows(log_q: Tensor, log_t: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Gradient (1 - beta) q (log(q / m) - KL(q|m))."""
    log_m = _log_mixture(beta, log_t, log_q)
    teachers = (log_t - log_m).mul_(log_t.exp()).sum(-1)
    students, gradient = students_mean(log_q.exp(), torch.sub(log_q, log_m, out=log_m))
    return beta * teachers + (1.0 - beta) * students, gradient.mul_(1.0 - beta)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Skewed forward KL, KL(t | alpha t + (1 - alpha) q): bounded by -log alpha (DistiLLM, arXiv 2402.03898).

    Args:
        alpha: 0 to 1; 0 is forward KL, 1 is always 0.
    """
    _share("alpha", alpha)
    log_q, log_t = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_t, _log_mixture(alpha, log_t, log_q)).mean()


def skew_forward_kl_rows(log_q: Tensor, log_t: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Gradient q sum(w) - w, w = (1 - alpha) t q / m."""
    gap = log_t - _log_mixture(alpha, log_t, log_q)
    loss = (gap * log_t.exp()).sum(-1)
    w = gap.add_(log_q).exp_().mul_(1.0 - alpha)
    return loss, log_q.exp().mul_(w.sum(-1, keepdim=True)).sub_(w)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Skewed reverse KL, KL(q | (1 - alpha) t + alpha q): bounded by -log alpha (DistiLLM, arXiv 2402.03898).

    Args:
        alpha: 0 to 1; 0 is reverse KL, 1 is always 0.
    """
    _share("alpha", alpha)
    log_q, log_t = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_q, _log_mixture(1.0 - alpha, log_t, log_q)).mean()


def skew_reverse_kl_rows(log_q: Tensor, log_t: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Gradient q (g - sum q g), g = log(q / m) + 1 - alpha q / m."""
    q, gap = log_q.exp(), log_q - _log_mixture(1.0 - alpha, log_t, log_q)
    loss = (gap * q).sum(-1)
    log_alpha = math.log(alpha) if alpha else -math.inf  # inside, since q / m alone may be too large for a float
    g = gap.sub_(gap.add(log_alpha).exp_())  # the 1 falls out
    return loss, students_mean(q, g)[1]


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Total variation distance, 1/2 sum_v |t - q|: 1 less the acceptance rate of a draft that samples (DistillSpec).

    Zhou et al., 2024, arXiv 2310.08461.
    """
    log_q, log_t = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * 0.5 * (log_t.exp() - log_q.exp()).abs().sum(-1).mean()


def total_variation_rows(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient -q (w - sum q w), w = 1 where q < t."""
    q = log_q.exp()
    short = log_t.exp().sub_(q)
    loss = short.clamp_min_(0.0).sum(-1)  # what q lacks is what it has too much
    return loss, students_mean(q, short.sign_().neg_())[1]


def lk_hybrid(
    student_logits: Tensor, teacher_logits: Tensor, *, decay: float = 3.0, temperature: float = 1.0
) -> Tensor:
    """Forward KL that gives way to total variation as a draft improves: l KL + (1 - l) TV, l = exp(-decay alpha).

    LK losses, arXiv 2602.23881. alpha = 1 - TV = sum_v min(t, q) is the acceptance rate; l carries no gradient. The
    reference takes one alpha for a whole batch; here each token has its own, so that a step does not depend on how it
    is cut into micro-batches.

    Args:
        decay: at least 0; 0 is forward KL.
    """
    log_q, log_t = log_probabilities(student_logits, teacher_logits, temperature)
    variation = 0.5 * (log_t.exp() - log_q.exp()).abs().sum(-1)
    share = torch.exp(decay * (variation.detach() - 1.0))
    return temperature**2 * (share * _kl(log_t, log_q) + (1.0 - share) * variation).mean()


def lk_hybrid_rows(log_q: Tensor, log_t: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """Gradient l (q - t) - (1 - l) q (w - sum q w), w = 1 where q < t."""
    variation, gradient = total_variation_rows(log_q, log_t)
    share = torch.exp(decay * (variation - 1.0))
    divergence, of_kl = forward_kl_rows(log_q, log_t)
    gradient.lerp_(of_kl, share[:, None])
    return share * divergence + (1.0 - share) * variation, gradient


def log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(z / T) of both, at least in float32.

    Raises:
        RecipeError: EW-780.
    """
    check_temperature(temperature)
    if student.shape != teacher.shape:
        raise RecipeError(
            "EW-780",
            "student's and teacher's logits have two shapes",
            expected=f"teacher_logits of shape {list(student.shape)}, as the student's",
            found=list(teacher.shape),
            fix="cut both to the vocabulary that they share, or use uld for another tokenizer",
        )
    return (
        F.log_softmax(at_least_float32(student) / temperature, dim=-1),
        F.log_softmax(at_least_float32(teacher) / temperature, dim=-1),
    )


def check_places(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits, or targets, of other places than the student's: all dimensions but the last (EW-780)."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise RecipeError(
            "EW-780",
            "student and teacher speak of different places",
            expected=f"{list(student.shape[:-1])} places, as student_logits has",
            found=list(teacher.shape[:-1]),
        )


def check_temperature(temperature: float) -> None:
    """Refuse what is no temperature (EW-780)."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise RecipeError("EW-780", "this is no temperature", expected="a number above 0", found=temperature)


def at_least_float32(logits: Tensor) -> Tensor:
    """float64 as it is, all else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise RecipeError("EW-780", f"{name} is a share", expected="0 to 1", found=value)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a|b) of every row."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(share a + (1 - share) b), stably; new memory."""
    if share in (0.0, 1.0):
        return (log_a if share else log_b).clone()
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def students_mean(q: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(sum q s, q (s - sum q s)): expectation of s under the student, and what it does to u; takes s's memory."""
    mean = (q * s).sum(-1)
    return mean, s.sub_(mean[:, None]).mul_(q)
