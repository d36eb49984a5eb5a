"""Reading a parameter in full precision for an update, and storing it again."""

from __future__ import annotations

import torch
from torch import Tensor

from edgewright.optim.narrow_weight import NarrowWeight
from edgewright.optim.stochastic_rounding import round_to_bf16


def readable(parameter: Tensor) -> Tensor:
    """The weight in float32 (or float64): the parameter itself where it is that, else a copy."""
    if isinstance(parameter, NarrowWeight):
        return parameter.dequantized()
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def write_back(parameter: Tensor, weight: Tensor) -> None:
    """Store what `readable` gave and an update changed; narrower types than float32 are rounded stochastically."""
    if weight is parameter:
        return
    if isinstance(parameter, NarrowWeight):
        parameter.store(weight)
    else:
        parameter.copy_(round_to_bf16(weight) if parameter.dtype == torch.bfloat16 else weight)
