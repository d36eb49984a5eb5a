"""Which exports hold exactly what a stage will train: known from the shapes of its layers, before any training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.compress.choice import LayerChoice, named
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from edgewright.export.lattice import LatticeTensor
    from edgewright.recipe import ExportConfig, StageConfig
    from edgewright.student import PresetStudentConfig

Shapes = Mapping[str, tuple[int, int]]
"""[out, in] of linear layers, by name."""

TABLES = ("embed", "lm_head", "wte", "wpe")
"""What the names of embeddings and heads have in them, which no method of a recipe takes unless told to."""
SAMPLE_ROWS = 8
"""Rows of the weights that the formats are asked about: what they hold is a matter of columns, not of rows."""


def preset_shapes(student: PresetStudentConfig) -> Shapes:
    """The linear layers of a preset, without the head."""
    size = student.sizes()
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    keys = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    numbers = range(size["num_hidden_layers"])
    return {f"model.layers.{number}.{name}": shape for number in numbers for name, shape in layer.items()}


def checkpoint_shapes(directory: Path) -> Shapes:
    """The matrices of a checked model directory but its embeddings and head, from the headers of its weights."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in stored_shapes(directory):
        layer = name.removesuffix(".weight")
        if len(shape) == 2 and layer != name and not any(table in layer for table in TABLES):
            found[layer] = (shape[0], shape[1])
    return found


def stored_shapes(directory: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every stored tensor of a checked model directory, its lattice aside."""
    for path in sorted(directory.glob("*.safetensors")):
        if path.name == "lattice.safetensors":
            continue
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def trained_lattices(stage: StageConfig, shapes: Shapes) -> dict[str, LatticeTensor]:
    """One example for every kind of weight that a stage quantizes, by the first layer of that kind.

    Raises:
        RecipeError: EW-703, a group does not divide a row.
    """
    found: dict[str, LatticeTensor] = {}
    for method in stage.methods:
        seen = set()
        for layer, (rows, columns) in shapes.items():
            if columns in seen or not _asked(method, layer):
                continue
            seen.add(columns)
            lattice = method.example(layer, min(rows, SAMPLE_ROWS), columns)
            if lattice is not None:
                found[layer] = lattice
    return found


def check_layers(stage: StageConfig, shapes: Shapes) -> None:
    """Refuse a stage whose methods cannot take a layer that they would get.

    Raises:
        RecipeError: what `LayerChoice.check_layer` raises, by the layer's name.
    """
    for method in stage.methods:
        for layer, (rows, columns) in shapes.items():
            if _asked(method, layer):
                method.check_layer(layer, rows, columns)


def _asked(method: LayerChoice, layer: str) -> bool:
    asked = not method.layers or any(named(pattern, layer) for pattern in method.layers)
    return asked and not any(named(pattern, layer) for pattern in method.exclude)


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


def count_parameters(directory: Path) -> int:
    """Stored parameters of a checked model directory, from the headers of its weights (tied weights once)."""
    return sum(math.prod(shape) for _, shape in stored_shapes(directory))
