"""Ternary fake quantization: the rule, its straight-through gradient, and the layer that trains with it.

Q(W) = clamp(round(W / s), -1, 1) * s with s = mean |W| (BitNet b1.58, 2402.17764), per tensor, per row or per group.
We differ in one point: s is rounded to a number that is exact in fp16 *and* bf16 before it is used, so that the file
formats' fp16 block scales, a bf16 autocast and a bf16 save all hold the very weights of the training forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.layers import CompressedLinear

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_LARGEST_BF16 = 65280.0  # the largest bf16 number within fp16's range


def exact_scale(scale: Tensor) -> Tensor:
    """The nearest float32 that fp16 and bf16 both hold exactly: bf16 rounding within fp16's normal range."""
    return scale.clamp(FP16_SMALLEST_NORMAL, FP16_LARGEST_BF16).to(torch.bfloat16).float()


def ternary_codes(weight: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Round to the ternary lattice by absmean.

    Args:
        weight: [rows, columns] float32.
        group: columns that share a scale; 0 for one scale per row; None for one per tensor.

    Returns:
        codes [rows, columns] in {-1, 0, 1} (float32) and scales [1, 1], [rows, 1] or [rows, columns / group].
    """
    rows, columns = weight.shape
    if group is None:
        scales = exact_scale(weight.abs().mean()).reshape(1, 1)
        return (weight / scales).round_().clamp_(-1, 1), scales
    blocks = weight.reshape(rows, -1, group or columns)
    scales = exact_scale(blocks.abs().mean(-1))
    return (blocks / scales[:, :, None]).round_().clamp_(-1, 1).reshape(rows, columns), scales


def ternary_weight(weight: Tensor, group: int | None) -> Tensor:
    """Q(W): the dequantized lattice, float32 [rows, columns], exactly codes * scale."""
    codes, scales = ternary_codes(weight, group)
    rows, columns = weight.shape
    if scales.shape[1] > 1:
        return (codes.reshape(rows, scales.shape[1], -1) * scales[:, :, None]).reshape(rows, columns)
    return codes.mul_(scales)


class _StraightThrough(torch.autograd.Function):
    """Q(W) forward, identity backward. A function of its own, because w + (q - w).detach() is not q in floats."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: int | None, strength: Tensor) -> Tensor:
        # lerp is exact at both ends; a tensor, so that compiled code serves every strength
        return torch.lerp(weight.float(), ternary_weight(weight.float(), group), strength)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Int8Activation(torch.autograd.Function):
    """x -> clamp(round(x * a), -128, 127) / a, a = 127 / max|x| per token (BitNet b1.58); identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.float()
        a = 127.0 / wide.abs().amax(-1, keepdim=True).clamp_min(1e-5)
        return ((wide * a).round_().clamp_(-128, 127) / a).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class TernaryLinear(CompressedLinear):
    """A linear layer whose forward uses W + strength * (Q(W) - W); `weight` holds the latent W, under its own name.

    Args:
        latent: the layer to take weight and bias from (shared, not copied).
        group: as in `ternary_codes`.
        quantize_activations: int8 per token before the product.
    """

    method = "ternary"
    strength: Tensor
    """Scalar in [0, 1], a buffer that is not saved: 0 is full precision, 1 the lattice."""

    def __init__(self, latent: nn.Linear, *, group: int | None, quantize_activations: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = latent.in_features, latent.out_features
        self.weight = latent.weight
        self.bias = latent.bias
        self.group = group
        self.quantize_activations = quantize_activations
        self.register_buffer("strength", torch.ones((), device=latent.weight.device), persistent=False)

    def effective_weight(self) -> Tensor:
        """The weight of the forward, [out, in]; gradients pass straight through to the latent one."""
        weight: Tensor = _StraightThrough.apply(self.weight, self.group, self.strength)
        return weight

    def flops(self) -> int:
        return 2 * self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        if self.quantize_activations:
            x = _Int8Activation.apply(x)
        return F.linear(x, self.effective_weight(), self.bias)
