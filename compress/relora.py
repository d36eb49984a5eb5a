"""The layer of ReLoRA (Lialin et al., arXiv 2307.05695): a frozen matrix and a low-rank update that it swallows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.layers import CompressedLinear


class ReLoRALinear(CompressedLinear):
    """y = x (W + (alpha / r) B A)^T + bias, W frozen; A begins Kaiming-uniform, B as 0.

    Args:
        linear: the layer to take weight and bias from (shared, not copied); its weight no longer gets gradients.
        rank: r.
        alpha: see the formula.
    """

    method = "lowrank"

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = alpha / rank
        self.weight = linear.weight.requires_grad_(False)
        self.down = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.up = nn.Parameter(linear.weight.new_empty(self.out_features, rank))
        self.bias = linear.bias
        self._begin()

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """B [out, r] and A [r, in]."""
        return self.up, self.down

    def effective_weight(self) -> Tensor:
        """W + (alpha / r) B A, [out, in]; gradients reach the factors."""
        return torch.addmm(self.weight, self.up, self.down, alpha=self.scale)

    def flops(self) -> int:
        """2 in out + 2 r (in + out)."""
        return 2 * self.weight.numel() + 2 * self.up.numel() + 2 * self.down.numel()

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.down), self.up)
        return torch.add(F.linear(x, self.weight, self.bias), update, alpha=self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        """W += (alpha / r) B A, and new factors; the function stays."""
        self.weight.copy_(self.effective_weight())
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)
