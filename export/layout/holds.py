"""What a bit layout can hold exactly: which codes, how many scales, in which precision.

Every layout has one of these, its `holds`; a writer asks it before it packs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgewright.export.lattice import LatticeTensor

Granularity = Literal["tensor", "row"] | int
"""A scale per tensor, per row, or per so many columns of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """The lattices that a layout gives back bit for bit."""

    codes: tuple[int, int]
    """The codes that can be stored, both ends included."""
    granularity: Granularity
    """The finest scales that can be stored; coarser ones are repeated."""
    scale: type[np.floating]
    """The precision of a scale."""
    zero_points: int | None = None
    """With zero points: how many codes in a row a group may use, wherever zero lies among them."""
    whole_blocks: bool = True
    """Whether the columns must be a multiple of the block."""
    rows: int = 1
    """What the number of rows must be a multiple of."""

    def why_not(self, lattice: LatticeTensor) -> str | None:
        """None when the layout loses nothing of this lattice, else the reason in words."""
        if not lattice.symmetric:
            return "its weights are not codes times scales"
        return (
            self._shape_does_not_fit(lattice)
            or self._codes_do_not_fit(lattice)
            or self._scales_do_not_fit(lattice)
            or inexact(lattice.scales, self.scale)
        )

    def _shape_does_not_fit(self, lattice: LatticeTensor) -> str | None:
        rows, columns = lattice.codes.shape
        if rows % self.rows:
            return f"{rows} rows are no multiple of {self.rows}"
        if isinstance(self.granularity, int) and self.whole_blocks and columns % self.granularity:
            return f"{columns} columns are no multiple of the block of {self.granularity}"
        return None

    def without_zero_points(self, lattice: LatticeTensor) -> bool:
        """Whether its codes can be stored as they are, so that zero points of its own are not needed."""
        low, high = self.codes
        return not lattice.codes.size or bool(lattice.codes.min() >= low and lattice.codes.max() <= high)

    def _codes_do_not_fit(self, lattice: LatticeTensor) -> str | None:
        if self.without_zero_points(lattice):
            return None
        codes, (low, high) = lattice.codes, self.codes
        if self.zero_points is None or lattice.zeros is None:
            return f"codes reach {codes.min()}..{codes.max()}, the format holds {low}..{high}"
        last, zeros = self.zero_points - 1, lattice.zeros
        stored = lattice.stored
        if stored.min() < 0 or stored.max() > last or zeros.min() < 0 or zeros.max() > last:
            return f"codes and zero points reach {stored.min()}..{stored.max()}, the format holds 0..{last}"
        return None

    def _scales_do_not_fit(self, lattice: LatticeTensor) -> str | None:
        if isinstance(self.granularity, int):
            if lattice.group is not None and lattice.group % self.granularity and lattice.scales.shape[1] > 1:
                return f"a block of {self.granularity} weights straddles scale groups of {lattice.group}"
            return None
        per_row = lattice.scales[:, :1]
        if not (lattice.scales == per_row).all() or not _equal_columns(lattice.zeros):
            return f"it has a scale per {lattice.group} weights, the format one per {self.granularity}"
        if self.granularity == "tensor" and lattice.single_scale is None:
            return "it has a scale per row, the format one per tensor"
        return None


def _equal_columns(zeros: np.ndarray | None) -> bool:
    return zeros is None or bool((zeros == zeros[:, :1]).all())


def inexact(values: np.ndarray, dtype: type[np.floating], what: str = "a scale") -> str | None:
    """Why float32 values are not exact in a narrower type; None when they are."""
    with np.errstate(over="ignore"):
        same = np.array_equal(values.astype(dtype).astype(np.float32), values)
    return None if same else f"{what} is not exact in {np.dtype(dtype).name}"
