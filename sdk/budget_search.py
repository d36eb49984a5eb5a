"""`budget.memory`: the cheapest of the settings that a recipe leaves open with which a stage fits.

Only what changes nothing of the training but its rounding is ever changed, and nothing that the recipe fixes: the
micro-batch (with `auto_find_batch_size`), `gradient_checkpointing`, `offload_optimizer` and, where it is exact,
`gradient_release`. Optimizers and stored types are the user's to choose; `edgewright plan` says what they would save.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgewright.errors import OutOfResources
from edgewright.memory_rules import leaves_gradients_alone
from edgewright.micro_batch import halved
from edgewright.report_text import size

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgewright.planner.devices import Device
    from edgewright.planner.simulate import Case
    from edgewright.recipe import Recipe, StageConfig

COST = {"gradient_checkpointing": 1.33, "offload_optimizer": 1.2, "gradient_release": 1.01}
"""Time of a step over that without the setting: an order to try them in, no measurement."""
COST_OF_HALVING = {"cpu": 1.03, "cuda": 1.1}
"""The same for half the micro-batch: small ones leave a GPU idle."""
WORDS = {
    "gradient_checkpointing": "blocks are computed again in the backward pass",
    "offload_optimizer": "the optimizer's state is in host memory",
    "gradient_release": "parameters are stepped inside the backward pass",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen, and why."""

    settings: dict[str, Any]
    """Among the decisions of the run: micro_batch, gradient_checkpointing, gradient_release, offload_optimizer."""
    memory: int
    """Bytes that it is predicted to take, above those of a process that has loaded torch."""
    text: str
    """For the log."""


def within_budget(
    recipe: Recipe, stage: StageConfig, student: PreTrainedModel, teachers: Sequence[Path], decisions: dict[str, Any]
) -> Choice | None:
    """What to change in a run's decisions; None where there is no budget.

    Args:
        student: what the stage starts from, as it was loaded; only its shapes are read.
        teachers: model directories of `stage.teachers`.

    Raises:
        OutOfResources: EW-752.
    """
    from edgewright.planner.cases import cache_layout
    from edgewright.planner.devices import find_device
    from edgewright.planner.simulate import Case
    from edgewright.planner.teachers import stored_teacher

    if stage.budget.memory is None:
        return None
    case = Case(
        stage=stage,
        student=student,
        teachers=tuple(
            stored_teacher(directory, teacher.weights)
            for directory, teacher in zip(teachers, stage.teachers, strict=True)
        ),
        cached=cache_layout(recipe, stage),
        sequence_length=recipe.data.sequence_length,
        decisions=decisions,
        borders=recipe.data.restart_at_documents,
    )
    return search(case, find_device(decisions["device"]), stage.budget.memory)


def search(case: Case, device: Device, limit: int) -> Choice:
    """Try the combinations from the cheapest on, by simulation.

    Args:
        case: the stage, with the decisions that its recipe leads to.
        limit: bytes.

    Raises:
        OutOfResources: EW-752, none fits; it says how much the smallest needs.
    """
    from edgewright.planner.memory import predict

    tried: list[tuple[dict[str, Any], int]] = []
    for settings in sorted(_combinations(case.stage, case.decisions), key=lambda each: _cost(each, case.decisions)):
        memory, _ = predict(replace(case, decisions=case.decisions | settings), device)
        tried.append((settings, memory.total))
        if memory.total <= limit:
            return Choice(settings=settings, memory=memory.total, text=_why(tried, case.decisions, limit))
    settings, least = min(tried, key=lambda each: each[1])
    raise OutOfResources(
        "EW-752",
        f"stage {case.stage.name} does not fit into budget.memory",
        expected=f"at most {size(limit)}",
        found=f"{size(least)} at the least, with {_words(settings, case.decisions)}",
        fix=f"budget.memory: {math.ceil(least / 1e6)}MB; or what edgewright plan advises: an optimizer with a smaller "
        "state, narrower weights, shorter sequences",
    )


def _combinations(stage: StageConfig, decisions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every setting of what the recipe leaves open, as decisions."""
    training, whole = stage.training, decisions["micro_batch"]
    sizes = [whole]
    while training.auto_find_batch_size and decisions["processes"] == 1 and sizes[-1] > 1:
        sizes.append(halved(sizes[-1]))
    releasable = training.max_grad_norm is None and training.gradient_accumulation_steps == 1
    releasable = releasable and all(leaves_gradients_alone(config.build()) for config in stage.methods)
    release = _open(training.gradient_release, possible=releasable and decisions["processes"] == 1)
    recompute = _open(training.gradient_checkpointing, possible=True)
    offload = _open(training.offload_optimizer, possible=decisions["device"] != "cpu")
    for micro_batch, released, recomputed, offloaded in itertools.product(sizes, release, recompute, offload):
        if micro_batch == whole or not released:
            yield {
                "micro_batch": micro_batch,
                "gradient_release": released,
                "gradient_checkpointing": recomputed,
                "offload_optimizer": offloaded,
            }


def _open(fixed: bool | None, *, possible: bool) -> list[bool]:
    """The values of a setting that may be tried."""
    return [fixed] if fixed is not None else [False, True] if possible else [False]


def _cost(settings: dict[str, Any], decisions: dict[str, Any]) -> float:
    halvings = math.log2(decisions["micro_batch"] / settings["micro_batch"])
    factors = [factor for name, factor in COST.items() if settings[name]]
    return math.prod(factors) * COST_OF_HALVING[decisions["device"]] ** halvings


def _words(settings: dict[str, Any], decisions: dict[str, Any]) -> str:
    """What is not as the recipe has it by itself."""
    changed = [words for name, words in WORDS.items() if settings[name] and not decisions[name]]
    if settings["micro_batch"] != decisions["micro_batch"]:
        changed.insert(0, f"micro-batches of {settings['micro_batch']}")
    return ", ".join(changed) or "the settings as they are"


def _why(tried: list[tuple[dict[str, Any], int]], decisions: dict[str, Any], limit: int) -> str:
    *cheaper, (chosen, memory) = tried
    text = f"budget.memory {size(limit)}: {_words(chosen, decisions)}, for {size(memory)}"
    refused = ", ".join(f"{_words(settings, decisions)} {size(needed)}" for settings, needed in cheaper)
    return f"{text}; too large and less slow: {refused}" if refused else text
