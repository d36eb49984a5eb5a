"""Weights in bfloat16 without float32 masters, written with stochastic rounding."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from edgewright.optim.narrow_weight import NarrowWeight
from edgewright.optim.stochastic_rounding import round_to_bf16


class Bf16Weight(NarrowWeight):
    """A weight in two bytes a value that is a float32 parameter to the outside, so that every update is computed in
    float32 and rounded once, when it is stored. See `NarrowWeight` for how it behaves.
    """

    PARTS = ("value",)
    WINDOWS = True
    value: Tensor

    @classmethod
    def narrowed(cls, weight: Tensor) -> Self:
        """A float weight in bfloat16, rounded to nearest."""
        return cls({"value": weight.detach().to(torch.bfloat16, copy=True).contiguous()})

    def widened(self, dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.value[index].to(self.dtype)

    def write(self, value: Tensor) -> None:
        self.value.copy_(round_to_bf16(value))
