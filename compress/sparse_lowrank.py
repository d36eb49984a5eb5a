"""The layer of SLTrain (arXiv 2406.02214): W = scale * B A + S with a fixed sparse support, and its gradient.

Shapes: m out, n in, r rank, K entries of S, N tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.compress.density import whole
from edgewright.compress.factors import Factors, rebalanced, spectral
from edgewright.compress.layers import CompressedLinear


def build_weight(up: Tensor, down: Tensor, values: Tensor, index: Tensor, scale: float) -> Tensor:
    """scale * B A + S, [m, n]; S has `values` at the flat places `index`."""
    return (scale * (up @ down)).flatten().index_add(0, index, values).view(up.shape[0], down.shape[1])


class _Product(torch.autograd.Function):
    """x W^T that keeps x, A, B, S for the backward, and no matrix of W's size.

    With G = Gy^T x [m, n], there only for a moment: dA = scale B^T G, dB = scale G A^T, dv = G[index], dx = Gy W.
    The products with x run in `dtype`, everything of W in its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, down: Tensor, values: Tensor, index: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.scale, ctx.dtype, ctx.given = scale, dtype, x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, up, down, values, index)
        with torch.autocast(x.device.type, enabled=False):
            return x @ build_weight(up, down, values, index, scale).to(dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, values, index = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            gradient = gradient.to(ctx.dtype)
            weight = build_weight(up, down, values, index, ctx.scale).to(ctx.dtype)
            of_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(up.dtype)
            return (
                (gradient @ weight).to(ctx.given),
                ctx.scale * (of_weight @ down.T),
                ctx.scale * (up.T @ of_weight),
                of_weight.flatten().index_select(0, index),
                None,
                None,
                None,
            )


class SparseLowRankLinear(CompressedLinear):
    """y = x (scale * B A + S)^T + bias; A Kaiming-uniform, B = 0, the values of S uniform in +-1/sqrt(n).

    Args:
        linear: the layer whose sizes, device and type it takes, and whose bias it shares; its weight is not read.
        rank: r.
        scale: alpha / r.
        density: K = floor(density m n), at least 1, places drawn without repetition from torch's generator.
    """

    method = "sltrain"
    index: Tensor
    """[K] int32 (int64 where m n needs it), flat places in [m, n], sorted; a buffer not saved with the weights."""

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float, density: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = scale
        size = self.in_features * self.out_features
        count = max(1, whole(density, size))
        like = linear.weight
        self.down = nn.Parameter(like.new_empty(rank, self.in_features))
        self.up = nn.Parameter(like.new_zeros(self.out_features, rank))
        self.values = nn.Parameter(like.new_empty(count))
        self.bias = linear.bias
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.uniform_(self.values, -(self.in_features**-0.5), self.in_features**-0.5)
        index = torch.randperm(size, device=like.device)[:count].sort().values
        narrow = torch.int32 if size < 2**31 else torch.int64
        self.register_buffer("index", index.to(narrow), persistent=False)

    @property
    def saves_nothing(self) -> bool:
        """Whether a plain layer would hold no more numbers."""
        held = self.up.numel() + self.down.numel() + self.values.numel()
        return held >= self.in_features * self.out_features

    def effective_weight(self) -> Tensor:
        """scale * B A + S, [m, n]."""
        return build_weight(self.up, self.down, self.values, self.index, self.scale)

    def flops(self) -> int:
        """2 m n: those of the dense layer."""
        return 2 * self.in_features * self.out_features

    def flops_per_forward(self) -> int:
        """2 m n r to build W."""
        return 2 * self.in_features * self.out_features * self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y: Tensor = _Product.apply(x, self.up, self.down, self.values, self.index, self.scale, dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def refactor(self) -> None:
        """Balance the factors in place; the function stays."""
        balanced = rebalanced(Factors(up=self.up, down=self.down))
        if balanced is not None:
            self.up.copy_(balanced.up)
            self.down.copy_(balanced.down)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> None:
        """Become the best approximation of a weight by the factors, with what it lacks at the places of S."""
        factors = spectral(weight / self.scale, self.down.shape[0])
        self.up.copy_(factors.up)
        self.down.copy_(factors.down)
        rest = weight - self.scale * (self.up @ self.down)
        self.values.copy_(rest.flatten().index_select(0, self.index))
