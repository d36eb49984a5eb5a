"""Stock rounding rules of formats, for weights that lie on no lattice: those of ggml and bitsandbytes, bit for bit.

The rules for Q8_0 and Q4_0 stand beside the lattice itself, in `lattice.py`.
"""

from __future__ import annotations

import numpy as np

from edgewright.export.lattice import LatticeTensor, grouped
from edgewright.export.layout.transformers import NF4, Nf4


def round_q4_1(weight: np.ndarray) -> LatticeTensor:
    """The rule of ggml's Q4_1: `d = (max - min) / 15`, code = floor((w - min) / d + 0.5), offset min; d, min as fp16.

    `weight`: float32 `[rows, columns]` with columns a multiple of 32.

    Raises:
        ValueError: a scale or an offset is too large for fp16.
    """
    blocks = grouped(np.asarray(weight, np.float32), 32)
    low = blocks.min(axis=2)
    d = (blocks.max(axis=2) - low) / np.float32(15)
    codes = np.trunc((blocks - low[..., None]) * _inverse(d)[..., None] + np.float32(0.5)).clip(0, 15)
    return LatticeTensor(
        codes=codes.astype(np.int8).reshape(weight.shape),
        scales=_half(d),
        offsets=_half(low),
        group=32,
        bits=4,
        levels="uint4",
    )


def round_q5_0(weight: np.ndarray) -> LatticeTensor:
    """The rule of ggml's Q5_0: `d = (the value of largest magnitude) / -16`, code = floor(w / d + 16.5) - 16.

    Arguments and errors as `round_q4_1`. The scale is signed, so that the extreme always falls on code -16.
    """
    blocks = grouped(np.asarray(weight, np.float32), 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    d = extreme / np.float32(-16)
    codes = np.trunc(blocks * _inverse(d)[..., None] + np.float32(16.5)).clip(0, 31) - 16
    return LatticeTensor(
        codes=codes.astype(np.int8).reshape(weight.shape), scales=_half(d), group=32, bits=5, levels="int5"
    )


def round_nf4(weight: np.ndarray, layout: Nf4 | None = None) -> LatticeTensor:
    """The rule of bitsandbytes' NF4: `s = max|block|`, code = the nearest value of `NF4` to w / s.

    Args:
        weight: float32 `[rows, columns]` with an even number of weights.
        layout: says how many weights share a scale; blocks follow each other through the whole weight.
    """
    layout = layout or Nf4()
    flat = np.asarray(weight, np.float32).ravel()
    blocks = np.pad(flat, (0, -len(flat) % layout.block)).reshape(-1, layout.block)
    absmax = np.abs(blocks).max(axis=1)
    middles = (NF4[1:].astype(np.float64) + NF4[:-1]).astype(np.float32) / np.float32(2)
    codes = np.searchsorted(middles, blocks * _inverse(absmax)[:, None]).astype(np.uint8)
    pairs = codes.ravel()[: len(flat)].reshape(-1, 2)
    return layout.unpack((pairs[:, 0] << np.uint8(4)) | pairs[:, 1], absmax, (weight.shape[0], weight.shape[1]))


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where float32 has no reciprocal."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to fp16; infinite where too large, which `LatticeTensor` refuses."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
