"""The memory of a stage on a device: the simulated step, and what a process takes besides."""

from __future__ import annotations

from dataclasses import dataclass

from edgewright.planner.devices import CUDA_CONTEXT, Device
from edgewright.planner.simulate import Case, Step, simulate

LIBRARIES = 30 * 2**20
"""What torch's libraries load and set up with the first step on a CPU, beside the code that is imported (measured)."""
COMPILER = 120 * 2**20
"""What compiling a step leaves in the process (measured)."""
CUDA_WORKSPACE = 32 * 2**20
"""cuBLAS's, from torch's allocator."""
SPREAD = {"cpu": 0.15, "cuda": 0.10}
"""What a prediction is taken to be off by at most, as a share of it."""
FUSED = 0.5
"""Share of a plain step's activations that a compiled one does away with: what it fuses is never written. Measured on
two Llamas, 0.55 and 0.63; how much it is depends on the model, so that the range goes from none of it to all of this
and the logits' share as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes at the moment of the peak, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int
    other: int
    """The batch; on a CPU holes of the heap and torch's own buffers, on a GPU the context and cuBLAS's workspace."""

    @classmethod
    def none(cls) -> Memory:
        """Where there is no model."""
        return cls(weights=0, gradients=0, optimizer=0, activations=0, logits=0, teacher=0, other=0)

    @property
    def total(self) -> int:
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.teacher + self.other
        )

    def to_json(self) -> dict[str, int]:
        names = ("weights", "gradients", "optimizer", "activations", "logits", "teacher", "other", "total")
        return {name: getattr(self, name) for name in names}


def predict(case: Case, device: Device) -> tuple[Memory, Step]:
    """Peak memory of a stage above that of a process that has imported all it needs.

    Raises:
        as `simulate`.
    """
    step = simulate(case)
    parts = dict(step.memory)
    fused = _fused(parts["activations"]) if case.decisions["compile"] else 0
    if device.kind == "cpu":
        parts["other"] += step.heap - sum(parts.values()) + LIBRARIES
        parts["other"] += COMPILER if case.decisions["compile"] else 0
    else:
        parts["other"] += CUDA_CONTEXT + CUDA_WORKSPACE
    parts["activations"] -= fused
    if case.decisions["offload_optimizer"]:
        parts["optimizer"] -= step.optimizer_bytes - _largest_state(case, step)
    return Memory(**parts), step


def spread(memory: Memory, case: Case, device: Device) -> tuple[int, int]:
    """Bytes between which the total of a prediction is expected."""
    share = SPREAD[device.kind]
    less = more = 0
    if case.decisions["compile"]:
        less, more = _fused(memory.logits), int(memory.activations * FUSED / (1 - FUSED))
    loaded = LIBRARIES if device.kind == "cpu" else 0  # perhaps by an earlier stage
    return int((memory.total - less - loaded) * (1 - share)), int((memory.total + more) * (1 + share))


def _fused(size: int) -> int:
    """Bytes of a plain step's tensors that a compiled one never writes."""
    return int(FUSED * size)


def _largest_state(case: Case, step: Step) -> int:
    """State of the largest parameter, which is on the device while that is stepped."""
    largest = max(parameter.numel() for parameter in case.student.parameters())
    return step.optimizer_bytes * largest // max(1, step.parameters)
