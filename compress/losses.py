"""Distillation losses: a chunk rule for training, and a plain form on whole logits for small work and as reference.

z student logits, z_t teacher logits, q = softmax(z / T), t = softmax(z_t / T). With the factor T^2 the size of the
gradient stays about the same for every temperature (Hinton et al., 2015, arXiv 1503.02531).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgewright.chunked import IGNORED, ChunkRule
from edgewright.compress.targets import Logits, Targets


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward KL divergence T^2 * mean over tokens of sum_v t log(t / q).

    Args:
        student_logits: [..., V]; teacher_logits: the same shape.
        temperature: T > 0.

    Returns:
        Scalar in the logits' precision, at least float32.
    """
    log_q = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=-1)
    log_t = F.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=-1)
    return temperature**2 * (log_t.exp() * (log_t - log_q)).sum(-1).mean()


def distillation_rule(
    labels: Tensor, targets: Targets, *, scale: float, temperature: float, kl_weight: float
) -> ChunkRule:
    """kl_weight * T^2 * KL(t || q) + (1 - kl_weight) * cross-entropy, summed over a chunk and times `scale`.

    The gradient with respect to z is kl_weight * T * (q_T - t) + (1 - kl_weight) * (q_1 - onehot); the teacher's
    logits exist for the chunk only. Parts reported: (weighted KL, weighted cross-entropy).

    Args:
        labels: [N] int64; targets: logits of those N tokens; scale: 1 over the counted tokens of the step.
    """

    def rule(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        target = labels[rows]
        counted = target != IGNORED
        column = target.clamp_min(0)[:, None]
        vocabulary = logits.shape[-1]
        teacher = targets.rows(rows)
        assert isinstance(teacher, Logits), "the divergence is between whole distributions"
        teacher_logits = teacher.values[:, :vocabulary]

        log_q1 = F.log_softmax(logits, dim=-1)
        cross_entropy = -(log_q1.gather(1, column)[:, 0] * counted).sum()
        log_q = log_q1 if temperature == 1.0 else F.log_softmax(logits / temperature, dim=-1)
        log_t = F.log_softmax(teacher_logits.div_(temperature), dim=-1)
        t = torch.exp(log_t, out=teacher_logits)
        divergence = (log_t.sub_(log_q).mul_(t).sum(-1) * counted).sum() * temperature**2

        if temperature == 1.0:
            gradient = torch.exp(log_q1, out=logits).sub_(t, alpha=kl_weight)
        else:
            gradient = torch.exp(log_q, out=logits).sub_(t).mul_(kl_weight * temperature)
            gradient.add_(log_q1.exp_(), alpha=1.0 - kl_weight)
        gradient.scatter_add_(1, column, torch.full_like(column, kl_weight - 1.0, dtype=gradient.dtype))
        parts = torch.stack((kl_weight * scale * divergence, (1.0 - kl_weight) * scale * cross_entropy))
        return parts, gradient.mul_((counted * scale)[:, None])

    return rule


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
