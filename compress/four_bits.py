"""A frozen linear layer in 4 bits: bitsandbytes' NF4 or FP4 (QLoRA, arXiv 2305.14314), one scale for 64 weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from edgewright.imports import importing_bitsandbytes

with importing_bitsandbytes():
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

FourBitKind = Literal["nf4", "fp4"]
BLOCK = 64
"""Weights that share a scale."""


def _product(x: Sequence[int], codes: Sequence[int], shape: Sequence[int], *_: object, **__: object) -> int:
    """Operations of x [..., in] times a matrix [out, in]."""
    return 2 * math.prod(x) * shape[0]


FOUR_BIT_PRODUCTS = {torch.ops.bitsandbytes.gemm_4bit: _product}
"""What torch's counter of operations does not count by itself."""


class FourBitLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as codes and scales, in buffers of its own.

    bitsandbytes' own layer keeps them beside a parameter, where neither a state dict nor a simulation finds them.

    Args:
        linear: whose weight is rounded, on the device where it is; the bias is shared and stays as it is.
        kind: the sixteen values that a weight may have.
    """

    codes: Tensor
    """Two weights a byte, uint8 [in * out / 2, 1]."""
    scales: Tensor
    """Largest magnitude of every `BLOCK` weights, float32."""
    values: Tensor
    """What the sixteen codes stand for, float32 [16]."""

    def __init__(self, linear: nn.Linear, kind: FourBitKind) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = kind
        self.dtype = linear.weight.dtype
        codes, state = quantize_4bit(linear.weight.detach(), blocksize=BLOCK, quant_type=kind)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", state.absmax)
        self.register_buffer("values", state.code.clone())
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the forward, [out, in], in the type that it had before it was rounded."""
        weight: Tensor = dequantize_4bit(self.codes, self._state())
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """As a plain layer, in the type of autocast where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = matmul_4bit(x, self.codes, bias=bias, quant_state=self._state())
        return y

    def _state(self) -> QuantState:
        shape = torch.Size((self.out_features, self.in_features))
        return QuantState(
            self.scales, shape=shape, code=self.values, blocksize=BLOCK, quant_type=self.kind, dtype=self.dtype
        )
