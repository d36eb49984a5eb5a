"""Which widths of which targets hold a lattice exactly: read off the table of layouts, for `check` and `ls`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgewright.export.lattice import LatticeTensor
from edgewright.export.layout import LAYOUTS
from edgewright.export.layout.holds import inexact

FLOATS: Mapping[str, type[np.floating] | None] = {
    "f32": None, "fp32": None, "f16": np.float16, "fp16": np.float16, "bf16": None
}  # fmt: skip
"""The widths that store numbers as they are, with numpy's type for them; none for float32, and for what it lacks."""

TERNARY = frozenset({"ternary", "q2_0", "tq2_0", "tq1_0"})
"""The widths of ternary training. Rounded to them without it, a weight is lost: beside lattices it gets 8 bits."""


def why_not(target: str, width: str, lattice: LatticeTensor) -> str | None:
    """None when a width of a target gives the lattice back bit for bit, else the reason in words."""
    if width in FLOATS:
        return _as_numbers(width, lattice)
    layouts = [row.layout for row in LAYOUTS if (row.target, row.width) == (target, width)]
    if not layouts:
        return f"{width} rounds every weight anew"
    reasons = [layout.holds_exactly(lattice) for layout in layouts]
    return None if None in reasons else reasons[0]


def exact_in(lattice: LatticeTensor) -> dict[str, list[str]]:
    """The packed widths that hold a lattice, the narrowest first, by target; targets without one are left out."""
    found: dict[str, list[str]] = {}
    for row in LAYOUTS:
        widths = found.setdefault(row.target, [])
        if row.width not in widths and row.layout.holds_exactly(lattice) is None:
            widths.append(row.width)
    return {target: widths for target, widths in found.items() if widths}


def _as_numbers(width: str, lattice: LatticeTensor) -> str | None:
    values = lattice.dequantize()
    if width == "bf16":
        exact = not (values.view(np.uint32) & 0xFFFF).any()
        return None if exact else "a weight is not exact in bfloat16"
    kind = FLOATS[width]
    return None if kind is None else inexact(values, kind, "a weight")
