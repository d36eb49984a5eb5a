"""What to change where a stage does not fit, or to make it smaller: each change with what it saves, by simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgewright.errors import EdgewrightError
from edgewright.planner.changes import all_changes

if TYPE_CHECKING:
    from edgewright.planner.changes import Change
    from edgewright.recipe import StageConfig

WORTH_SAYING = 0.01
"""Changes that save less than this share are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A change of one stage and its effect."""

    stage: str
    change: Change
    memory: int
    """Bytes of the stage with it."""
    saving: int

    def to_json(self) -> dict[str, object]:
        return {
            "stage": self.stage,
            "change": self.change.text(),
            "why": self.change.reason,
            "same_training": self.change.same_training,
            "memory": self.memory,
            "saving": self.saving,
        }


def advise(stage: StageConfig, memory: int, total: Callable[[StageConfig], int], *, gpu: bool) -> list[Advice]:
    """Single changes that save something, those that change nothing of the training first, the largest saving first.

    Args:
        memory: bytes of the stage as it is.
        total: bytes of a changed stage; it may raise what a run of it would.
    """
    found = []
    for change in all_changes(stage, gpu=gpu):
        changed = change.apply(stage)
        if changed is None:
            continue
        try:
            needed = total(changed)
        except EdgewrightError:  # this model or its methods refuse the change
            continue
        if memory - needed > WORTH_SAYING * memory:
            found.append(Advice(stage=stage.name, change=change, memory=needed, saving=memory - needed))
    return sorted(found, key=lambda advice: (not advice.change.same_training, -advice.saving))
