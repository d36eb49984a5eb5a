"""Which exports hold exactly what a stage will train: known from the shapes of its layers, before any training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from edgewright.export.lattice import LatticeTensor
    from edgewright.preview import Preview
    from edgewright.recipe import ExportConfig

SAMPLE_ROWS = 8
"""Rows of the weights that the formats are asked about: what they hold is a matter of columns, not of rows."""


def stored_shapes(directory: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every stored tensor of a checked model directory, its lattice aside."""
    for path in sorted(directory.glob("*.safetensors")):
        if path.name == "lattice.safetensors":
            continue
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def trained_lattices(ahead: Preview) -> dict[str, LatticeTensor]:
    """One example for every kind of weight that a stage quantizes, by the first layer of that kind."""
    found: dict[str, LatticeTensor] = {}
    for method, shapes in ahead.shares:
        seen = set()
        for layer, (rows, columns) in shapes.items():
            if columns in seen:
                continue
            seen.add(columns)
            lattice = method.example(layer, min(rows, SAMPLE_ROWS), columns)
            if lattice is not None:
                found[layer] = lattice
    return found


def on_no_lattice(ahead: Preview) -> list[str]:
    """The layers that no method of a stage quantizes."""
    return [*(layer for method, shapes in ahead.shares if not method.quantizes for layer in shapes), *ahead.alone]


def held_by(lattices: Iterable[LatticeTensor]) -> str:
    """The widths that hold all of them, by target, as a line of text."""
    from edgewright.export.layout.exact import exact_in

    each = [exact_in(lattice) for lattice in lattices]
    common = {
        target: [width for width in widths if all(width in other.get(target, ()) for other in each)]
        for target, widths in each[0].items()
    }
    return "; ".join(f"{target} {' '.join(widths)}" for target, widths in common.items() if widths) or "fp32 alone"


def not_held(export: ExportConfig, lattices: Mapping[str, LatticeTensor]) -> Iterator[str]:
    """Why an export stores weights of its stage wider than asked, one line for each kind of them.

    Raises:
        RecipeError: EW-733, it would store none of them as asked.
    """
    from edgewright.export.layout.exact import why_not

    reasons = {layer: why_not(export.to, export.quant, lattice) for layer, lattice in lattices.items()}
    lost = {layer: reason for layer, reason in reasons.items() if reason is not None}
    if lost and len(lost) == len(reasons):
        layer, reason = next(iter(lost.items()))
        raise RecipeError(
            "EW-733",
            f"no weight that stage {export.model!r} trains fits {export.quant} in {export.to}",
            expected=f"a width that holds them: {held_by(lattices.values())}",
            found=f"{layer}: {reason}",
            fix="choose one of these widths, or another granularity or format of the method",
        )
    for layer, reason in lost.items():
        columns = lattices[layer].codes.shape[1]
        yield f"rows of {columns} columns, as those of {layer}, are stored wider: {reason}"


def not_rounded(export: ExportConfig, free: list[str]) -> Iterator[str]:
    """What an export does with layers on no lattice beside others on one, where its width is for trained ones alone."""
    from edgewright.export.layout.exact import TERNARY

    if free and export.quant in TERNARY:
        yield f"layers on no lattice are stored wider, in 8 bits: {len(free)}, the first {free[0]}"


def count_parameters(directory: Path) -> int:
    """Stored parameters of a checked model directory, from the headers of its weights (tied weights once)."""
    return sum(math.prod(shape) for _, shape in stored_shapes(directory))
