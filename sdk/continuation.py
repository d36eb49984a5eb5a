"""What a stage goes on from of the stage before, and what it does not: the notes of `check` and of a run.

A stage whose methods keep the names of the weights is gone on from where its training left them, latents and all.
What a method trains beside them, learned scales for instance, goes on with them to a method that can use it
(`Method.go_on`), and is told of where none can.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgewright.recipe import Recipe, StageConfig


def start_notes(recipe: Recipe, stage: StageConfig) -> list[str]:
    """A line for each thing that a stage starts with and does not use, or uses and does not have, and what there is to
    say of its losses."""
    return [*_lesson_notes(stage), *_start_notes(recipe, stage)]


def _lesson_notes(stage: StageConfig) -> Iterator[str]:
    """Which loss an alignment chose, and why; what a list of losses lacks."""
    if stage.objective.type == "align":
        yield stage.objective.note()
    elif stage.objective.type == "distill":
        yield from stage.objective.notes()


def _start_notes(recipe: Recipe, stage: StageConfig) -> list[str]:
    start = stage.student
    if start.type == "preset":
        return [
            f"{method.type} freezes the weights that it starts from, and those of a preset are random: all that is "
            "learned goes through its small ranks; start from an earlier stage or a checkpoint"
            for method in stage.methods
            if method.freezes
        ]
    found = [
        f"{method.type} draws new weights for its layers: those of the {start.type} are not used there; "
        "init: spectral starts from them"
        for method in stage.methods
        if method.starts_anew
    ]
    before = recipe.stage(start.stage) if start.type == "stage" else None
    return found if before is None else [*found, *_left_behind(before, stage)]


def goes_on_from_latents(before: StageConfig) -> bool:
    """Whether the stage after it starts from the weights that were trained, and not from the finished model."""
    return all(method.build().keeps_names for method in before.methods)


def _left_behind(before: StageConfig, stage: StageConfig) -> Iterator[str]:
    if not goes_on_from_latents(before):
        return
    for method in before.methods:
        lost = method.left_behind(stage.methods)
        if lost is not None:
            yield f"{lost} of stage {before.name} end with it: only its weights go on"


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without transformers' table of stored tensors that the architecture lacks: `start_notes` tells of them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
