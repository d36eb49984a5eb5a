"""Learned masks: hard-concrete gates (arXiv 1712.01312) on channels, heads and blocks, as Sheared-LLaMA has them.

With u uniform in (0, 1), s = sigmoid((log u - log(1 - u) + a) / b), z = clamp(s (r - l) + l, 0, 1), b = 2/3, l = -0.1,
r = 1.1. So P(z = 0) = sigmoid(b logit(-l / (r - l)) - a), and a gate is open with probability 1 - P(z = 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 2.0 / 3.0
LOW, HIGH = -0.1, 1.1
START = 5.0
"""a at the beginning: closed with probability 0.0014."""
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
"""b logit(-l / (r - l))"""


class Gates(nn.Module):
    """Gates of one kind, in one or several groups of which each is to keep the same number.

    Args:
        groups: G.
        size: gates of a group, n.
        target: how many are to stay open of each.
    """

    def __init__(self, groups: int, size: int, target: int) -> None:
        super().__init__()
        self.size, self.target = size, target
        self.log_alpha = nn.Parameter(torch.full((groups, size), START))
        self.multipliers = nn.Parameter(torch.zeros(2, groups))
        """lambda_1 and lambda_2 of the Lagrangian of each group."""
        self.z: Tensor = torch.ones(groups, size)
        """What they let through in this forward, [G, n]; with gradients to `log_alpha`."""
        self.noise: Tensor | None = None

    def probabilities(self) -> Tensor:
        """P(open), [G, n]."""
        return torch.sigmoid(self.log_alpha - _SHIFT)

    def set_noise(self, uniform: Tensor | None) -> None:
        """The random numbers of the next training passes, [G, n] in (0, 1); None: the gates as they would be fixed."""
        self.noise = None if uniform is None else uniform.to(self.log_alpha.device)

    def open(self) -> Tensor:
        """z, [G, n]: drawn while training, else as it would be fixed."""
        if self.noise is None or not self.training:
            return self.fixed()
        odds = torch.log(self.noise) - torch.log1p(-self.noise)
        s = torch.sigmoid((odds + self.log_alpha) / TEMPERATURE)
        return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    @torch.no_grad()
    def kept(self) -> Tensor:
        """The gates of each group that stay open, exactly `target`: the likeliest; int64 [G, target], ascending."""
        order = torch.argsort(-self.log_alpha, dim=1, stable=True)[:, : self.target]
        return order.sort(dim=1).values

    def fixed(self) -> Tensor:
        """1 where `kept`, else 0."""
        return torch.zeros_like(self.log_alpha).scatter_(1, self.kept(), 1.0)

    def lagrangian(self, progress: float) -> Tensor:
        """lambda_1 d + lambda_2 d^2, d the difference of the expected share of open gates from the one wanted now.

        Args:
            progress: 0: all are to be open; 1: the target.
        """
        wanted = 1.0 + progress * (self.target / self.size - 1.0)
        difference = self.probabilities().mean(1) - wanted
        first, second = self.multipliers
        return (first * difference + second * difference.square()).mean()
