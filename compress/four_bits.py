"""A frozen linear layer in 4 bits: bitsandbytes' NF4 or FP4 (QLoRA, arXiv 2305.14314), one scale for 64 weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgewright.imports import no_kernels_from_a_hub

with no_kernels_from_a_hub():
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

FourBitKind = Literal["nf4", "fp4"]


def _product(x: Sequence[int], codes: Sequence[int], shape: Sequence[int], *_: object, **__: object) -> int:
    """Operations of x [..., in] times a matrix [out, in]."""
    return 2 * math.prod(x) * shape[0]


FOUR_BIT_PRODUCTS = {torch.ops.bitsandbytes.gemm_4bit: _product}
"""What torch's counter of operations does not count by itself."""


class FourBitLinear(Linear4bit):
    """bitsandbytes' layer, rounded where it is made, whose state dict can be loaded again.

    Args:
        linear: whose weight is rounded, on the device where it is; the bias is shared and stays as it is.
        kind: the sixteen values that a weight may have.
    """

    def __init__(self, linear: nn.Linear, kind: FourBitKind) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=False,
            compress_statistics=False,
            quant_type=kind,
            device="meta",
        )
        weight: Any = Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=False, quant_type=kind, module=self
        )
        self.weight = weight.to(linear.weight.device)
        self.bias = linear.bias
        self.support_avx512bf16_for_cpu = False  # it would pack the weight anew, in place, at the first evaluation

    def dequantized(self) -> Tensor:
        """The weight of the forward, [out, in], in the type that it had before it was rounded."""
        stored: Any = self.weight
        weight: Tensor = dequantize_4bit(stored.data, stored.quant_state)
        return weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """bitsandbytes saves scales and the table of values beside the weight, and leaves loading them to others."""
        stored: Any = self.weight
        parts: Mapping[str, Tensor] = stored.quant_state.as_dict(packed=True)
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(state_dict.pop(f"{prefix}weight.{name}", part))
        super()._load_from_state_dict(state_dict, prefix, *rest)
