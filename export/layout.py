"""Bit layouts: how files store the codes and scales of a lattice.

`FORMATS` holds the block types of ggml (GGUF), `MatMulNBits` the weight layout of ONNX Runtime. All of them pack from
codes and unpack to codes; none sees a float weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgewright.export.lattice import LEVELS, LatticeTensor, Levels, grouped

BITS: dict[Levels, float] = {"ternary": 2, "int4": 4, "int8": 8}
"""The information width that `unpack` reports."""


def _why_not(lattice: LatticeTensor, *, block: int, low: int, high: int, scale: type[np.floating]) -> str | None:
    """Why a format with such blocks, codes and scales cannot hold this lattice exactly, or None."""
    if lattice.codes.size and (lattice.codes.min() < low or lattice.codes.max() > high):
        return f"codes reach {lattice.codes.min()}..{lattice.codes.max()}, the format holds {low}..{high}"
    if lattice.group is not None and lattice.group % block and lattice.scales.shape[1] > 1:
        return f"a block of {block} weights straddles scale groups of {lattice.group}"
    with np.errstate(over="ignore"):
        if not np.array_equal(lattice.scales.astype(scale).astype(np.float32), lattice.scales):
            return f"a scale is not exact in {np.dtype(scale).name}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A ggml tensor type: every block of `block` weights is its packed codes and one fp16 scale, side by side."""

    name: str
    block: int
    levels: Levels
    """What `unpack` gives back."""
    pack_codes: Callable[[np.ndarray], np.ndarray]
    """int8 `[n, block]` -> uint8 `[n, payload]`."""
    unpack_codes: Callable[[np.ndarray], np.ndarray]
    """The inverse of `pack_codes`."""
    scale_first: bool
    payload: int
    """Bytes of the codes of one block."""

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * (self.payload + 2) / self.block

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        columns = lattice.codes.shape[1]
        if columns % self.block:
            return f"{columns} columns are no multiple of the block of {self.block}"
        low, high = LEVELS[self.levels]
        return _why_not(lattice, block=self.block, low=low, high=high, scale=np.float16)

    def pack(self, lattice: LatticeTensor) -> np.ndarray:
        """uint8 `[rows, bytes per row]`.

        Raises:
            ValueError: when the format does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"{self.name} cannot hold this lattice: {reason}")
        codes = self.pack_codes(lattice.codes.reshape(-1, self.block))
        scales = np.ascontiguousarray(lattice.block_scales(self.block), np.float16).reshape(-1, 1).view(np.uint8)
        parts = (scales, codes) if self.scale_first else (codes, scales)
        return np.concatenate(parts, axis=1).reshape(len(lattice.codes), -1)

    def unpack(self, data: np.ndarray) -> LatticeTensor:
        """The lattice in uint8 `[rows, bytes per row]`, with one scale per block.

        Raises:
            ValueError: codes that the format's levels exclude (a damaged file).
        """
        blocks = data.reshape(-1, self.payload + 2)
        start = 2 if self.scale_first else 0
        codes = self.unpack_codes(blocks[:, start : start + self.payload])
        scales = blocks[:, :2] if self.scale_first else blocks[:, -2:]
        scales = np.ascontiguousarray(scales).view(np.float16).astype(np.float32)
        rows = len(data)
        return LatticeTensor(
            codes=codes.reshape(rows, -1),
            scales=scales.reshape(rows, -1),
            group=self.block,
            bits=BITS[self.levels],
            levels=self.levels,
        )


_POWERS = np.array([81, 27, 9, 3, 1], np.uint16)


def _pack_tq1_0(codes: np.ndarray) -> np.ndarray:
    """Five base-3 digits per byte (four in the last four bytes), the first most significant, scaled to 256 / 243."""
    digits = (codes + 1).astype(np.uint16)
    first = np.einsum("nkm,k->nm", digits[:, :160].reshape(-1, 5, 32), _POWERS)
    second = np.einsum("nkm,k->nm", digits[:, 160:240].reshape(-1, 5, 16), _POWERS)
    last = np.einsum("nkm,k->nm", digits[:, 240:].reshape(-1, 4, 4), _POWERS[:4])
    values = np.concatenate([first, second, last], axis=1).astype(np.uint32)
    return ((values * 256 + 242) // 243).astype(np.uint8)


def _unpack_tq1_0(data: np.ndarray) -> np.ndarray:
    """Digit n of a byte is `((byte * 3**n mod 256) * 3) >> 8`."""

    def digits(part: np.ndarray, count: int) -> np.ndarray:
        shifted = part[:, None, :].astype(np.uint32) * (3 ** np.arange(count, dtype=np.uint32))[None, :, None]
        return (((shifted & 0xFF) * 3) >> 8).reshape(len(part), -1)

    parts = [digits(data[:, :32], 5), digits(data[:, 32:48], 5), digits(data[:, 48:52], 4)]
    return (np.concatenate(parts, axis=1).astype(np.int8) - np.int8(1)).astype(np.int8)


_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


def _pack_tq2_0(codes: np.ndarray) -> np.ndarray:
    """Two halves of 32 bytes; byte m holds weights m, m+32, m+64, m+96 of its 128 in bits 0, 2, 4, 6 as code + 1."""
    values = (codes + 1).astype(np.uint8).reshape(-1, 2, 4, 32) << _SHIFTS[:, None]
    return np.bitwise_or.reduce(values, axis=2).reshape(len(codes), -1)


def _unpack_tq2_0(data: np.ndarray) -> np.ndarray:
    values = (data.reshape(-1, 2, 1, 32) >> _SHIFTS[:, None]) & 3
    return values.reshape(len(data), -1).astype(np.int8) - np.int8(1)


def _pack_q4_0(codes: np.ndarray) -> np.ndarray:
    """Weight m in the low half of byte m, weight m + 16 in its high half, as code + 8."""
    values = (codes + 8).astype(np.uint8)
    return values[:, :16] | (values[:, 16:] << np.uint8(4))


def _unpack_q4_0(data: np.ndarray) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], axis=1).astype(np.int8) - np.int8(8)


def _as_bytes(codes: np.ndarray) -> np.ndarray:
    return codes.view(np.uint8)


def _as_codes(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.int8)


FORMATS: dict[str, BlockFormat] = {
    "tq1_0": BlockFormat(
        name="tq1_0",
        block=256,
        levels="ternary",
        pack_codes=_pack_tq1_0,
        unpack_codes=_unpack_tq1_0,
        scale_first=False,
        payload=52,
    ),
    "tq2_0": BlockFormat(
        name="tq2_0",
        block=256,
        levels="ternary",
        pack_codes=_pack_tq2_0,
        unpack_codes=_unpack_tq2_0,
        scale_first=False,
        payload=64,
    ),
    "q8_0": BlockFormat(
        name="q8_0",
        block=32,
        levels="int8",
        pack_codes=_as_bytes,
        unpack_codes=_as_codes,
        scale_first=True,
        payload=32,
    ),
    "q4_0": BlockFormat(
        name="q4_0",
        block=32,
        levels="int4",
        pack_codes=_pack_q4_0,
        unpack_codes=_unpack_q4_0,
        scale_first=True,
        payload=16,
    ),
}
"""The block layouts of ggml, by the name of their width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatMulNBits:
    """The weight layout of ONNX Runtime's `com.microsoft.MatMulNBits`: codes and float32 scales in two tensors.

    Codes are stored with the operator's default zero point `2 ** (bits - 1)`, low bits first; a last block that the
    columns do not fill is padded with the code of zero.
    """

    bits: int
    """2, 4 or 8: what the operator takes."""
    block: int
    """Weights per scale: 16, 32, 64, 128 or 256."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8) or self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"MatMulNBits takes 2, 4 or 8 bits and blocks of 16 to 256, not {self.bits}, {self.block}")

    @property
    def zero(self) -> int:
        """The stored value of code 0."""
        return 2 ** (self.bits - 1)

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        return _why_not(lattice, block=self.block, low=-self.zero, high=self.zero - 1, scale=np.float32)

    def pack(self, lattice: LatticeTensor) -> tuple[np.ndarray, np.ndarray]:
        """`(B, scales)`: uint8 `[rows, blocks, block * bits / 8]` and float32 `[rows, blocks]`.

        Raises:
            ValueError: when the layout does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"{self.bits}-bit MatMulNBits cannot hold this lattice: {reason}")
        stored = (grouped(lattice.codes, self.block).astype(np.int16) + self.zero).astype(np.uint8)
        per_byte = 8 // self.bits
        parts = stored.reshape(*stored.shape[:2], -1, per_byte)
        shifts = (np.arange(per_byte) * self.bits).astype(np.uint8)
        packed = np.bitwise_or.reduce(parts << shifts, axis=3)
        return packed, np.ascontiguousarray(lattice.block_scales(self.block), np.float32)

    def unpack(self, packed: np.ndarray, scales: np.ndarray, columns: int) -> LatticeTensor:
        """The inverse of `pack`, with one scale per block.

        Raises:
            ValueError: shapes that contradict each other, or a 2-bit code of -2 (not a ternary weight).
        """
        shifts = (np.arange(8 // self.bits) * self.bits).astype(np.uint8)
        stored = (packed[..., None] >> shifts) & np.uint8(2**self.bits - 1)
        codes = (stored.reshape(len(packed), -1).astype(np.int16) - self.zero).astype(np.int8)[:, :columns]
        names: dict[int, Levels] = {2: "ternary", 4: "int4", 8: "int8"}
        levels = names[self.bits]
        scales = np.asarray(scales, np.float32).reshape(len(packed), -1)
        return LatticeTensor(
            codes=np.ascontiguousarray(codes), scales=scales, group=self.block, bits=self.bits, levels=levels
        )
