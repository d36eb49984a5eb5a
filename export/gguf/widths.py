"""The widths of GGUF files: ggml's tensor types, llama.cpp's mixes of them, and which of them takes a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgewright.export.lattice import LatticeTensor
from edgewright.export.layout.exact import TERNARY
from edgewright.export.layout.ggml import FORMATS, Q4_1, BlockFormat, OffsetFormat


@dataclass(frozen=True, slots=True)
class Width:
    """A tensor type of ggml."""

    number: int
    """ggml's number of the type."""
    file_type: int
    """llama.cpp's number of a file that is mostly of this type."""
    block: int
    """Weights of a block; rows are whole blocks."""
    size: int
    """Bytes of a block."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.size / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.block * self.size


WIDTHS = {
    "f32": Width(0, 0, 1, 4),
    "f16": Width(1, 1, 1, 2),
    "bf16": Width(30, 32, 1, 2),
    "q8_0": Width(8, 7, 32, 34),
    "q6_k": Width(14, 18, 256, 210),
    "q5_k": Width(13, 16, 256, 176),
    "q5_0": Width(6, 8, 32, 22),
    "q4_1": Width(3, 3, 32, 20),
    "q4_k": Width(12, 14, 256, 144),
    "q4_0": Width(2, 2, 32, 18),
    "iq4_nl": Width(20, 25, 32, 18),
    "q3_k": Width(11, 11, 256, 110),
    "q2_k": Width(10, 10, 256, 84),
    "q2_0": Width(42, 41, 64, 18),
    "tq2_0": Width(35, 37, 256, 66),
    "tq1_0": Width(34, 36, 256, 54),
}
"""The types by their names in llama.cpp, the widest first."""

SEARCHED = frozenset({"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl"})
"""Types whose codes ggml searches for, by importance where that is known; no lattice of a checkpoint survives that."""

BLOCKS: dict[str, BlockFormat | OffsetFormat] = {**FORMATS, "q4_1": Q4_1}
"""The types that hold a lattice."""

HOLDERS = ("tq2_0", "q2_0", "q4_0", "q4_1", "q5_0", "q8_0", "f16", "f32")
"""What takes a quantized weight that the width asked for does not hold: the first of these, no narrower, that does.
The ternary type that is narrower still is left out, since it runs at half the speed."""

DENSE = ("q8_0", "f16")
"""What takes a weight without a lattice that the width asked for does not hold: the first that can."""


def _more(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers that deserve more bits: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


Rule = Callable[[int, int], str | None]
"""From the number of a layer and the number of layers: the type of a weight, or None for the mix's usual one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A file of several types."""

    base: str
    """The type of most weights."""
    file_type: int
    rules: Mapping[str, Rule] = field(default_factory=dict)
    """The types of some weights of a layer, by their names in the file."""


MIXES = {
    "q3_k_m": Mix(
        base="q3_k",
        file_type=12,
        rules={
            "attn_v": lambda layer, layers: "q5_k" if layer < 2 else "q4_k",
            "ffn_down": lambda layer, layers: "q5_k" if layer < layers // 16 else "q4_k",
            "attn_output": lambda layer, layers: "q4_k",
            "attn_qkv": lambda layer, layers: "q4_k",
        },
    ),
    "q4_k_m": Mix(
        base="q4_k",
        file_type=15,
        rules={
            "attn_v": lambda layer, layers: "q6_k" if _more(layer, layers) else None,
            "ffn_down": lambda layer, layers: "q6_k" if _more(layer, layers) else None,
            "attn_qkv": lambda layer, layers: "q5_k",
        },
    ),
    "q5_k_m": Mix(
        base="q5_k",
        file_type=17,
        rules={
            "attn_v": lambda layer, layers: "q6_k" if _more(layer, layers) else None,
            "ffn_down": lambda layer, layers: "q6_k" if _more(layer, layers) else None,
            "attn_qkv": lambda layer, layers: "q6_k",
        },
    ),
}
"""llama.cpp's recipes of the same names; every other width is a mix of one type."""


def mix_of(quant: str) -> Mix:
    """The mix of a width, a key of `WIDTHS` or `MIXES`."""
    return MIXES.get(quant) or Mix(base=quant, file_type=WIDTHS[quant].file_type)


def type_in(mix: Mix, name: str, layers: int) -> str:
    """The type that a mix gives to a linear weight, by its name in the file (`blk.3.attn_v.weight`)."""
    parts = name.split(".")
    rule = mix.rules.get(parts[2]) if parts[0] == "blk" else None
    return (rule(int(parts[1]), layers) if rule else None) or mix.base


def width_for(
    asked: str, columns: int, lattice: LatticeTensor | None, *, beside_lattices: bool = False
) -> tuple[str, str | None]:
    """The type that stores a matrix, and why it is not the one asked for, or None.

    Args:
        asked: a key of `WIDTHS`.
        columns: of the matrix.
        lattice: its codes and scales; None where it is not quantized yet.
        beside_lattices: whether others of the checkpoint are: then one that is not was left out of the training that
            makes weights ternary, and is not rounded to that.
    """
    reason = _why_not(asked, columns, lattice)
    if reason is None and lattice is None and beside_lattices and asked in TERNARY:
        reason = f"it is on no lattice, as others are, and {asked} would lose it"
    if reason is None:
        return asked, None
    if lattice is None:
        return next(width for width in DENSE if _why_not(width, columns, None) is None), reason
    wide = 0 if asked in SEARCHED else WIDTHS[asked].bits
    holders = (width for width in HOLDERS if WIDTHS[width].bits >= wide and width != asked)
    return next(width for width in holders if _why_not(width, columns, lattice) is None), reason


def _why_not(width: str, columns: int, lattice: LatticeTensor | None) -> str | None:
    """Why a type does not take a matrix, or None; a lattice's scales may be rounded to fp16, its codes not."""
    if columns % WIDTHS[width].block:
        return f"its rows of {columns} are no multiple of the block of {WIDTHS[width].block}"
    if lattice is None or width == "f32":
        return None
    if width in SEARCHED:
        return f"{width} would round its lattice"
    if width == "bf16":
        values = lattice.dequantize()
        return None if np.array_equal(in_half(values, width), values) else "its values are not exact in bf16"
    try:
        halved = lattice.scales_rounded(np.float16)
    except ValueError:
        return "a scale is too large for float16"
    if width in BLOCKS:
        return BLOCKS[width].holds_exactly(halved)
    values = halved.dequantize()
    return None if np.array_equal(in_half(values, width), values) else "its values are not exact in f16"


def in_half(values: np.ndarray, width: str) -> np.ndarray:
    """float32 values rounded to `f16` or `bf16` (to nearest, ties to even); infinite where they are too large."""
    return half(values, width)[1]


def half(values: np.ndarray, width: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[rows, columns]` in `f16` or `bf16`: uint8 `[rows, 2 * columns]` as a file stores it, and `in_half`.

    Through torch, which does in vectors what numpy does one by one.
    """
    import torch

    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[width]
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(kind)
    return rounded.view(torch.uint8).numpy(), rounded.float().numpy()
