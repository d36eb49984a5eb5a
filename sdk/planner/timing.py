"""How long a stage takes: from the seconds of real steps, else from the rates of a table, as a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgewright.planner.devices import CPU_SPREAD, UTILISATION, Device
from edgewright.training import COMPILE_COST_SECONDS, COMPILE_GAIN, CPU_FLOPS_PER_CORE

if TYPE_CHECKING:
    from edgewright.planner.simulate import Case, Step

START = {"cpu": 20e-6, "cuda": 8e-6}
"""Seconds that an operation takes before it computes: Python's, autograd's, the launch of a kernel."""
STARTS = (1.5, 0.5)
"""Shares of them, for a slow step and for a fast one."""
PROBE_SPREAD = 0.15
"""What a few steps are taken to be off by at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Seconds of a stage's training, evaluations aside; None where nothing is known of the device's speed."""

    seconds: float | None
    low: float | None
    high: float | None
    tokens_per_s: float | None
    source: str
    """`probe`, `table`, or `unknown`."""

    def to_json(self) -> dict[str, object]:
        return {
            "seconds": self.seconds,
            "seconds_range": None if self.low is None else [self.low, self.high],
            "tokens_per_s": self.tokens_per_s,
            "source": self.source,
        }


def from_table(case: Case, step: Step, device: Device) -> Time:
    """By the operations of the step, and on a GPU also the memory that weights, gradients and state move."""
    tokens = case.stage.training.tokens_per_step(case.sequence_length)
    rates = rates_of(case.decisions, device)
    if rates is None:
        return Time(seconds=None, low=None, high=None, tokens_per_s=None, source="unknown")
    moved = 0.0
    if device.bandwidth is not None:
        moved = 2.0 * (step.weight_bytes + step.optimizer_bytes + 4 * step.parameters) / device.bandwidth
    started = step.operations * START[device.kind]
    slow, fast = (step.flops / rate + moved + started * share for rate, share in zip(rates, STARTS, strict=True))
    once = 0.0
    if case.decisions["compile"]:
        slow, fast, once = slow * (1 - COMPILE_GAIN), fast * (1 - COMPILE_GAIN), COMPILE_COST_SECONDS
    return _spread(case, tokens, (slow * fast) ** 0.5, fast, slow, "table", once)


def from_probe(case: Case, seconds_per_step: float, compiling: float) -> Time:
    """From the mean step of a probe, and the time that it took to compile."""
    tokens = case.stage.training.tokens_per_step(case.sequence_length)
    low, high = seconds_per_step * (1 - PROBE_SPREAD), seconds_per_step * (1 + PROBE_SPREAD)
    return _spread(case, tokens, seconds_per_step, low, high, "probe", compiling)


def rates_of(decisions: dict[str, Any], device: Device) -> tuple[float, float] | None:
    """The slowest and the fastest that is to be expected, operations a second."""
    precision = decisions["precision"]
    if device.kind == "cpu":
        rate = CPU_FLOPS_PER_CORE[precision] * decisions["threads"]
        return rate * CPU_SPREAD[0], rate * CPU_SPREAD[1]
    peak = {"bfloat16": device.bf16, "float32": device.fp32}[precision]
    return None if peak is None else (peak * UTILISATION[0], peak * UTILISATION[1])


def _spread(case: Case, tokens: int, step: float, low: float, high: float, source: str, once: float = 0.0) -> Time:
    steps = case.stage.budget.steps(tokens)
    return Time(
        seconds=step * steps + once,
        low=low * steps + once,
        high=high * steps + once,
        tokens_per_s=tokens / step,
        source=source,
    )
