"""Disk space of a run at its fullest: packed tokens, checkpoints (one more than is kept, while it is written), models
and exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgewright.data import HfData

if TYPE_CHECKING:
    from edgewright.planner.simulate import Step
    from edgewright.recipe import ExportConfig, Recipe

BYTES_PER_TOKEN = 3.0
"""Of English and code with a vocabulary of some thousand tokens; more with larger ones, so this is the safe side."""
BITS = {
    **dict.fromkeys(("f32", "fp32"), 32.0),
    **dict.fromkeys(("f16", "bf16", "fp16"), 16.0),
    **dict.fromkeys(("q8_0", "int8"), 8.5),
    **dict.fromkeys(("q5_1",), 6.0),
    **dict.fromkeys(("q5_0",), 5.5),
    **dict.fromkeys(("q4_1",), 5.0),
    **dict.fromkeys(("q4_0", "int4"), 4.5),
    **dict.fromkeys(("tq2_0", "q2_0", "ternary"), 2.25),
    "tq1_0": 1.6875,
}
"""Bits of a weight with its share of the scales; other widths count as 32."""


def disk(recipe: Recipe, steps: dict[str, Step], vocab_size: int) -> dict[str, int]:
    """Bytes by kind, and their `total`.

    Args:
        steps: of every stage, by name.
    """
    found = {
        "data": _shards(recipe, vocab_size),
        "checkpoints": _checkpoints(recipe, steps),
        "models": sum(4 * step.parameters for step in steps.values()),
        "exports": sum(_export(export, steps, vocab_size) for export in recipe.exports),
    }
    return {**found, "total": sum(found.values())}


def _checkpoints(recipe: Recipe, steps: dict[str, Step]) -> int:
    """Of all stages, which keep theirs, and of the largest one more."""
    each = {name: 4 * step.parameters + step.optimizer_bytes for name, step in steps.items()}
    kept = sum(stage.training.keep_checkpoints * each[stage.name] for stage in recipe.stages)
    return kept + max(each.values())


def _shards(recipe: Recipe, vocab_size: int) -> int:
    if isinstance(recipe.data, HfData):
        return 0
    sizes = [entry[1] for entry in recipe.data.fingerprint() if isinstance(entry, list) and isinstance(entry[1], int)]
    return int(sum(sizes) / BYTES_PER_TOKEN * (2 if vocab_size <= 2**16 else 4))


def _export(export: ExportConfig, steps: dict[str, Step], vocab_size: int) -> int:
    """By the width of its matrices alone: embeddings are often wider, and small beside them."""
    from pathlib import Path

    from edgewright.exactness import count_parameters

    parameters = steps[export.model].parameters if export.model in steps else count_parameters(Path(export.model))
    return int(parameters * BITS.get(export.quant, 32.0) / 8)
