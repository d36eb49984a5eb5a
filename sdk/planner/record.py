"""The plan of a run, kept in its directory before the first step, and held against what the run then measured.

`plan.json` is the object of `edgewright plan --json` for the device of the run, without advice. A stage that has begun
keeps the plan that it was begun with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgewright.errors import BadInput, EdgewrightError
from edgewright.files import write_json
from edgewright.planner.devices import CUDA_CONTEXT
from edgewright.stage_cost import COST

if TYPE_CHECKING:
    from edgewright.planner.making import MakingPlan
    from edgewright.planner.probe import Probe
    from edgewright.planner.stage_plan import StagePlan
    from edgewright.planner.timing import Time
    from edgewright.recipe import AnyStageConfig, Recipe

PLAN = "plan.json"
PROBE_SHARE = 0.02
"""Most of a stage's time that a run spends on a probe of it, and of its text that a teacher reads before."""
START_UP = 20.0
"""Seconds that a probe takes besides its steps, about."""
WITHOUT_RATES = 1000
"""Steps from which a stage is probed on a device of which no rates are known."""
SETTINGS = (
    "device",
    "precision",
    "compile",
    "threads",
    "micro_batch",
    "weights",
    "gradient_checkpointing",
    "gradient_release",
    "offload_optimizer",
)
"""Decisions that a prediction depends on."""
What = Literal["memory", "seconds", "disk"]


