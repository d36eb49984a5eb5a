"""`plan`: what a recipe will need, before it runs: memory, disk, operations and time, and what to change."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from edgewright._verbs import VerbModule
from edgewright.errors import EdgewrightError, RecipeError

if TYPE_CHECKING:
    from edgewright.planner.advice import Advice
    from edgewright.planner.cached import CachePlan
    from edgewright.planner.cases import StageModels
    from edgewright.planner.devices import Device
    from edgewright.planner.history import PastErrors
    from edgewright.planner.making import MakingPlan
    from edgewright.planner.probe import Probe
    from edgewright.planner.speculative_files import Wanted
    from edgewright.planner.speculative_report import SpeculativePlan
    from edgewright.planner.stage_plan import StagePlan
    from edgewright.planner.written import WrittenPlan
    from edgewright.recipe import AnyStageConfig, Recipe, StageConfig

ONLY_OF_DISK = "EW-403"
"""What `check` says of too small a disk; a plan says it in its own way."""


def _quiet(line: str) -> None:
    """Say nothing."""


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
class Plan:
    """What a recipe will need.

    Args:
        recipe: the file.
        device: where it would run.
        stages: in order; memory is each one's own, since a run carries out one after the other.
        disk: bytes by kind, and their total.
        free: bytes that the disk of the run directory has.
        advice: what to change in the stage that needs most.
        past: how wrong plans of earlier runs were.
    """

    recipe: Path
    device: Device
    stages: tuple[StagePlan | MakingPlan, ...]
    disk: dict[str, int]
    free: int
    advice: tuple[Advice, ...]
    past: PastErrors
    caches: tuple[CachePlan, ...] = ()
    """What stages of type cache will write."""
    written: tuple[WrittenPlan, ...] = ()
    """What stages of type generate will write."""

    @property
    def largest(self) -> StagePlan | MakingPlan | None:
        """The stage that needs most memory; None where no stage has a model."""
        return max(self.stages, key=lambda stage: stage.memory.total, default=None)

    @property
    def fits(self) -> bool:
        """Whether memory and disk are enough."""
        return all(stage.fits for stage in self.stages) and self.disk["total"] <= self.free

    def to_json(self) -> dict[str, object]:
        """`memory` and `advice` are those of the stage that needs most; disk, flops and seconds of the whole run."""
        from edgewright.planner.memory import Memory

        times = [stage.time for stage in self.stages]
        known = all(time.seconds is not None for time in times)
        return {
            "schema_version": 1,
            "recipe": str(self.recipe),
            "device": self.device.to_json(),
            "stage": None if self.largest is None else self.largest.name,
            "memory": (Memory.none() if self.largest is None else self.largest.memory).to_json(),
            "memory_range": [0, 0] if self.largest is None else list(self.largest.memory_range),
            "disk": self.disk["total"],
            "disk_parts": self.disk,
            "disk_free": self.free,
            "flops": sum(stage.flops for stage in self.stages),
            "seconds": sum(time.seconds or 0 for time in times) if known else None,
            "seconds_range": [sum(time.low or 0 for time in times), sum(time.high or 0 for time in times)]
            if known
            else None,
            "fits": self.fits,
            "advice": [advice.to_json() for advice in self.advice],
            "past_error": self.past.to_json(),
            "caches": [cache.to_json() for cache in self.caches],
            "written": [each.to_json() for each in self.written],
            "stages": [stage.to_json() for stage in self.stages],
        }


@overload
def plan(recipe: str | Path, *overrides: str, device: str | None = ..., probe: bool = ...) -> Plan: ...


@overload
def plan(
    recipe: str | Path,
    *overrides: str,
    device: str | None = ...,
    probe: bool = ...,
    speculative: bool,
    runtime: Sequence[str] = ...,
    quant: Sequence[str] = ...,
    draft: str | Path | None = ...,
    acceptance: Sequence[float] = ...,
    gamma: int | None = ...,
    threads: int | None = ...,
    say: Callable[[str], None] = ...,
) -> Plan | SpeculativePlan: ...


def plan(
    recipe: str | Path,
    *overrides: str,
    device: str | None = None,
    probe: bool = True,
    speculative: bool = False,
    runtime: Sequence[str] = (),
    quant: Sequence[str] = (),
    draft: str | Path | None = None,
    acceptance: Sequence[float] = (),
    gamma: int | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = _quiet,
) -> Plan | SpeculativePlan:
    """Predict memory, disk, operations and time of a recipe, or whether a draft will pay for a target.

    Nothing is trained but a few steps of a probe.

    Args:
        recipe: path of the YAML file; with `speculative` also a model directory or an exported file, the target.
        overrides: `section.key=value`.
        device: `cpu`, a GPU of the table (`rtx-4070`), or a size of memory (`24GB`); None: what a run would take here.
        probe: time a few real steps where the device is this machine's.
        speculative: measure on this machine, in about a minute, what speculative decoding costs; of a recipe with
            `target:` besides all else. What follows is for this alone.
        runtime: of the target's files, names of runtimes or targets; empty: those that are fast and installed.
        quant: widths; empty: 8 and 4 bits, and ternary where the target was trained so.
        draft: a model directory or an exported file; None: random ones of a few sizes.
        acceptance: of the draft by position, each given that those before were accepted; the last one holds for all
            that follow. Empty: what the draft's draft.json says, if there is one.
        gamma: tokens drafted a round; None: the best.
        threads: of the runtimes; None: all cores that this process may use.
        say: gets a line about progress now and then.

    Raises:
        RecipeErrors: the recipe is wrong. CheckFailed: what `check` finds, all of it. RecipeError: EW-760, no such
            device; EW-868, an option of `speculative` without it, or a recipe without a target; and what
            `planner.speculative_plan.plan_speculative` raises.
    """
    if speculative:
        from edgewright.planner.speculative_plan import plan_speculative

        wanted, planned = _speculative(Path(recipe), overrides, device, probe, runtime, quant, draft)
        found = plan_speculative(wanted, acceptance=acceptance, gamma=gamma, threads=threads, say=say)
        return replace(found, recipe=planned)
    given = {"runtime": runtime, "quant": quant, "draft": draft, "acceptance": acceptance, "gamma": gamma}
    for name, value in {**given, "threads": threads}.items():
        if value not in (None, (), []):
            raise _no_use(f"--{name}", value, "add --speculative, and give the target")
    return _plan_recipe(recipe, overrides, device, probe)


def _plan_recipe(recipe: str | Path, overrides: Sequence[str], device: str | None, probe: bool) -> Plan:
    from edgewright.check import check
    from edgewright.planner.devices import find_device
    from edgewright.planner.probe import probe as run_probe
    from edgewright.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    place = find_device(device)
    errors = tuple(error for error in check(recipe, *overrides).errors if error.code != ONLY_OF_DISK)
    if errors:
        raise CheckFailed(errors)
    vocab_size = _vocabulary(loaded)

    def probed(stage: AnyStageConfig, planned: StagePlan | MakingPlan) -> Probe | None:
        return run_probe(Path(recipe), overrides, stage.name, vocab_size) if probe else None

    return predicted(Path(recipe), loaded, place, vocab_size, probed)


def _speculative(
    target: Path,
    overrides: Sequence[str],
    device: str | None,
    probe: bool,
    runtime: Sequence[str],
    quant: Sequence[str],
    draft: str | Path | None,
) -> tuple[Wanted, Plan | None]:
    """What the probe of speculative decoding shall open, and the plan of the recipe if it is one.

    Raises:
        RecipeError: EW-868.
    """
    from edgewright.compress.draft import DraftStudentConfig
    from edgewright.export.architecture import open_config
    from edgewright.planner.speculative_files import Wanted
    from edgewright.recipe import load_recipe

    wanted = Wanted(
        target=target, runtimes=tuple(runtime), quants=tuple(quant), draft=None if draft is None else Path(draft)
    )
    if target.suffix not in (".yaml", ".yml"):
        for what, value in (
            ("SECTION.KEY=VALUE", " ".join(overrides)),
            ("--device", device),
            ("--no-probe", not probe),
        ):
            if value:
                raise _no_use(what, value, "leave it out: a target is measured here, as it is")
        return wanted, None
    recipe = load_recipe(target, overrides)
    if recipe.target is None:
        raise _no_use("--speculative", str(target), "name the model that the draft is for: target: DIRECTORY")
    shapes = [stage.student for stage in recipe.trainings if isinstance(stage.student, DraftStudentConfig)]
    config = shapes[0].architecture(open_config(recipe.target)) if shapes and draft is None else None
    planned = _plan_recipe(target, overrides, device, probe)
    return replace(wanted, target=recipe.target, shape=config), planned


def _no_use(what: str, found: object, fix: str) -> RecipeError:
    return RecipeError(
        "EW-868", f"{what} has no use here", expected="plan RECIPE, or plan TARGET --speculative", found=found, fix=fix
    )


def predicted(
    source: Path,
    recipe: Recipe,
    device: Device,
    vocab_size: int,
    probed: Callable[[AnyStageConfig, StagePlan | MakingPlan], Probe | None],
    *,
    advice: bool = True,
    share: float = 1.0,
) -> Plan:
    """`plan` of a recipe that was checked.

    Args:
        source: the recipe's file.
        probed: runs the probe of a stage, of which this is the plan without one, or decides against it; it is asked
            where the device is here and the stage can be probed.
        advice: whether to look for what could be changed.
        share: of the text that teachers may read to tell how large their caches will be.

    Raises:
        as `simulate` and `stage_models`.
    """
    from edgewright.planner.cached import plan_cache
    from edgewright.planner.cases import stage_models
    from edgewright.planner.disk import disk
    from edgewright.planner.history import past
    from edgewright.planner.making import plan_cache_stage, plan_generate_stage
    from edgewright.planner.stage_plan import StagePlan, plan_stage
    from edgewright.planner.written import plan_written

    models = {stage.name: found for stage, found in stage_models(recipe, vocab_size)}
    stages: list[StagePlan | MakingPlan] = []
    caches: list[CachePlan] = []
    written: list[WrittenPlan] = []
    for stage in recipe.stages:
        planned: StagePlan | MakingPlan
        if stage.type == "text":  # it reads files, and asks no model
            continue
        if stage.type == "train":
            planned = plan_stage(recipe, stage, models[stage.name], device)
        elif stage.type == "cache":
            caches.append(plan_cache(recipe, stage, vocab_size, share=share))
            planned = plan_cache_stage(recipe, stage, models[stage.name], caches[-1], device)
        else:
            written.append(plan_written(recipe, stage, vocab_size))
            planned = plan_generate_stage(stage, models[stage.name], written[-1], device)
        if device.here and _can_be_probed(stage):
            found = probed(stage, planned)
            planned = planned if found is None else planned.with_probe(found)
        stages.append(planned)
    trained = {stage.name: stage for stage in stages if isinstance(stage, StagePlan)}
    largest = max(stages, key=lambda stage: stage.memory.total, default=None)
    return Plan(
        recipe=source,
        device=device,
        stages=tuple(stages),
        disk=disk(recipe, trained, vocab_size, caches, written),
        free=_free(recipe.run_directory),
        advice=_advice(recipe, models[largest.name], device, largest) if advice and largest is not None else (),
        past=past(recipe.run_directory, device),
        caches=tuple(caches),
        written=tuple(written),
    )


def _can_be_probed(stage: AnyStageConfig) -> bool:
    """Whether there are targets, where they are needed: a teacher that an earlier stage makes is not there yet."""
    if stage.type == "train" and stage.teacher is None:
        return True
    return bool(stage.teachers) and all(teacher.type == "checkpoint" for teacher in stage.teachers)


def _advice(recipe: Recipe, models: StageModels, device: Device, planned: StagePlan | MakingPlan) -> tuple[Advice, ...]:
    """What to change in a stage that trains; of others there is nothing yet that we could tell."""
    from edgewright.planner.advice import advise
    from edgewright.planner.stage_plan import changed_memory

    stage = recipe.stage(planned.name)
    if stage is None:
        return ()

    def total(changed: StageConfig) -> int:
        return changed_memory(recipe, changed, models, device, planned.decisions)

    return tuple(advise(stage, planned.memory.total, total, gpu=device.kind == "cuda"))


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
