"""Packed weights that transformers loads by itself: bitsandbytes' NF4 and int8, and BitNet's two bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgewright.export.lattice import LatticeTensor
from edgewright.export.layout.holds import Holds

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The values of NF4 (arXiv:2305.14314, appendix E): quantiles of the normal distribution, scaled to -1 to 1."""

_TERNARY = np.array([0, 7, 15], np.uint8)
"""The NF4 codes of -1, 0 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4:
    """bitsandbytes' NF4: two codes a byte, the first in the high half, and a float32 scale per block.

    Blocks follow each other through the whole weight, row after row, so one may begin in a row and end in the next.
    """

    block: int = 64
    """Weights per scale."""

    @property
    def holds(self) -> Holds:
        """What it holds exactly of codes times scales; NF4's own codes it holds at the same scales."""
        return Holds(codes=(-1, 1), granularity=self.block, scale=np.float32)

    def group(self, columns: int) -> int:
        """Columns that certainly share a scale: all of them begin and end with a block or within one."""
        return math.gcd(self.block, columns)

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        if lattice.offsets is not None:
            return "its weights are not codes times scales"
        if lattice.codebook is None and not self.holds.without_zero_points(lattice):
            return f"codes reach {lattice.codes.min()}..{lattice.codes.max()}, the format holds its 16 values and -1..1"
        if lattice.codebook is not None and not np.array_equal(lattice.codebook, NF4):
            return "it has another codebook"
        if not self._one_scale_per_block(lattice):
            return f"a block of {self.block} weights straddles groups of other scales"
        return None

    def pack(self, lattice: LatticeTensor) -> tuple[np.ndarray, np.ndarray]:
        """`(codes, absmax)`: uint8 `[ceil(n / 2)]` and float32 `[ceil(n / block)]`.

        Raises:
            ValueError: when the layout does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"nf4 cannot hold this lattice: {reason}")
        codes = lattice.codes.ravel()
        stored = codes.astype(np.uint8) if lattice.codebook is not None else _TERNARY[codes + 1]
        pairs = np.pad(stored, (0, len(stored) % 2), constant_values=7).reshape(-1, 2)
        scales = np.broadcast_to(lattice.per_weight(lattice.scales), lattice.codes.shape).ravel()
        return (pairs[:, 0] << np.uint8(4)) | pairs[:, 1], np.ascontiguousarray(scales[:: self.block])

    def unpack(self, packed: np.ndarray, absmax: np.ndarray, shape: tuple[int, int]) -> LatticeTensor:
        """The inverse of `pack` for a weight of `shape` `[rows, columns]`, with one scale per `group(columns)`.

        Raises:
            ValueError: shapes that contradict each other.
        """
        stored = np.stack([packed >> 4, packed & 15], axis=-1).ravel()[: shape[0] * shape[1]].reshape(shape)
        group = self.group(shape[1])
        return LatticeTensor(
            codes=stored.astype(np.int8),
            scales=np.repeat(absmax.astype(np.float32), self.block // group)[: stored.size // group].reshape(
                shape[0], -1
            ),
            group=group,
            bits=4,
            levels="nf4",
            codebook=NF4,
        )

    def _one_scale_per_block(self, lattice: LatticeTensor) -> bool:
        scales = np.broadcast_to(lattice.per_weight(lattice.scales), lattice.codes.shape).ravel()
        blocks = np.pad(scales, (0, -len(scales) % self.block), mode="edge").reshape(-1, self.block)
        return bool((blocks == blocks[:, :1]).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """bitsandbytes' 8 bits: int8 codes and per row 127 times their scale, in float32."""

    @property
    def holds(self) -> Holds:
        """Exact if the scale is some float32 divided by 127; one that fp16 or bf16 holds always is."""
        return Holds(codes=(-128, 127), granularity="row", scale=np.float32)

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        reason = self.holds.why_not(lattice)
        if reason is None and not np.array_equal(_times_127(lattice.scales) / np.float32(127), lattice.scales):
            return "no float32, divided by 127, is the scale"
        return reason

    def pack(self, lattice: LatticeTensor) -> tuple[np.ndarray, np.ndarray]:
        """`(CB, SCB)`: int8 `[rows, columns]` and float32 `[rows]`.

        Raises:
            ValueError: when the layout does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"8-bit bitsandbytes cannot hold this lattice: {reason}")
        scales = np.broadcast_to(_times_127(lattice.scales[:, :1]), (len(lattice.codes), 1))
        return lattice.codes.astype(np.int8), np.ascontiguousarray(scales[:, 0])

    def unpack(self, codes: np.ndarray, absmax: np.ndarray) -> LatticeTensor:
        """The inverse of `pack`, with one scale per row."""
        scales = (absmax.astype(np.float32) / np.float32(127)).reshape(-1, 1)
        return LatticeTensor(codes=codes, scales=scales, group=None, bits=8, levels="int8")


def _times_127(scales: np.ndarray) -> np.ndarray:
    """What, divided by 127 in float32, is the scale, where there is such a number: the product or a neighbour of it."""
    product = scales * np.float32(127)
    for other in (np.nextafter(product, np.float32(0)), np.nextafter(product, np.float32(np.inf))):
        product = np.where(product / np.float32(127) == scales, product, other)
    return product


@dataclass(frozen=True, slots=True, kw_only=True)
class BitNet:
    """transformers' packed BitNet: four rows of codes to a row of bytes, and one scale for the whole weight.

    Row r of the R byte rows holds the weight's rows r, R + r, 2R + r and 3R + r, in bits 0, 2, 4 and 6, as code + 1.
    """

    inverse: bool = False
    """Whether `weight_scale` divides (`linear_class: bitlinear`) or multiplies (`autobitlinear`, offline)."""
    scale: type[np.floating] = np.float32
    """The precision of `weight_scale`: that of the model."""

    @property
    def holds(self) -> Holds:
        """What it holds exactly; an inverse must besides give its scale back."""
        stored = np.float32 if self.inverse else self.scale
        return Holds(codes=(-1, 1), granularity="tensor", scale=stored, rows=4)

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        reason = self.holds.why_not(lattice)
        if reason is None and self.inverse:
            inverse = self._inverse(lattice.scales)
            if not (np.isfinite(inverse) & (_reciprocal(inverse) == lattice.scales)).all():
                return f"the inverse of a scale, in {np.dtype(self.scale).name}, does not give it back"
        return reason

    def pack(self, lattice: LatticeTensor) -> tuple[np.ndarray, np.ndarray]:
        """`(weight, weight_scale)`: uint8 `[rows / 4, columns]` and float32 `[1]`.

        Raises:
            ValueError: when the layout does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"packed BitNet cannot hold this lattice: {reason}")
        parts = (lattice.codes + 1).astype(np.uint8).reshape(4, -1, lattice.codes.shape[1])
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None, None]
        scale = np.array([lattice.scales.flat[0]], np.float32)
        return np.bitwise_or.reduce(parts << shifts, axis=0), self._inverse(scale) if self.inverse else scale

    def unpack(self, packed: np.ndarray, weight_scale: np.ndarray) -> LatticeTensor:
        """The inverse of `pack`.

        Raises:
            ValueError: a code of 2 (a damaged file), or a scale that is zero or not finite.
        """
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None, None]
        codes = ((packed[None] >> shifts) & 3).reshape(-1, packed.shape[1]).astype(np.int8) - np.int8(1)
        scale = np.asarray(weight_scale, np.float32).reshape(1, 1)
        scale = _reciprocal(scale) if self.inverse else scale
        return LatticeTensor(codes=codes, scales=scale, group=None, bits=2, levels="ternary")

    def _inverse(self, scales: np.ndarray) -> np.ndarray:
        """1 / scale as the file holds it; infinite where there is none."""
        with np.errstate(over="ignore"):
            return _reciprocal(scales).astype(self.scale).astype(np.float32)


def _reciprocal(values: np.ndarray) -> np.ndarray:
    """1 / value in float32; infinite where there is none."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: np.ndarray = np.float32(1) / values
    return inverse
