"""Stochastic rounding: to one of the two neighbours, with the probability that makes the mean exact.

A weight that is rounded to nearest after every step loses all updates smaller than half a unit in its last place; one
that is rounded stochastically loses none on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_BITS = 16
"""Bits of a float32 that bfloat16 does not have."""


def round_to_bf16(value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`value` (float32, any shape) in bfloat16: up with the probability of the fraction, E[result] = value.

    A bfloat16 is the upper half of a float32, so a random number of the lower half's width is added, and the lower half
    cut off: the carry is the rounding. Values that bfloat16 holds are given back unchanged, and so are infinities and
    NaN.

    Args:
        generator: where the random bits come from; None: torch's default one of the device, part of a run's state.
    """
    noise = torch.randint(1 << LOW_BITS, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = (value.contiguous().view(torch.int32) + noise) & (-1 << LOW_BITS)
    return torch.where(value.isfinite(), bits.view(torch.float32), value).to(torch.bfloat16)