class _Part(BaseModel):
    """A part of `plan.json`; what this version does not know is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


T = TypeVar("T", bound=_Part)


class PlannedStage(_Part):
    """What was predicted of a stage."""

    name: str
    type: str = "train"
    memory: dict[str, int]
    memory_range: tuple[int, int]
    seconds: float | None
    seconds_range: tuple[float, float] | None
    source: str
    decisions: dict[str, Any]


class PlannedDevice(_Part):
    """Where the run was to take place."""

    name: str
    kind: str


class PlannedRun(_Part):
    """`plan.json`."""

    device: PlannedDevice | None = None
    disk_parts: dict[str, int] = {}
    stages: tuple[PlannedStage, ...] = ()
    problem: str | None = None
    """Why there is no prediction, in a line."""


class _Done(_Part):
    """What is read of a stage's `done.json`, or of the `cost.json` of one that trains nothing."""

    seconds: float
    decisions: dict[str, Any]
    peak_memory: int | None = None
    done: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One prediction and what came of it.

    Args:
        stage: whose; None for the disk, which all stages share.
        predicted: bytes or seconds.
        spread: from when to when it was expected.
        source: `simulation`, `probe`, `table`, or `count`.
        measured: None where the system does not tell, or not yet.
        changed: decisions of the run that are not those of the plan, as (planned, taken).
    """

    what: What
    stage: str | None
    predicted: float
    spread: tuple[float, float] | None
    source: str
    measured: float | None
    changed: dict[str, tuple[object, object]]

    @property
    def error(self) -> float | None:
        """Predicted over measured, less 1: above 0 where the plan said too much."""
        return self.predicted / self.measured - 1 if self.measured else None

    def to_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "stage": self.stage,
            "predicted": self.predicted,
            "range": None if self.spread is None else list(self.spread),
            "source": self.source,
            "measured": self.measured,
            "error": self.error,
            "changed": {name: list(both) for name, both in self.changed.items()},
        }


def keep_plan(recipe: Recipe, directory: Path, vocab_size: int, say: Callable[[str], None]) -> None:
    """Predict the stages that have not begun, and write that down; a run whose stages have all begun keeps its plan.

    What cannot be predicted stops no run: the reason is printed and kept instead.

    Args:
        directory: of the run, with its `recipe.resolved.yaml`.
    """
    planned = [stage for stage in recipe.stages if stage.type != "text"]
    begun = {stage.name for stage in planned if _has_begun(directory / "stages" / stage.name)}
    if len(begun) == len(planned):
        return
    kept = _read_object(directory / PLAN)
    try:
        made = _predict(recipe, directory, vocab_size, begun)
    except EdgewrightError:
        raise  # the run would stop for the same reason
    except Exception as error:  # noqa: BLE001 - whatever a foreign model does where it has no data: the run can do it
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
        say(f"note: this run is not predicted: {problem}")
        made = {"schema_version": 1, "stages": [], "problem": problem}
    earlier = {stage["name"]: stage for stage in kept.get("stages", [])}
    fresh = {stage["name"]: stage for stage in made["stages"] if stage["name"] not in begun}
    stages = [known for s in planned if (known := (earlier if s.name in begun else fresh).get(s.name))]
    write_json(directory / PLAN, {**made, "stages": stages})
    for stage in (stage for stage in stages if stage["name"] in fresh):
        say(f"{stage['name']}: planned {_told(PlannedStage.model_validate(stage))}")


def compare(directory: Path) -> tuple[Compared, ...]:
    """All predictions of a run that has been planned; nothing where it has not.

    Raises:
        BadInput: EW-393, a file of the run cannot be understood.
    """
    planned = read_plan(directory)
    return () if planned is None else tuple(_compared(planned, directory))


def read_plan(directory: Path) -> PlannedRun | None:
    """The plan that a run keeps; None without one.

    Raises:
        BadInput: EW-393.
    """
    path = directory / PLAN
    return _validated(PlannedRun, path) if path.is_file() else None


def _compared(planned: PlannedRun, directory: Path) -> Iterator[Compared]:
    unseen = CUDA_CONTEXT if planned.device is not None and planned.device.kind == "cuda" else 0
    for stage in planned.stages:
        done = _finished(directory / "stages" / stage.name, stage.type)
        changed = {} if done is None else _changed(stage.decisions, done.decisions)
        yield Compared(
            what="memory",
            stage=stage.name,
            predicted=stage.memory["total"] - unseen,
            spread=(stage.memory_range[0] - unseen, stage.memory_range[1] - unseen),
            source="simulation",
            measured=None if done is None else done.peak_memory,
            changed=changed,
        )
        if stage.seconds is not None:
            yield Compared(
                what="seconds",
                stage=stage.name,
                predicted=stage.seconds,
                spread=stage.seconds_range,
                source=stage.source,
                measured=None if done is None else done.seconds,
                changed=changed,
            )
    if planned.disk_parts:
        used = _read_object(directory / "results.json").get("disk_used")
        yield Compared(
            what="disk",
            stage=None,
            predicted=planned.disk_parts["total"],
            spread=None,
            source="count",
            measured=used["total"] if isinstance(used, dict) else None,
            changed={},
        )


def _changed(planned: dict[str, Any], taken: dict[str, Any]) -> dict[str, tuple[object, object]]:
    both = {name: (planned[name], taken[name]) for name in SETTINGS if name in planned and name in taken}
    return {name: (before, now) for name, (before, now) in both.items() if before != now}


def _finished(stage: Path, kind: str) -> _Done | None:
    """What a finished stage took; None where it is not finished, or was not measured."""
    path = stage / ("done.json" if kind == "train" else COST)
    found = _validated(_Done, path) if path.is_file() else None
    return found if found is not None and found.done else None


def _has_begun(stage: Path) -> bool:
    return (stage / "done.json").exists() or (stage / COST).exists() or any(stage.glob("checkpoints/step-*"))


def _predict(recipe: Recipe, directory: Path, vocab_size: int, begun: set[str]) -> dict[str, Any]:
    from edgewright.plan import predicted
    from edgewright.planner.devices import find_device
    from edgewright.planner.probe import probe

    resolved = directory / "recipe.resolved.yaml"

    def probed(stage: AnyStageConfig, planned: StagePlan | MakingPlan) -> Probe | None:
        wanted = stage.name not in begun and worth_probing(planned.time, planned.steps, planned.decisions)
        return probe(resolved, [f"output_dir={directory}"], stage.name, vocab_size) if wanted else None

    found = predicted(
        resolved, recipe, find_device(None), vocab_size, probed, advice=False, share=PROBE_SHARE
    ).to_json()
    return {name: value for name, value in found.items() if name not in ("recipe", "advice", "past_error")}


def worth_probing(time: Time, steps: int, decisions: dict[str, Any]) -> bool:
    """Whether a probe costs no more than `PROBE_SHARE` of a stage, by what a table says of both."""
    from edgewright.planner.probe import ENOUGH, MEASURED, WARM_UP
    from edgewright.training import COMPILE_COST_SECONDS

    if time.seconds is None:
        return steps >= WITHOUT_RATES
    step = time.seconds / steps
    cost = START_UP + WARM_UP * step + max(ENOUGH, MEASURED * step)
    cost += COMPILE_COST_SECONDS if decisions["compile"] else 0.0
    return cost <= PROBE_SHARE * time.seconds


def _told(stage: PlannedStage) -> str:
    from edgewright.planner.text import duration
    from edgewright.report_text import size

    spread = None if stage.seconds_range is None else list(stage.seconds_range)
    return f"{size(stage.memory['total'])}, time {duration(stage.seconds, spread)}, by {stage.source}"


def _validated(kind: type[T], path: Path) -> T:
    value = _read_object(path)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise _unreadable(path, f"{key}: {first['msg']}", f"{first['input']!r}"[:80]) from None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(path, "JSON", str(error)) from None
    if not isinstance(value, dict):
        raise _unreadable(path, "a JSON object", type(value).__name__)
    return value


def _unreadable(path: Path, expected: str, found: object) -> BadInput:
    return BadInput(
        "EW-393",
        "this file of the run cannot be understood",
        where=path,
        expected=expected,
        found=found,
        fix="remove it: the run goes on without, and the report then says nothing of predictions",
    )
