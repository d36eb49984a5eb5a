"""What one stage will need, decided as its run would decide: simulated memory, and time by a probe or by a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgewright.budget_search import search
from edgewright.errors import OutOfResources
from edgewright.planner.cases import StageModels, case
from edgewright.planner.memory import Memory, predict, spread
from edgewright.planner.simulate import Case, Step
from edgewright.planner.timing import Time, from_probe, from_table

if TYPE_CHECKING:
    from edgewright.planner.devices import Device
    from edgewright.planner.probe import Probe
    from edgewright.recipe import Recipe, StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage will need."""

    case: Case
    """With the decisions that the run will take, `budget.memory` heeded."""
    memory: Memory
    memory_range: tuple[int, int]
    """Bytes between which the total is expected."""
    step: Step
    time: Time
    limit: int | None
    """Bytes that there are, of the device and of `budget.memory`; None where the system does not tell."""
    notes: tuple[str, ...]
    left_parameters: int | None = None
    """Of the finished model; None where that stores what is trained."""
    probed_memory: int | None = None
    """Bytes at the peak of the probe's steps, above its baseline; None without one."""

    @property
    def name(self) -> str:
        """The stage's."""
        return self.case.stage.name

    @property
    def fits(self) -> bool:
        """Whether its memory is enough."""
        return self.limit is None or self.memory.total <= self.limit

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.case.stage.budget.steps(self.case.stage.training.tokens_per_step(self.case.sequence_length))

    @property
    def checkpoint_bytes(self) -> int:
        """Of weights and optimizer state in a checkpoint."""
        return 4 * self.step.parameters + self.step.buffer_bytes + self.step.optimizer_bytes

    @property
    def model_bytes(self) -> int:
        """Of the weights of the finished model, in float32: adapters are merged into them, out of 4 bits or not."""
        return 4 * (self.step.parameters if self.left_parameters is None else self.left_parameters)

    @property
    def flops(self) -> float:
        """Of the whole stage."""
        return self.step.flops * self.steps

    @property
    def decisions(self) -> dict[str, Any]:
        """That the run will take."""
        return self.case.decisions

    def with_probe(self, probe: Probe) -> StagePlan:
        """The same, with what a few real steps took."""
        if probe.problem is not None:
            return replace(self, notes=(*self.notes, probe.problem))
        time = from_probe(self.case, probe.seconds, probe.once)
        return replace(self, time=time, probed_memory=probe.memory)

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "type": "train",
            "parameters": self.step.parameters,
            "steps": self.steps,
            "memory": self.memory.to_json(),
            "memory_range": list(self.memory_range),
            "memory_limit": self.limit,
            "optimizer_state": self.step.optimizer_bytes,
            "flops": self.flops,
            **self.time.to_json(),
            "decisions": self.case.decisions,
            "probed_memory": self.probed_memory,
            "fits": self.fits,
            "notes": list(self.notes),
        }


def plan_stage(recipe: Recipe, stage: StageConfig, models: StageModels, device: Device) -> StagePlan:
    """Plan a stage on a device, its time by the device's rates.

    Raises:
        as `simulate`.
    """
    here, notes = _decided(case(stage, models, recipe, device), device)
    memory, step = predict(here, device)
    limit = min((size for size in (device.memory, stage.budget.memory) if size is not None), default=None)
    if here.decisions["compile"]:
        notes = (
            *notes,
            "compiled steps are taken to keep half of the activations; the range says how little that is known",
        )
    return StagePlan(
        case=here,
        memory=memory,
        memory_range=spread(memory, here, device),
        step=step,
        time=from_table(here, step, device),
        limit=limit,
        left_parameters=models.left_parameters,
        notes=(*models.notes, *notes),
    )


def changed_memory(
    recipe: Recipe, stage: StageConfig, models: StageModels, device: Device, decided: dict[str, Any]
) -> int:
    """Bytes of a stage of which settings were changed, with what `budget.memory` chose before.

    Args:
        decided: decisions of the stage before the change.

    Raises:
        as `simulate`.
    """
    here = case(stage, models, recipe, device)
    if stage.budget.memory is not None:
        chosen = {
            name: here.decisions[name] or decided[name] for name in ("gradient_checkpointing", "offload_optimizer")
        }
        if not here.decisions["gradient_release"]:
            chosen["micro_batch"] = min(here.decisions["micro_batch"], decided["micro_batch"])
        here = replace(here, decisions=here.decisions | chosen)
    return predict(here, device)[0].total


def _decided(here: Case, device: Device) -> tuple[Case, tuple[str, ...]]:
    """The stage with what its budget changes, and what there is to say of that."""
    limit = here.stage.budget.memory
    if limit is None:
        return here, ()
    try:
        choice = search(here, device, limit)
    except OutOfResources as error:
        return here, (f"{error.what}: {error.found}",)
    return replace(here, decisions=here.decisions | choice.settings), (choice.text,)
