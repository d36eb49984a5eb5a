"""Losses of hidden states: attention relations (MiniLMv2), mapped layers (TinyBERT), and features with reconstruction.

The plain forms take whole tensors and give the mean over tokens; the objective weights them by token, so that a step
does not depend on how it is cut into micro-batches.

Shapes: B sequences of S tokens, A relation heads, H hidden sizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.errors import RecipeError


def minilm(student_states: Tensor, teacher_states: Tensor, *, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention relations: KL(R_t | R_s), R = softmax(X X^T / sqrt(d)) of queries, of keys or of values (MiniLMv2).

    Wang et al., 2021, arXiv 2012.15828. The widths need not match, only the number of relation heads that they are cut
    into. MiniLMv2 relates all tokens of a text; with the causal mask of a decoder each is related to those before it.

    Args:
        student_states: [B, S, A * d_s]; teacher_states: [B, S, A * d_t].
        heads: A.
        mask: [B, 1, S, S] bool, true where a token is related to another; None: to itself and those before it.

    Returns:
        Scalar, mean over tokens and heads, nats.

    Raises:
        RecipeError: EW-785, heads that do not divide a width.
    """
    check_heads(heads, student_states.shape[-1], teacher_states.shape[-1])
    total = student_states.new_zeros(())
    for row in range(student_states.shape[0]):
        allowed = _allowed(mask, row, student_states)
        log_s = F.log_softmax(_scores(student_states[row], heads).masked_fill(~allowed, -torch.inf), dim=-1)
        log_t = F.log_softmax(_scores(teacher_states[row], heads).masked_fill(~allowed, -torch.inf), dim=-1)
        gap = (log_t - log_s).masked_fill(~allowed, 0.0)
        total = total + (log_t.exp() * gap).sum()
    return total / (heads * student_states.shape[0] * student_states.shape[1])


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None, weights: Tensor) -> Tensor:
    """`minilm` as a weighted sum over tokens, with the gradient by hand: no [A, S, S] is kept for the backward pass.

    Args:
        student: [B, S, A * d_s]; teacher: [B, S, A * d_t], without gradient.
        weights: [B, S] of each token.
    """
    loss: Tensor = _RelationLoss.apply(student, teacher, heads, mask, weights)
    return loss


class _RelationLoss(torch.autograd.Function):
    """dL/dscores = weight (R_s - R_t), and scores = X X^T / sqrt(d), so dL/dX = (G + G^T) X / sqrt(d)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None, weights: Tensor) -> Tensor:
        exact = torch.float64 if student.dtype == torch.float64 else torch.float32
        gradient = torch.empty_like(student, dtype=exact)
        total = torch.zeros((), dtype=exact, device=student.device)
        for row in range(student.shape[0]):
            allowed = _allowed(mask, row, student)
            states = student[row].to(exact)
            log_s, log_t = (
                F.log_softmax(_scores(each, heads).masked_fill_(~allowed, -torch.inf), dim=-1)
                for each in (states, teacher[row].to(exact))
            )
            weight = (weights[row] / heads).to(exact)
            t = log_t.exp()
            total += (log_t.sub_(log_s).masked_fill_(~allowed, 0.0).mul_(t).sum((0, 2)) * weight).sum()
            slope = log_s.exp_().sub_(t).mul_(weight[:, None])
            split = _split(states, heads)
            moved = (slope + slope.transpose(1, 2)) @ split / math.sqrt(split.shape[-1])
            gradient[row] = moved.transpose(0, 1).reshape(states.shape)
        ctx.save_for_backward(gradient.to(student.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype), None, None, None, None


def tinybert(student_states: Tensor, teacher_states: Tensor, *, projection: Tensor | None = None) -> Tensor:
    """Hidden states of a mapped layer: MSE(W h_s, h_t), mean over tokens and H_t (TinyBERT, arXiv 1909.10351).

    TinyBERT compares attention scores as well; fused attention never has them, and they are left out here (`minilm`
    compares what they are made of).

    Args:
        student_states: [..., H_s]; teacher_states: [..., H_t].
        projection: W [H_t, H_s], learned; None where the sizes are the same.
    """
    projected = student_states if projection is None else student_states @ projection.T
    return (projected - teacher_states).square().mean()


def weighted_mse(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Mean square over the last dimension, as a weighted sum over tokens.

    Args:
        student, teacher: [B, S, H]; weights: [B, S].
    """
    squares = (student.float() - teacher.float()).square().mean(-1)
    return (squares * weights).sum()


class Projection(nn.Module):
    """A learned map from the student's hidden size to the teacher's; no bias, no method takes it for a layer."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher, student))
        nn.init.normal_(self.weight, std=student**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        """[..., H_s] -> [..., H_t]"""
        return F.linear(states, self.weight.to(states.dtype))


def check_heads(heads: int, *widths: int, where: str | None = None) -> None:
    """Refuse relation heads that do not cut every width into equal parts (EW-785)."""
    if all(width % heads == 0 for width in widths):
        return
    common = math.gcd(*widths)
    legal = [number for number in range(1, common + 1) if common % number == 0]
    raise RecipeError(
        "EW-785",
        "relation heads have to divide the widths of queries, keys and values of both models",
        where=where,
        expected=f"relation_heads: {' | '.join(map(str, legal))}",
        found=f"{heads}, and widths {', '.join(map(str, sorted(set(widths))))}",
    )


def _allowed(mask: Tensor | None, row: int, states: Tensor) -> Tensor:
    """[1, S, S] bool."""
    if mask is not None:
        return mask[row]
    length = states.shape[1]
    return torch.ones(1, length, length, dtype=torch.bool, device=states.device).tril_()


def _split(states: Tensor, heads: int) -> Tensor:
    """[S, A * d] -> [A, S, d]"""
    return states.view(states.shape[0], heads, -1).transpose(0, 1)


def _scores(states: Tensor, heads: int) -> Tensor:
    """[A, S, S], as the inner products of all pairs."""
    split = _split(states, heads)
    return split @ split.transpose(1, 2) / math.sqrt(split.shape[-1])
