"""Weights as methods leave them, to ask the formats about: every code that can occur, and scales of the right kind."""

from __future__ import annotations

import numpy as np

from edgewright.export.lattice import LatticeTensor, Levels, ceil_div


def example_lattice(
    rows: int,
    columns: int,
    *,
    largest: int,
    levels: Levels,
    smallest: int | None = None,
    group: int | None = None,
    per_tensor: bool = False,
    precision: int = 8,
) -> LatticeTensor:
    """A lattice of that shape in which all codes occur.

    Args:
        rows, columns: of the weight.
        largest, smallest: code; the smallest is -largest unless given.
        levels: the codes that files store.
        group: columns per scale; None for one per row, or per tensor.
        per_tensor: whether all weights share a scale.
        precision: bits of a scale, the leading one included: 8 in bf16 and fp16 alike, 11 in fp16, 24 in fp32.
    """
    low = -largest if smallest is None else smallest
    codes = np.resize(np.arange(low, largest + 1, dtype=np.int8), (rows, columns))
    shape = (1, 1) if per_tensor else (rows, 1 if group is None else ceil_div(columns, group))
    last_bits = np.arange(1, 15, 2, dtype=np.float32) / np.float32(2 ** (precision - 1))
    scales = np.resize(np.float32(1) + last_bits, shape)
    return LatticeTensor(codes=codes, scales=scales, group=group, bits=2, levels=levels)
