"""The output head and the loss, chunk by chunk: `[tokens, vocabulary]` is never held whole, forward or backward.

The loss of a chunk is a `ChunkRule`: it gets the chunk's logits in float32, returns the summed loss and *overwrites
the logits with the gradient*. Gradients of hidden states and head are formed on the way, so backward only scales them.

Shapes: N tokens, H hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ChunkRule = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits [C, V] float32, rows) -> (losses [P] float32: sums over the rows of each part, gradient [C, V] of the
weighted sum of the parts with respect to the logits). The rule owns the logits' memory and may reuse it."""

CHUNK_BYTES = 24 * 2**20
"""Size of one float32 chunk of logits: large enough for full GEMM speed, small beside any model's activations."""
FEWEST_ROWS = 128
"""Of a chunk: with a vocabulary so large that fewer would do, products would wait for the head's weights."""
CACHED_BYTES = 2**20
"""Float32 logits that a rule of few rows gets at a time on a CPU: they stay in a core's cache from pass to pass."""


@dataclass(frozen=True, slots=True)
class Head:
    """The output head as the objectives see it: `head(hidden)` gives logits in float32 (of float64 in float64).

    `weight` [V, H] is the *effective* weight (already fake-quantized or merged where a method says so), so gradients
    flow through whatever produced it. `bias` is [V] or None. With z = `scale` (weight h + bias) the logits are z, or
    c tanh(z / c) where there is a `cap` c (Gemma 2, arXiv 2408.00118, section 2).
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.shaped(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        """weight h + bias, in the type of `hidden`."""
        return F.linear(hidden, self.weight.to(hidden.dtype), _cast(self.bias, hidden.dtype))

    def shaped(self, product: Tensor) -> Tensor:
        """The logits from weight h + bias, whose memory they take if it has their type."""
        product = product.to(accumulated(product.dtype))
        if self.scale != 1.0:
            product.mul_(self.scale)
        return product if self.cap is None else product.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (weight h + bias), from the logits: scale (1 - (logits / c)^2)."""
        if self.cap is None:
            return self.scale
        return logits.div(self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums run in where products run in `dtype`: float32, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(vocabulary: int) -> int:
    """Rows of a chunk whose float32 logits take about `CHUNK_BYTES`, or more where those would be too few."""
    return max(FEWEST_ROWS, CHUNK_BYTES // (4 * vocabulary))


def cached_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose float32 logits take about `CACHED_BYTES`; all of a chunk on an accelerator, where starts are dear."""
    return max(1, CACHED_BYTES // (4 * vocabulary)) if device.type == "cpu" else chunk_rows(vocabulary)


def chunked_loss(
    hidden: Tensor, head: Head, rule: ChunkRule, *, parts: int, dtype: torch.dtype, few_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum of a loss over all tokens, computed in chunks over the head.

    Args:
        hidden: [N, H], last hidden states of the student.
        head: the student's head.
        rule: the loss of a chunk.
        parts: how many parts the rule reports.
        dtype: what the matrix products run in (bfloat16 or float32); softmax and sums are float32. With float64, for
            tests, all is.
        few_rows: with gradients, give the rule `cached_rows` of a chunk at a time: faster on a CPU for a rule that does
            nothing but pass over its rows, slower for one with matrix products of its own.

    Returns:
        (loss [], parts [P]); only the loss carries gradient.
    """
    if torch.is_grad_enabled():
        loss, values = _ChunkedLoss.apply(hidden, head.weight, head.bias, head, rule, parts, dtype, few_rows)
        return loss, values
    values = torch.zeros(parts, dtype=accumulated(dtype), device=hidden.device)
    compute = replace(head, weight=head.weight.to(dtype), bias=_cast(head.bias, dtype))
    rows = chunk_rows(head.weight.shape[0])
    for start in range(0, hidden.shape[0], rows):
        window = slice(start, min(start + rows, hidden.shape[0]))
        values += rule(compute(hidden[window].to(dtype)), window)[0]
    return values.sum(), values


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        rule: ChunkRule,
        parts: int,
        dtype: torch.dtype,
        few_rows: bool,
    ) -> tuple[Tensor, Tensor]:
        compute = replace(head, weight=weight.to(dtype), bias=_cast(bias, dtype))
        hidden_gradient = torch.empty_like(hidden)
        exact = accumulated(dtype)
        trained = ctx.needs_input_grad[1]  # the gradient of a frozen head would be as large as the head
        weight_gradient = torch.zeros(weight.shape, dtype=exact, device=weight.device) if trained else None
        bias_gradient = None if bias is None else torch.zeros(bias.shape, dtype=exact, device=weight.device)
        values = torch.zeros(parts, dtype=exact, device=hidden.device)
        rows = chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            window = slice(start, min(start + rows, hidden.shape[0]))
            chunk = hidden[window].to(dtype)
            gradient = compute.product(chunk)
            step = cached_rows(gradient.shape[1], gradient.device) if few_rows else rows
            values += _into_gradient(gradient, compute, rule, start, step, bias_gradient)
            hidden_gradient[window] = gradient @ compute.weight
            if weight_gradient is None:
                continue
            if dtype == exact:
                weight_gradient.addmm_(gradient.T, chunk)
            else:
                weight_gradient += gradient.T @ chunk
        ctx.scaled = False
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scaled:
            raise RuntimeError("this loss gave its gradients away already: a second backward needs a new forward")
        ctx.scaled = True
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            hidden_gradient.mul_(loss_gradient),
            None if weight_gradient is None else weight_gradient.mul_(loss_gradient).to(weight_dtype),
            None if bias_gradient is None else bias_gradient.mul_(loss_gradient).to(bias_dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _into_gradient(
    product: Tensor, head: Head, rule: ChunkRule, start: int, step: int, bias_gradient: Tensor | None
) -> Tensor:
    """Overwrite a chunk's weight h + bias [C, V] with the loss's gradient by it; add that of the bias to its own.

    Args:
        start: the chunk's first row.
        step: rows that the rule gets at a time.

    Returns:
        The summed losses, [P].
    """
    losses = []
    for first in range(0, len(product), step):
        part = product[first : first + step]
        logits = head.shaped(part)
        slope = head.slope(logits)
        sums, gradient = rule(logits, slice(start + first, start + first + len(part)))
        losses.append(sums)
        if head.scale != 1.0 or head.cap is not None:
            gradient *= slope
        if bias_gradient is not None:
            bias_gradient += gradient.sum(0)
        part.copy_(gradient)
    return torch.stack(losses).sum(0)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


IGNORED = -100
"""A label that is not counted, as in Hugging Face and torch."""


def cross_entropy_rule(labels: Tensor, scale: float) -> ChunkRule:
    """Next-token cross-entropy, loss = -scale * sum log softmax(z)[label]; gradient scale * (softmax(z) - onehot).

    Args:
        labels: [N] int64, `IGNORED` where a token is not counted.
        scale: 1 over the number of counted tokens of the whole optimizer step, so that accumulation is exact.
    """

    def rule(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        target = labels[rows]
        counted = target != IGNORED
        column = target.clamp_min(0)[:, None]
        log_probabilities = F.log_softmax(logits, dim=-1)
        loss = -(log_probabilities.gather(1, column)[:, 0] * counted).sum() * scale
        gradient = torch.exp(log_probabilities, out=logits)
        gradient.scatter_add_(1, column, torch.full_like(column, -1, dtype=gradient.dtype))
        return loss[None], gradient.mul_((counted * scale)[:, None])

    return rule
