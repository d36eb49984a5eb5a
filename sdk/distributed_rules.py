"""What several processes cannot train together; refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgewright.errors import RecipeError, RecipeErrors

if TYPE_CHECKING:
    from edgewright.recipe import Recipe, StageConfig
    from edgewright.training import TrainingConfig


def check_several(recipe: Recipe, processes: int) -> None:
    """Refuse what so many processes cannot do.

    Raises:
        RecipeErrors: EW-770, the micro-batches of a step cannot be dealt out evenly; EW-771, a method or an optimizer
            needs whole weights and `sharding: full` leaves none; EW-772, a setting is for one process alone.
    """
    found = [error for stage in recipe.trainings for error in _problems(stage, processes)]
    if found:
        raise RecipeErrors(found)


def _problems(stage: StageConfig, processes: int) -> Iterator[RecipeError]:
    settings, where = stage.training, f"stages.{stage.name}"
    if settings.gradient_accumulation_steps % processes:
        yield _uneven(settings, processes, where)
    if settings.gradient_release:
        yield _alone(where, "gradient_release", "steps a parameter before its gradients are summed over the processes")
    if settings.weights != "fp32":
        yield _alone(where, "weights", f"as {settings.weights} are stored in parts that no process group can exchange")
    if settings.sharding == "none":
        return
    if settings.compile == "on":
        yield _alone(where, "compile", "does not go with `sharding: full`: no graph holds weights that come and go")
    if settings.offload_optimizer:
        yield _alone(where, "offload_optimizer", "does not go with `sharding: full`, whose state is in parts already")
    for method in stage.methods:
        why = method.build().kept_whole()
        if why is not None:
            yield _whole(where, method.type, why)
    why = stage.optimizer.kept_whole()
    if why is not None:
        yield _whole(where, stage.optimizer.type, why)


def _uneven(settings: TrainingConfig, processes: int, where: str) -> RecipeError:
    """EW-770, with the same global batch in other micro-batches where there is one."""
    size, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    nearest = max(1, round(steps / processes)) * processes
    same = next((n for n in range(processes, size * steps + 1, processes) if n > steps and size * steps % n == 0), None)
    fix = f"gradient_accumulation_steps: {nearest}"
    if same is not None:
        fix += f"; or, for the same global batch, {same} and per_device_train_batch_size: {size * steps // same}"
    return RecipeError(
        "EW-770",
        f"the {steps} micro-batches of a step cannot be dealt out evenly to {processes} processes",
        where=f"{where}.training.gradient_accumulation_steps",
        expected=f"a multiple of {processes}: the global batch, {size} * {steps} sequences, is that of all processes",
        found=steps,
        fix=fix,
    )


def _whole(where: str, name: str, why: str) -> RecipeError:
    return RecipeError(
        "EW-771",
        f"{name!r} cannot train weights that are cut up among processes: {why}",
        where=where,
        expected="sharding: none, which copies them to every process",
        found="sharding: full",
        fix="training.sharding: none",
    )


def _alone(where: str, setting: str, why: str) -> RecipeError:
    return RecipeError(
        "EW-772",
        f"training.{setting} {why}",
        where=f"{where}.training.{setting}",
        expected=f"a run without {setting}",
        fix=f"leave {setting} out, or start the run without torchrun",
    )
