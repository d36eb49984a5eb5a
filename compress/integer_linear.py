"""Rounding to the 4- and 8-bit lattices of file formats, as the exporter rounds, bit for bit; and the layer.

The exporter's rules are numpy (`export/lattice.py`, `export/onnx/packing.py`); these are the same arithmetic in torch,
so that training rounds where its weights are. What is trained this way is what the file holds; but under bf16 autocast
the products of training take codes * scale rounded to bf16, while the file has them as they are.

Shapes: blocks are [R, G, C], R rows of G blocks of C weights; scales are [R, G, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.compress.fake_quant import FakeQuantLinear, as_array

if TYPE_CHECKING:
    from edgewright.compress.integer import IntegerFormat
    from edgewright.export.lattice import LatticeTensor

SCALE_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""What `search` tries, of the scale that just reaches the extreme of a block."""

Rule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""blocks -> codes [R, G, C] and scales [R, G, 1], float32."""


def q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """ggml's Q8_0: d = max|block| / 127, code = w * (1 / d), half away from zero; d is stored as fp16."""
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse_or_zero(scales)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    codes = torch.copysign(whole + (2 * (magnitude - whole)).floor(), scaled)
    return codes.clamp_(-127, 127), _half(scales)


def q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """ggml's Q4_0: d = (the value of largest magnitude) / -8, code = floor(w / d + 8.5) - 8; d is stored as fp16."""
    scales = _extreme(blocks) / -8
    codes = (blocks * _inverse_or_zero(scales)).add_(8.5).floor_().clamp_(0, 15).sub_(8)
    return codes, _half(scales)


def absmax(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits, symmetric: s = max|block| / 127, code = round(w / s), half to even; s is float32."""
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    safe = torch.where(scales == 0, 1.0, scales)
    return (blocks / safe).round_().clamp_(-127, 127), scales


def search(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """4 bits: the signed scale of Q4_0, in float32, times the factor of `SCALE_FACTORS` that loses least."""
    extreme = _extreme(blocks)
    codes, scales = torch.empty_like(blocks), torch.ones_like(extreme)
    lowest = torch.full_like(extreme, torch.inf)
    for factor in SCALE_FACTORS:
        tried = torch.where(extreme == 0, 1.0, extreme * (factor / -8))
        torch.div(blocks, tried, out=codes).round_().clamp_(-8, 7)
        error = codes.mul_(tried).sub_(blocks).square_().sum(-1, keepdim=True)
        scales = torch.where(error < lowest, tried, scales)
        lowest = torch.minimum(error, lowest)
    # once more with the best, and 0 where no error was a number
    torch.div(blocks, torch.where(lowest < torch.inf, scales, torch.inf), out=codes).round_().clamp_(-8, 7)
    return codes, scales


def _extreme(blocks: Tensor) -> Tensor:
    """The value of largest magnitude, with its sign; of equals the first."""
    magnitude, columns = blocks.abs(), blocks.shape[-1]
    falling = torch.arange(columns, 0, -1, dtype=magnitude.dtype, device=magnitude.device)
    first = magnitude.eq_(magnitude.amax(-1, keepdim=True)).mul_(falling).amax(-1, keepdim=True)  # argmax is slow
    return blocks.gather(-1, (columns - first).clamp_(max=columns - 1).long())


def _inverse_or_zero(scales: Tensor) -> Tensor:
    """1 / d, and 0 where float32 has no reciprocal: such a block is zero in any 16-bit scale."""
    inverse = scales.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _half(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).float()


RULES: dict[str, Rule] = {"q8_0": q8_0, "q4_0": q4_0, "absmax": absmax, "search": search}
"""By the name in `integer.FORMATS`."""


class IntegerLinear(FakeQuantLinear):
    """A linear layer whose weight is rounded to the lattice of a file format.

    Args:
        latent: the layer to take weight and bias from (shared, not copied).
        form: a value of `integer.FORMATS`.
        block: weights that share a scale.
    """

    method = "integer"

    def __init__(self, latent: nn.Linear, *, form: IntegerFormat, block: int) -> None:
        super().__init__(latent)
        self.form = form
        self.block = block
        self.refresh()

    def round_into(self, codes: Tensor) -> Tensor:
        blocks = self.weight.detach().float().reshape(self.out_features, -1, self.block)
        found, scales = RULES[self.form.rule](blocks)
        codes.copy_(found.reshape(codes.shape))
        return scales[:, :, 0]

    def lattice(self) -> LatticeTensor:
        from edgewright.export.lattice import LatticeTensor

        codes, scales = self.round()
        return LatticeTensor(
            codes=as_array(codes, np.int8),
            scales=as_array(scales, np.float32),
            group=self.block,
            bits=self.form.bits,
            levels=self.form.levels,
        )
