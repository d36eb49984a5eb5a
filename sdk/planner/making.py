"""What a stage will need that trains nothing: the forward passes of its teachers, on tensors without memory.

A cache stage reads batches of the text and makes targets chunk by chunk; a generate stage reads a batch of prompts and
then one token after the other, with keys and values kept. One batch of either is simulated and counted as often as it
comes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgewright.planner.devices import CUDA_CONTEXT
from edgewright.planner.memory import CUDA_WORKSPACE, LIBRARIES, SPREAD, Memory
from edgewright.planner.passes import Pass, reading, writing
from edgewright.planner.teachers import loading_bytes
from edgewright.planner.timing import PROBE_SPREAD, START, STARTS, Time, rates_of

if TYPE_CHECKING:
    from edgewright.compress.cache_config import CacheStageConfig
    from edgewright.compress.generate_config import GenerateStageConfig
    from edgewright.planner.cached import CachePlan
    from edgewright.planner.cases import StageModels
    from edgewright.planner.devices import Device
    from edgewright.planner.probe import Probe
    from edgewright.planner.written import WrittenPlan
    from edgewright.recipe import Recipe

CPU_BANDWIDTH = 10e9
"""Bytes a second, about, that a CPU reads and writes; a device of the table has its own."""
PIECE_COPIES = 4
"""Of a piece's targets, while it is put together: parts, sections, their bytes, all bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakingPlan:
    """What a stage of type `cache` or `generate` will need."""

    name: str
    type: str
    parameters: int
    """Of its teachers."""
    batches: float
    """How many are read or written; the last one may be a part."""
    tokens: int
    """That are read, or written at most."""
    forward: Pass
    """Of one batch."""
    memory: Memory
    memory_range: tuple[int, int]
    time: Time
    limit: int | None
    """Bytes that the device has; None where the system does not tell."""
    decisions: dict[str, Any]
    notes: tuple[str, ...]
    probed_memory: int | None = None

    @property
    def fits(self) -> bool:
        """Whether its memory is enough."""
        return self.limit is None or self.memory.total <= self.limit

    @property
    def steps(self) -> int:
        """Whole batches."""
        return max(1, round(self.batches))

    @property
    def flops(self) -> float:
        """Of the whole stage."""
        return self.forward.flops * self.batches

    def with_probe(self, probe: Probe) -> MakingPlan:
        """The same, with what a few real batches took."""
        if probe.problem is not None:
            return replace(self, notes=(*self.notes, probe.problem))
        spread = (probe.seconds, probe.seconds * (1 - PROBE_SPREAD), probe.seconds * (1 + PROBE_SPREAD))
        time = _time(spread, self.batches, self.tokens, "probe", probe.once)
        return replace(self, time=time, probed_memory=probe.memory)

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "type": self.type,
            "parameters": self.parameters,
            "steps": self.steps,
            "memory": self.memory.to_json(),
            "memory_range": list(self.memory_range),
            "memory_limit": self.limit,
            "optimizer_state": 0,
            "flops": self.flops,
            **self.time.to_json(),
            "decisions": self.decisions,
            "probed_memory": self.probed_memory,
            "fits": self.fits,
            "notes": list(self.notes),
        }


def plan_cache_stage(
    recipe: Recipe, stage: CacheStageConfig, models: StageModels, cache: CachePlan, device: Device
) -> MakingPlan:
    """Plan a cache stage, of whose cache the size is known.

    Raises:
        RuntimeError: the architecture does what cannot be done without data.
    """
    from edgewright.compress.cache_format import PIECE_TOKENS

    length = recipe.data.sequence_length
    decisions = decisions_of(stage, device)
    forward = reading(stage, models.teachers, length, recipe.data.restart_at_documents, decisions["precision"])
    piece = round(min(PIECE_TOKENS, cache.tokens) * cache.bytes_per_token)
    batches = cache.tokens / (length * stage.per_device_batch_size)
    return _planned(stage, models, forward, batches, cache.tokens, PIECE_COPIES * piece, decisions, device)


def plan_generate_stage(
    stage: GenerateStageConfig, models: StageModels, written: WrittenPlan, device: Device
) -> MakingPlan:
    """Plan a generate stage, of which is known what it may write.

    Raises:
        RuntimeError: as `plan_cache_stage`.
    """
    rows = min(stage.per_device_batch_size, written.texts)
    decisions = decisions_of(stage, device) | {"micro_batch": rows}
    prompt = round(written.prompt_tokens)
    forward = writing(models.teachers, rows, prompt, written.new_tokens, decisions["precision"])
    tokens = written.texts * written.new_tokens
    plan = _planned(stage, models, forward, written.texts / rows, tokens, 0, decisions, device)
    return replace(plan, notes=(*plan.notes, *written.notes))


def decisions_of(stage: CacheStageConfig | GenerateStageConfig, device: Device) -> dict[str, Any]:
    """As both stages take them."""
    from edgewright.planner.cases import decided_on
    from edgewright.training import TrainingConfig, decide

    settings = TrainingConfig(precision=stage.precision if stage.type == "cache" else "auto", compile="off")
    taken = decide(settings, parameters=1, tokens=1) | decided_on(device, settings.precision)
    kept = {name: taken[name] for name in ("device", "precision", "compile", "threads")}
    return kept | {"micro_batch": stage.per_device_batch_size}


def _planned(
    stage: CacheStageConfig | GenerateStageConfig,
    models: StageModels,
    forward: Pass,
    batches: float,
    tokens: int,
    more: int,
    decisions: dict[str, Any],
    device: Device,
) -> MakingPlan:
    """Args: more: bytes in host memory beside the tensors of a batch."""
    parts = dict(forward.memory)
    if device.kind == "cpu":
        taken = max(forward.heap, sum(map(loading_bytes, models.teachers)))
        parts["other"] += taken - sum(parts.values()) + LIBRARIES + more
    else:
        parts["other"] += CUDA_CONTEXT + CUDA_WORKSPACE
    memory, share = Memory(**parts), SPREAD[device.kind]
    return MakingPlan(
        name=stage.name,
        type=stage.type,
        parameters=forward.parameters,
        batches=batches,
        tokens=tokens,
        forward=forward,
        memory=memory,
        memory_range=(int((memory.total - LIBRARIES) * (1 - share)), int(memory.total * (1 + share))),
        time=_by_table(forward, batches, tokens, decisions, device),
        limit=device.memory,
        decisions=decisions,
        notes=models.notes,
    )


def _by_table(forward: Pass, batches: float, tokens: int, decisions: dict[str, Any], device: Device) -> Time:
    """By the operations of a batch, and by what it reads of weights and writes of logits."""
    rates = rates_of(decisions, device)
    if rates is None:
        return Time(seconds=None, low=None, high=None, tokens_per_s=None, source="unknown")
    moved = forward.moved_bytes / (device.bandwidth or CPU_BANDWIDTH)
    started = forward.operations * START[device.kind]
    slow, fast = (forward.flops / rate + moved + started * share for rate, share in zip(rates, STARTS, strict=True))
    return _time(((slow * fast) ** 0.5, fast, slow), batches, tokens, "table", 0.0)


def _time(batch: tuple[float, float, float], batches: float, tokens: int, source: str, once: float) -> Time:
    """Of all batches. batch: seconds of one, expected, low and high."""
    seconds, low, high = (each * batches + once for each in batch)
    return Time(seconds=seconds, low=low, high=high, tokens_per_s=tokens / max(seconds, 1e-9), source=source)
