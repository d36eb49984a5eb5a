"""Weights in eight bits: groups of 128 with a scale and a zero point each, written with stochastic rounding.

As in Q-GaLore (2407.08296) and Q-APOLLO (2412.05270): a weight matrix is cut, in the order of memory, into groups;

    w = (code - zero) * scale,   code and zero in 0..255

with no float32 copy of the weight anywhere. Where ours differs from the references:
- The range of a group is widened to include 0. Theirs clamps the zero point alone, which destroys groups whose values
  are all of one sign (0.5..1 becomes 0..0.5).
- The scale is such that the group's smallest and largest value fit it beside the whole-numbered zero point, so that no
  value is clamped: rounding is unbiased at the ends of the range as well, and a group that is stored again unchanged
  keeps its values.
- The floor of the scale is so low that it only keeps groups of zeros from dividing by zero; theirs, 1e-5, is a rounding
  step larger than most updates for groups of small weights.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from edgewright.optim.narrow_weight import NarrowWeight

GROUP = 128
"""Weights that share a scale and a zero point."""
LARGEST_CODE = 255
SCALE_FLOOR = 1e-12


class Int8Weight(NarrowWeight):
    """A float weight of any shape in 1 + 5 / group bytes a value.

    `codes` uint8 [shape], `scale` float32 [groups], `zero` uint8 [groups]. See `NarrowWeight` for how it behaves.
    """

    PARTS = ("codes", "scale", "zero")
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def narrowed(cls, weight: Tensor, group: int = GROUP) -> Self:
        """A float weight in eight bits, rounded to nearest.

        Raises:
            ValueError: the number of values is no multiple of `group`.
        """
        if weight.numel() % group:
            raise ValueError(f"{weight.numel()} weights of shape {tuple(weight.shape)} are no multiple of {group}")
        codes, scale, zero = quantize(weight.detach().float().reshape(-1, group).clone(), stochastic=False)
        return cls({"codes": codes.view(weight.shape), "scale": scale, "zero": zero})

    def widened(self, dtype: torch.dtype) -> Tensor:
        groups = self.codes.view(self.scale.numel(), -1).float()
        return groups.sub_(self.zero[:, None]).mul_(self.scale[:, None]).view(self.codes.shape).to(dtype)

    def write(self, value: Tensor) -> None:
        codes, scale, zero = quantize(value.view(self.scale.numel(), -1), stochastic=True)
        self.codes.copy_(codes.view(self.codes.shape))
        self.scale.copy_(scale)
        self.zero.copy_(zero)


def quantize(groups: Tensor, *, stochastic: bool, largest: int = LARGEST_CODE) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [G, size] uint8, scale [G] float32 and zero point [G] uint8 of groups [G, size] in float32.

    Args:
        groups: their memory is used up.
        stochastic: round up with the probability of the fraction, else to nearest.
        largest: code and zero point are in 0..largest.
    """
    low, high = groups.amin(1).clamp_max_(0), groups.amax(1).clamp_min_(0)
    zero = torch.round(-low / (high - low).clamp_min_(torch.finfo(torch.float32).tiny) * largest)
    zero = zero.maximum((low < 0).float()).minimum(largest - (high > 0).float())
    scale = torch.maximum(-low / zero.clamp_min(1), high / (largest - zero).clamp_min(1)).clamp_min_(SCALE_FLOOR)
    dither = torch.rand_like(groups) if stochastic else 0.5
    codes = groups.div_(scale[:, None]).add_(dither).floor_().add_(zero[:, None]).clamp_(0, largest)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)
