"""The block types of ggml, as GGUF files store them: packed codes and fp16 scales side by side, block after block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgewright.export.lattice import LatticeTensor, Levels
from edgewright.export.layout.holds import Holds, inexact

BITS: dict[Levels, float] = {"ternary": 2, "uint2": 2, "int4": 4, "uint4": 4, "int5": 5, "int8": 8}
"""The information width that `unpack` reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A ggml tensor type: every block of `block` weights is its packed codes and one fp16 scale, side by side."""

    name: str
    block: int
    levels: Levels
    """What `unpack` gives back."""
    codes: tuple[int, int]
    """The codes that it stores, both ends included."""
    pack_codes: Callable[[np.ndarray], np.ndarray]
    """int8 `[n, block]` -> uint8 `[n, payload]`."""
    unpack_codes: Callable[[np.ndarray], np.ndarray]
    """The inverse of `pack_codes`."""
    scale_first: bool
    payload: int
    """Bytes of the codes of one block."""
    zero: int | None = None
    """The zero point that `unpack` reports, where the levels have one."""

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * (self.payload + 2) / self.block

    @property
    def holds(self) -> Holds:
        """What it holds exactly."""
        return Holds(codes=self.codes, granularity=self.block, scale=np.float16)

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        return self.holds.why_not(lattice)

    def pack(self, lattice: LatticeTensor) -> np.ndarray:
        """uint8 `[rows, bytes per row]`.

        Raises:
            ValueError: when the format does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"{self.name} cannot hold this lattice: {reason}")
        codes = self.pack_codes(lattice.codes.reshape(-1, self.block))
        scales = _halves(lattice.block_scales(self.block))
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
        scales = _floats(blocks[:, :2] if self.scale_first else blocks[:, -2:]).reshape(len(data), -1)
        return LatticeTensor(
            codes=codes.reshape(len(data), -1),
            scales=scales,
            group=self.block,
            bits=BITS[self.levels],
            levels=self.levels,
            zeros=None if self.zero is None else np.full(scales.shape, self.zero, np.int16),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetFormat:
    """ggml's Q4_1: 32 codes 0 to 15 with a scale and an offset, `code * scale + offset`, all in one block.

    It holds lattices with offsets, and those with zero points, whose offset is `-zero * scale`.
    """

    name: str = "q4_1"
    block: int = 32
    payload: int = 16

    @property
    def bits_per_weight(self) -> float:
        """Scales and offsets included."""
        return 8 * (self.payload + 4) / self.block

    @property
    def holds(self) -> Holds:
        """What it holds exactly of lattices without offsets, if `-zero * scale` is exact as well."""
        return Holds(codes=(-8, 7), granularity=self.block, scale=np.float16, zero_points=16)

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when `pack` loses nothing, else the reason in words."""
        if lattice.offsets is None:
            reason = self.holds.why_not(lattice)
            return reason or inexact(_offsets(lattice), np.float16, "an offset")
        if lattice.codebook is not None or lattice.levels != "uint4" or lattice.zeros is not None:
            return "only codes 0 to 15 may have an offset"
        plain = LatticeTensor(
            codes=(lattice.codes - np.int8(8)), scales=lattice.scales, group=lattice.group, bits=4, levels="int4"
        )
        return self.holds.why_not(plain) or inexact(lattice.offsets, np.float16, "an offset")

    def pack(self, lattice: LatticeTensor) -> np.ndarray:
        """uint8 `[rows, bytes per row]`.

        Raises:
            ValueError: when the format does not hold the lattice exactly.
        """
        reason = self.holds_exactly(lattice)
        if reason is not None:
            raise ValueError(f"{self.name} cannot hold this lattice: {reason}")
        stored = lattice.codes if lattice.offsets is not None else lattice.codes + lattice.per_weight(_zeros(lattice))
        codes = _pack_halves(stored.astype(np.uint8).reshape(-1, self.block))
        scales = _halves(lattice.block_scales(self.block))
        offsets = _halves(lattice.per_block(_offsets(lattice), self.block))
        return np.concatenate([scales, offsets, codes], axis=1).reshape(len(lattice.codes), -1)

    def unpack(self, data: np.ndarray) -> LatticeTensor:
        """The lattice in uint8 `[rows, bytes per row]`, with one scale and one offset per block."""
        blocks = data.reshape(-1, self.payload + 4)
        return LatticeTensor(
            codes=_unpack_halves(blocks[:, 4:]).astype(np.int8).reshape(len(data), -1),
            scales=_floats(blocks[:, :2]).reshape(len(data), -1),
            offsets=_floats(blocks[:, 2:4]).reshape(len(data), -1),
            group=self.block,
            bits=4,
            levels="uint4",
        )


def _zeros(lattice: LatticeTensor) -> np.ndarray:
    """The zero points of a lattice without offsets: the middle, whose offset is always exact, or its own."""
    if lattice.zeros is None or Q4_1.holds.without_zero_points(lattice):
        return np.full(lattice.scales.shape, 8, np.int16)
    return lattice.zeros


def _offsets(lattice: LatticeTensor) -> np.ndarray:
    return -_zeros(lattice).astype(np.float32) * lattice.scales if lattice.offsets is None else lattice.offsets


def _halves(values: np.ndarray) -> np.ndarray:
    """float32 -> uint8 `[n, 2]`, as fp16."""
    return np.ascontiguousarray(values, np.float16).reshape(-1, 1).view(np.uint8)


def _floats(data: np.ndarray) -> np.ndarray:
    """The inverse of `_halves`."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


# ---------------------------------------------------------------- codes


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


def _pack_q2_0(codes: np.ndarray) -> np.ndarray:
    """Four weights in a row to a byte, low bits first, as code + 1."""
    values = (codes + 1).astype(np.uint8).reshape(-1, 16, 4) << _SHIFTS
    return np.bitwise_or.reduce(values, axis=2)


def _unpack_q2_0(data: np.ndarray) -> np.ndarray:
    values = (data[:, :, None] >> _SHIFTS) & 3
    return values.reshape(len(data), -1).astype(np.int8) - np.int8(1)


def _pack_halves(values: np.ndarray) -> np.ndarray:
    """uint8 0 to 15 `[n, 32]`: weight m in the low half of byte m, weight m + 16 in its high half."""
    return values[:, :16] | (values[:, 16:] << np.uint8(4))


def _unpack_halves(data: np.ndarray) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], axis=1)


