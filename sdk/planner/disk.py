"""Disk space of a run at its fullest: packed tokens, checkpoints (one more than is kept, while it is written), models
and exports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.data import HfData
from edgewright.data.files import find
from edgewright.data.reading import text_bytes

if TYPE_CHECKING:
    from edgewright.planner.cached import CachePlan
    from edgewright.planner.stage_plan import StagePlan
    from edgewright.planner.written import WrittenPlan
    from edgewright.recipe import ExportConfig, Recipe

TOKENIZER_BYTES = 64
"""Of a tokenizer's files, for each token (measured); every model and checkpoint has them."""
STATE_BYTES = 26_000
"""Of a checkpoint's other files, mostly the states of the random generators (measured)."""
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


def disk(
    recipe: Recipe,
    stages: dict[str, StagePlan],
    vocab_size: int,
    caches: Sequence[CachePlan] = (),
    written: Sequence[WrittenPlan] = (),
) -> dict[str, int]:
    """Bytes by kind, and their `total`: what the run leaves, and `spare`, which it needs meanwhile.

    Args:
        stages: every training, by name.
        caches, written: of the stages that make them.
    """
    files = TOKENIZER_BYTES * vocab_size
    found = {
        "data": _shards(recipe, vocab_size),
        **_checkpoints(recipe, stages, files + STATE_BYTES),
        "models": sum(stage.model_bytes + files for stage in stages.values()),
        "caches": sum(cache.bytes for cache in caches),
        "generated": sum(each.bytes for each in written) + sum(_texts(recipe, vocab_size)),
        "exports": sum(_export(export, stages) for export in recipe.exports),
    }
    return {**found, "total": sum(found.values())}


def disk_used(directory: Path) -> dict[str, int]:
    """The same of a run that is done, measured."""
    checkpoints = {path: _size(path) for path in directory.glob("stages/*/checkpoints/step-*")}
    found = {
        "data": _size(directory / "data"),
        "checkpoints": sum(checkpoints.values()),
        "spare": max(checkpoints.values(), default=0),
        "models": sum(_size(path) for path in directory.glob("stages/*/model")),
        "caches": sum(_size(path) for path in directory.glob("stages/*/cache")),
        "generated": sum(_size(path) for path in directory.glob("stages/*/corpus")),
        "exports": _size(directory / "exports"),
    }
    return {**found, "total": sum(found.values())}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _checkpoints(recipe: Recipe, stages: dict[str, StagePlan], files: int) -> dict[str, int]:
    """Of all stages, which keep theirs, and of the largest one more while it is written.

    Args:
        files: bytes of a model's directory beside its weights.
    """
    each = {name: stage.checkpoint_bytes + files for name, stage in stages.items()}
    kept = sum(stage.training.keep_checkpoints * each[stage.name] for stage in recipe.trainings)
    return {"checkpoints": kept, "spare": max(each.values(), default=0)}


def _shards(recipe: Recipe, vocab_size: int) -> int:
    if isinstance(recipe.data, HfData):
        return 0
    return int((recipe.data.text_bytes() or 0) / bytes_per_token(vocab_size) * (2 if vocab_size <= 2**16 else 4))


def _texts(recipe: Recipe, vocab_size: int) -> Iterator[int]:
    """Of the stages that read more text: packed, as the recipe's own."""
    for stage in recipe.stages:
        if stage.type == "text":
            patterns = (stage.files,) if isinstance(stage.files, str) else stage.files
            size = text_bytes([path for _, path in find(patterns, f"stages.{stage.name}.files")])
            yield int(size / bytes_per_token(vocab_size) * (2 if vocab_size <= 2**16 else 4))


def bytes_per_token(vocab_size: int) -> float:
    """Of English and code (measured: 1.5 with 300 tokens, 3.3 with 4,096, 4.5 with 50,000 and more)."""
    return min(4.5, max(1.0, 0.48 * math.log2(vocab_size) - 2.45))


def _export(export: ExportConfig, stages: dict[str, StagePlan]) -> int:
    """By the width of its matrices alone: embeddings are often wider, and small beside them."""
    from edgewright.exactness import count_parameters

    trained = stages.get(export.model)
    parameters = count_parameters(Path(export.model)) if trained is None else trained.model_bytes / 4
    return int(parameters * BITS.get(export.quant, 32.0) / 8)
