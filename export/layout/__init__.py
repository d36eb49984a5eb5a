"""Bit layouts: how files store the codes and scales of a lattice, and which lattices each of them holds exactly.

All of them pack from codes and unpack to codes; none sees a float weight. One file each: `layout/ggml.py` (GGUF),
`layout/matmulnbits.py` (ONNX Runtime), `layout/openvino.py`, `layout/transformers.py` (bitsandbytes, BitNet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgewright.export.lattice import LatticeTensor
from edgewright.export.layout.ggml import FORMATS, Q4_1, BlockFormat, OffsetFormat
from edgewright.export.layout.holds import Holds
from edgewright.export.layout.matmulnbits import MatMulNBits
from edgewright.export.layout.openvino import OpenVinoWeight
from edgewright.export.layout.transformers import NF4, BitNet, Int8, Nf4

__all__ = [
    "FORMATS", "LAYOUTS", "NF4", "Q4_1", "BitNet", "BlockFormat", "Int8", "MatMulNBits", "Nf4", "OffsetFormat",
    "OpenVinoWeight", "describe_layouts", "exact_lattices",
]  # fmt: skip


class Layout(Protocol):
    """What every layout offers."""

    @property
    def holds(self) -> Holds:
        """The codes and scales that it holds exactly."""

    def holds_exactly(self, lattice: LatticeTensor) -> str | None:
        """None when it loses nothing of this lattice, else the reason in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: a layout as one width of one target uses it."""

    target: str
    width: str
    layout: Layout
    note: str = ""
    """What the columns of the table cannot say."""


_OFFSET = "and codes 0..15 with an offset"
LAYOUTS: tuple[Row, ...] = (
    *(Row(target="gguf", width=name, layout=form) for name, form in FORMATS.items()),
    Row(target="gguf", width="q4_1", layout=Q4_1, note=_OFFSET),
    *(
        Row(target=target, width=width, layout=MatMulNBits(bits=bits, block=32, zero_points=True))
        for target in ("onnx", "genai")
        for width, bits in (("ternary", 2), ("int4", 4), ("int8", 8))
    ),
    *(
        Row(target="openvino", width=width, layout=OpenVinoWeight(element=element, group=group))
        for width, element in (("ternary", "u2"), ("int4", "i4"), ("int4", "u4"), ("int8", "i8"), ("int8", "u8"))
        for group in (None, 16)
    ),
    Row(target="hf", width="ternary", layout=BitNet()),
    Row(target="hf", width="nf4", layout=Nf4(), note="and its own 16 values"),
    Row(target="hf", width="int8", layout=Int8(), note="if some float32 is 127 times the scale"),
)
"""The one table of what is exact where. Blocks are the smallest that the writers use; coarser scales fit them too."""


def exact_lattices(target: str, width: str) -> list[str]:
    """What a width of a target holds exactly, one line for each of its layouts; empty for floating-point widths."""
    return [_describe(row) for row in LAYOUTS if (row.target, row.width) == (target, width)]


def describe_layouts() -> str:
    """The table as text, one line a row."""
    return "\n".join(f"{row.target:<9} {row.width:<8} {_describe(row)}" for row in LAYOUTS)


def _describe(row: Row) -> str:
    holds = row.layout.holds
    low, high = holds.codes
    codes = f"codes {low}..{high}"
    if holds.zero_points is not None:
        codes += f" or 0..{holds.zero_points - 1} with zero points"
    if isinstance(holds.granularity, int):
        scales = f"a scale per tensor, row or multiple of {holds.granularity} columns"
        scales += f" of rows that {holds.granularity} divides" if holds.whole_blocks else ""
    else:
        scales = f"a scale per {holds.granularity}"
    rows = f", rows a multiple of {holds.rows}" if holds.rows > 1 else ""
    return ", ".join(filter(None, [codes, f"{scales} in {np.dtype(holds.scale).name}{rows}", row.note]))