def _pack_q4_0(codes: np.ndarray) -> np.ndarray:
    """Halves of code + 8."""
    return _pack_halves((codes + 8).astype(np.uint8))


def _unpack_q4_0(data: np.ndarray) -> np.ndarray:
    return _unpack_halves(data).astype(np.int8) - np.int8(8)


def _pack_q5_0(codes: np.ndarray) -> np.ndarray:
    """Four bytes with the fifth bits of code + 16, weight m in bit m, then halves of the lower four."""
    values = (codes + 16).astype(np.uint8)
    high = np.packbits(values >> 4, axis=1, bitorder="little")
    return np.concatenate([high, _pack_halves(values & 15)], axis=1)


def _unpack_q5_0(data: np.ndarray) -> np.ndarray:
    high = np.unpackbits(np.ascontiguousarray(data[:, :4]), axis=1, bitorder="little")
    return (_unpack_halves(data[:, 4:]) | (high << np.uint8(4))).astype(np.int8) - np.int8(16)


def _as_bytes(codes: np.ndarray) -> np.ndarray:
    return codes.view(np.uint8)


def _as_codes(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.int8)


FORMATS: dict[str, BlockFormat] = {
    "tq1_0": BlockFormat(
        name="tq1_0",
        block=256,
        levels="ternary",
        codes=(-1, 1),
        pack_codes=_pack_tq1_0,
        unpack_codes=_unpack_tq1_0,
        scale_first=False,
        payload=52,
    ),
    "tq2_0": BlockFormat(
        name="tq2_0",
        block=256,
        levels="ternary",
        codes=(-1, 1),
        pack_codes=_pack_tq2_0,
        unpack_codes=_unpack_tq2_0,
        scale_first=False,
        payload=64,
    ),
    "q2_0": BlockFormat(
        name="q2_0",
        block=64,
        levels="uint2",
        codes=(-1, 2),
        pack_codes=_pack_q2_0,
        unpack_codes=_unpack_q2_0,
        scale_first=True,
        payload=16,
        zero=1,
    ),
    "q4_0": BlockFormat(
        name="q4_0",
        block=32,
        levels="int4",
        codes=(-8, 7),
        pack_codes=_pack_q4_0,
        unpack_codes=_unpack_q4_0,
        scale_first=True,
        payload=16,
    ),
    "q5_0": BlockFormat(
        name="q5_0",
        block=32,
        levels="int5",
        codes=(-16, 15),
        pack_codes=_pack_q5_0,
        unpack_codes=_unpack_q5_0,
        scale_first=True,
        payload=20,
    ),
    "q8_0": BlockFormat(
        name="q8_0",
        block=32,
        levels="int8",
        codes=(-128, 127),
        pack_codes=_as_bytes,
        unpack_codes=_as_codes,
        scale_first=True,
        payload=32,
    ),
}
"""The block types whose weights are codes times scales, by the name of their width."""

Q4_1 = OffsetFormat()
"""The one with an offset."""
