"""Compressed weights of OpenVINO: a constant of small integers, converted, shifted by a zero point, and scaled.

With groups the codes have the shape `[rows, groups, group]` and the scales `[rows, groups, 1]`; without, `[rows,
columns]` and `[rows, 1]`. Elements of less than a byte follow each other with the low bits first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgewright.export.lattice import LatticeTensor, Levels
from edgewright.export.layout.holds import Holds

SIGNED: dict[str, Levels] = {"i4": "int4", "i8": "int8"}
UNSIGNED: dict[str, Levels] = {"u2": "uint2", "u4": "uint4", "u8": "uint8"}
ELEMENT_BITS = {"u2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8}
"""Bits of the element types, by the names that OpenVINO gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVinoWeight:
    """How a compressed weight is laid out."""

    element: str
    """A key of `ELEMENT_BITS`."""
    group: int | None
    """Columns per scale, which must divide the columns; None for one scale per row."""
    scale: type[np.floating] = np.float32
    """Precision of the scales: float16 or float32."""

    def __post_init__(self) -> None:
        if self.element not in ELEMENT_BITS:
            raise ValueError(f"the element type is one of {', '.join(ELEMENT_BITS)}, not {self.element}")

    @property
    def bits(self) -> int:
        """Of an element."""
        return ELEMENT_BITS[self.element]

    @property
    def zero(self) -> int:
        """The stored value of code 0 where the lattice has no zero points of its own; 0 for signed elements."""
        return 0 if self.element in SIGNED else 2 ** (self.bits - 1)

    @property
    def holds(self) -> Holds:
        """What it holds exactly."""
        half = 2 ** (self.bits - 1)
        return Holds(
            codes=(-half, half - 1),
            granularity=self.group or "row",
            scale=self.scale,
            zero_points=None if self.element in SIGNED else 2**self.bits,
        )

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        return self.holds.why_not(lattice)

    def pack(self, lattice: LatticeTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """`(codes, scales, zero points)`.

        Codes are the bytes of the constant, uint8 `[n]`; scales are `[rows, groups]` in the layout's precision; zero
        points uint8 `[rows, groups]`, or `[1, 1]` where all are the same, or None for signed elements.

        Raises:
            ValueError: when the layout does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"OpenVINO's {self.element} cannot hold this lattice: {reason}")
        columns = lattice.codes.shape[1]
        group = self.group or columns
        zeros = self._zeros(lattice, group)
        stored = lattice.codes.astype(np.int16)
        if zeros is not None:
            stored = stored + (zeros if zeros.size == 1 else np.repeat(zeros, group, axis=1))
        scales = lattice.block_scales(group) if self.group else self._row_scales(lattice)
        packed = _pack_bits((stored & (2**self.bits - 1)).astype(np.uint8).ravel(), self.bits)
        return packed, np.ascontiguousarray(scales, self.scale), None if zeros is None else zeros.astype(np.uint8)

    def unpack(
        self, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, shape: tuple[int, int]
    ) -> LatticeTensor:
        """The inverse of `pack`, for a weight of `shape` `[rows, columns]`.

        Raises:
            ValueError: shapes that contradict each other.
        """
        stored = _unpack_bits(packed, self.bits)[: shape[0] * shape[1]].reshape(shape).astype(np.int16)
        scales = np.ascontiguousarray(scales, np.float32)
        if self.element in SIGNED:
            codes = stored - ((stored >> (self.bits - 1)) << self.bits)  # two's complement
            return LatticeTensor(
                codes=codes.astype(np.int8),
                scales=scales,
                group=self.group,
                bits=self.bits,
                levels=SIGNED[self.element],
            )
        assert zeros is not None
        per_group = np.broadcast_to(zeros.astype(np.int16), scales.shape)
        codes = stored - np.repeat(per_group, self.group or shape[1], axis=1)
        return LatticeTensor(
            codes=codes.astype(np.int16 if self.bits == 8 else np.int8),
            scales=scales,
            group=self.group,
            bits=self.bits,
            levels=UNSIGNED[self.element],
            zeros=np.ascontiguousarray(per_group),
        )

    def _zeros(self, lattice: LatticeTensor, group: int) -> np.ndarray | None:
        if self.element in SIGNED:
            return None
        if lattice.zeros is None or self.holds.without_zero_points(lattice):
            return np.full((1, 1), self.zero, np.int16)
        if self.group is None:
            return np.broadcast_to(lattice.zeros[:, :1], (len(lattice.codes), 1))
        return lattice.per_block(lattice.zeros, group)

    def _row_scales(self, lattice: LatticeTensor) -> np.ndarray:
        return np.broadcast_to(lattice.scales[:, :1], (len(lattice.codes), 1))


def _pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    padded = np.pad(values, (0, -len(values) % per_byte)).reshape(-1, per_byte)
    packed: np.ndarray = np.bitwise_or.reduce(padded << (np.arange(per_byte) * bits).astype(np.uint8), axis=1)
    return packed


def _unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    shifts = (np.arange(8 // bits) * bits).astype(np.uint8)
    return ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).ravel()
