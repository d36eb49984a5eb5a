"""The weight layout of ONNX Runtime's `com.microsoft.MatMulNBits`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgewright.export.lattice import LatticeTensor, Levels, grouped
from edgewright.export.layout.holds import Holds

BLOCKS = (16, 32, 64, 128, 256)
"""Weights per scale that the operator takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatMulNBits:
    """Codes and float32 scales in two tensors; zero points, where there are any, in a third.

    Codes are stored low bits first, with the operator's default zero point `2 ** (bits - 1)` where none are given; a
    last block that the columns do not fill is padded with the code of zero.
    """

    bits: int
    """2, 4 or 8: what the operator takes."""
    block: int
    """Weights per scale: 16, 32, 64, 128 or 256."""
    zero_points: bool = False
    """Whether the zero points of a lattice are stored, with `pack_zero_points`."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8) or self.block not in BLOCKS:
            raise ValueError(f"MatMulNBits takes 2, 4 or 8 bits and blocks of 16 to 256, not {self.bits}, {self.block}")

    @property
    def zero(self) -> int:
        """The stored value of code 0, where there are no zero points."""
        return 2 ** (self.bits - 1)

    @property
    def holds(self) -> Holds:
        """What it holds exactly."""
        return Holds(
            codes=(-self.zero, self.zero - 1),
            granularity=self.block,
            scale=np.float32,
            zero_points=2**self.bits if self.zero_points else None,
            whole_blocks=False,
        )

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        return self.holds.why_not(lattice)

    def pack(self, lattice: LatticeTensor) -> tuple[np.ndarray, np.ndarray]:
        """`(B, scales)`: uint8 `[rows, blocks, block * bits / 8]` and float32 `[rows, blocks]`.

        Raises:
            ValueError: when the layout does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"{self.bits}-bit MatMulNBits cannot hold this lattice: {reason}")
        codes = grouped(lattice.codes, self.block).astype(np.int16)
        stored = (codes + self._zeros(lattice)[:, :, None]).astype(np.uint8)
        return _packed(stored, self.bits), np.ascontiguousarray(lattice.block_scales(self.block), np.float32)

    def pack_zero_points(self, lattice: LatticeTensor) -> np.ndarray:
        """The operator's fourth input: uint8 `[rows, ceil(blocks * bits / 8)]`, the last byte filled with zeros."""
        zeros = self._zeros(lattice).astype(np.uint8)
        missing = -zeros.shape[1] % (8 // self.bits)
        return _packed(np.pad(zeros, ((0, 0), (0, missing))), self.bits)

    def unpack(
        self, packed: np.ndarray, scales: np.ndarray, columns: int, zero_points: np.ndarray | None = None
    ) -> LatticeTensor:
        """The inverse of `pack` and `pack_zero_points`, with one scale per block.

        Raises:
            ValueError: shapes that contradict each other, or without zero points a 2-bit code of -2 (not a ternary
                weight).
        """
        rows, blocks = packed.shape[:2]
        stored = _unpacked(packed, self.bits).reshape(rows, -1)[:, :columns].astype(np.int16)
        scales = np.asarray(scales, np.float32).reshape(rows, -1)
        if zero_points is None:
            signed: dict[int, Levels] = {2: "ternary", 4: "int4", 8: "int8"}
            codes = np.ascontiguousarray(stored - self.zero).astype(np.int8)
            return LatticeTensor(codes=codes, scales=scales, group=self.block, bits=self.bits, levels=signed[self.bits])
        unsigned: dict[int, Levels] = {2: "uint2", 4: "uint4", 8: "uint8"}
        zeros = _unpacked(zero_points, self.bits).reshape(rows, -1)[:, :blocks].astype(np.int16)
        codes = stored - np.repeat(zeros, self.block, axis=1)[:, :columns]
        return LatticeTensor(
            codes=codes.astype(np.int16 if self.bits == 8 else np.int8),
            scales=scales,
            group=self.block,
            bits=self.bits,
            levels=unsigned[self.bits],
            zeros=zeros,
        )

    def _zeros(self, lattice: LatticeTensor) -> np.ndarray:
        """int16 `[rows, blocks]`."""
        if lattice.zeros is not None and not self.holds.without_zero_points(lattice):
            return lattice.per_block(lattice.zeros, self.block)
        return lattice.per_block(np.full(lattice.scales.shape, self.zero, np.int16), self.block)


def _packed(stored: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[..., n]` of small numbers -> `[..., n * bits / 8]`, low bits first."""
    parts = stored.reshape(*stored.shape[:-1], -1, 8 // bits)
    packed: np.ndarray = np.zeros(parts.shape[:-1], np.uint8)
    for index, shift in enumerate(_shifts(bits)):  # numpy reduces such short axes ten times as slowly
        packed |= parts[..., index] << shift
    return packed


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[..., m]` -> `[..., m, 8 / bits]`."""
    unpacked: np.ndarray = (packed[..., None] >> _shifts(bits)) & np.uint8(2**bits - 1)
    return unpacked


def _shifts(bits: int) -> np.ndarray:
    return (np.arange(8 // bits) * bits).astype(np.uint8)
