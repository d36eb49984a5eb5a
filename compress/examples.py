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
    scale: type[np.floating] = np.float16,
) -> LatticeTensor:
    """A lattice of that shape in which all codes occur.

    Args:
        rows, columns: of the weight.
        largest, smallest: code; the smallest is -largest unless given.
        levels: the codes that files store.
        group: columns per scale; None for one per row, or per tensor.
        per_tensor: whether all weights share a scale.
        scale: the precision that the scales need; with float16 they are exact in bfloat16 too.
    """
    low = -largest if smallest is None else smallest
    codes = np.resize(np.arange(low, largest + 1, dtype=np.int8), (rows, columns))
    shape = (1, 1) if per_tensor else (rows, 1 if group is None else ceil_div(columns, group))
    scales = np.resize(np.linspace(1, 1.9, 7, dtype=np.float32), shape)
    exact = (scales * 128).round() / np.float32(128) if scale is np.float16 else scales / np.float32(3)
    return LatticeTensor(codes=codes, scales=exact.astype(np.float32), group=group, bits=2, levels=levels)
