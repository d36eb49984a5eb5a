"""`plan`: what a recipe will need, before it runs: memory, disk, operations and time, and what to change."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright._verbs import VerbModule
from edgewright.errors import EdgewrightError

if TYPE_CHECKING:
    from edgewright.planner.advice import Advice
    from edgewright.planner.cases import StageModels
    from edgewright.planner.devices import Device
    from edgewright.planner.memory import Memory
    from edgewright.planner.probe import Probe
    from edgewright.planner.simulate import Step
    from edgewright.planner.timing import Time
    from edgewright.recipe import Recipe, StageConfig

ONLY_OF_DISK = "EW-403"
"""What `check` says of too small a disk; a plan says it in its own way."""


class CheckFailed(EdgewrightError):
    """What `check` finds wrong with a recipe: all of it."""

    def __init__(self, errors: tuple[EdgewrightError, ...]) -> None:
        self.errors = errors
        self.exit_code = errors[0].exit_code
        super().__init__(errors[0].code, "\n".join(error.message() for error in errors))

    def message(self) -> str:
        return self.what

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "exit_code": self.exit_code, "errors": [error.to_json() for error in self.errors]}


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage will need."""

    name: str
    parameters: int
    steps: int
    memory: Memory
    step: Step
    time: Time
    decisions: dict[str, object]
    fits: bool
    notes: tuple[str, ...]
    probed_memory: int | None = None
    """Bytes at the peak of the probe's steps, above its baseline; None without one."""

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "steps": self.steps,
            "memory": self.memory.to_json(),
            "optimizer_state": self.step.optimizer_bytes,
            "flops": self.step.flops * self.steps,
            **self.time.to_json(),
            "decisions": self.decisions,
            "probed_memory": self.probed_memory,
            "fits": self.fits,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a recipe will need.

    Args:
        recipe: the file.
        device: where it would run.
        stages: in order; memory is each one's own, since a run trains one after the other.
        disk: bytes by kind, and their total.
        free: bytes that the disk of the run directory has.
        advice: what to change in the stage that needs most.
    """

    recipe: Path
    device: Device
    stages: tuple[StagePlan, ...]
    disk: dict[str, int]
    free: int
    advice: tuple[Advice, ...]

    @property
    def largest(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def fits(self) -> bool:
        """Whether memory and disk are enough."""
        return all(stage.fits for stage in self.stages) and self.disk["total"] <= self.free

    def to_json(self) -> dict[str, object]:
        """`memory` and `advice` are those of the stage that needs most; disk, flops and seconds of the whole run."""
        times = [stage.time for stage in self.stages]
        known = all(time.seconds is not None for time in times)
        return {
            "schema_version": 1,
            "recipe": str(self.recipe),
            "device": self.device.to_json(),
            "stage": self.largest.name,
            "memory": self.largest.memory.to_json(),
            "disk": self.disk["total"],
            "disk_parts": self.disk,
            "disk_free": self.free,
            "flops": sum(stage.step.flops * stage.steps for stage in self.stages),
            "seconds": sum(time.seconds or 0 for time in times) if known else None,
            "seconds_range": [sum(time.low or 0 for time in times), sum(time.high or 0 for time in times)]
            if known
            else None,
            "fits": self.fits,
            "advice": [advice.to_json() for advice in self.advice],
            "stages": [stage.to_json() for stage in self.stages],
        }


def plan(recipe: str | Path, *overrides: str, device: str | None = None, probe: bool = True) -> Plan:
    """Predict memory, disk, operations and time of a recipe. Nothing is trained but a few steps of a probe.

    Args:
        recipe: path of the YAML file.
        overrides: `section.key=value`.
        device: `cpu`, a GPU of the table (`rtx-4070`), or a size of memory (`24GB`); None: what a run would take here.
        probe: time a few real steps where the device is this machine's.

    Raises:
        RecipeErrors: the recipe is wrong. CheckFailed: what `check` finds, all of it. RecipeError: EW-760, no such
            device.
    """
    from edgewright.check import check
    from edgewright.planner.cases import stage_models
    from edgewright.planner.devices import find_device
    from edgewright.planner.disk import disk
    from edgewright.planner.probe import probe as run_probe
    from edgewright.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    place = find_device(device)
    errors = tuple(error for error in check(recipe, *overrides).errors if error.code != ONLY_OF_DISK)
    if errors:
        raise CheckFailed(errors)
    vocab_size = _vocabulary(loaded)
    models = {stage.name: found for stage, found in stage_models(loaded, vocab_size)}
    probes = {
        stage.name: run_probe(Path(recipe), overrides, stage.name, vocab_size)
        for stage in loaded.stages
        if probe and place.here and _can_be_probed(stage)
    }
    stages = tuple(_stage(loaded, stage, models[stage.name], place, probes.get(stage.name)) for stage in loaded.stages)
    largest = max(stages, key=lambda stage: stage.memory.total)
    config = loaded.stage(largest.name)
    assert config is not None
    space = disk(loaded, {stage.name: stage.step for stage in stages}, vocab_size)
    return Plan(
        recipe=Path(recipe),
        device=place,
        stages=stages,
        disk=space,
        free=_free(loaded.run_directory),
        advice=tuple(_advice(loaded, config, models[config.name], place, largest)),
    )


def _can_be_probed(stage: StageConfig) -> bool:
    """Whether there is a teacher, where one is needed."""
    return stage.objective.type != "distill" or stage.objective.teacher.type == "checkpoint"


def _stage(recipe: Recipe, stage: StageConfig, models: StageModels, device: Device, probed: Probe | None) -> StagePlan:
    from edgewright.planner.cases import case
    from edgewright.planner.memory import predict
    from edgewright.planner.timing import from_probe, from_table

    here = case(stage, models, recipe, device)
    memory, step = predict(here, device)
    limit = min(size for size in (device.memory, stage.budget.memory, sys.maxsize) if size is not None)
    timed = probed is not None and probed.problem is None
    notes = models.notes if probed is None or probed.problem is None else (*models.notes, probed.problem)
    if here.decisions["compile"]:
        notes = (*notes, "memory is predicted for steps that are not compiled")
    return StagePlan(
        name=stage.name,
        parameters=step.parameters,
        steps=stage.budget.steps(stage.training.tokens_per_step(recipe.data.sequence_length)),
        memory=memory,
        step=step,
        time=from_probe(here, probed.seconds, probed.once) if probed and timed else from_table(here, step, device),
        probed_memory=probed.memory if probed and timed else None,
        decisions=here.decisions,
        fits=memory.total <= limit,
        notes=notes,
    )


def _advice(
    recipe: Recipe, stage: StageConfig, models: StageModels, device: Device, planned: StagePlan
) -> list[Advice]:
    from edgewright.planner.advice import advise
    from edgewright.planner.cases import case
    from edgewright.planner.memory import predict

    def total(changed: StageConfig) -> int:
        return predict(case(changed, models, recipe, device), device)[0].total

    return advise(stage, planned.memory.total, total, gpu=device.kind == "cuda")


def _vocabulary(recipe: Recipe) -> int:
    """Of the tokenizer that the recipe names, or will train."""
    from edgewright.data import PretrainedTokenizer
    from edgewright.data.tokenizer import load_encoder

    wanted = recipe.data.tokenizer
    return load_encoder(wanted.path).vocab_size if isinstance(wanted, PretrainedTokenizer) else wanted.vocab_size


def _free(directory: Path) -> int:
    folder = directory.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


sys.modules[__name__].__class__ = VerbModule
