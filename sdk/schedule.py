"""Learning-rate schedules: a factor of the peak rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Schedule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    warmup_ratio: float = Field(default=0.02, ge=0, lt=1)
    """Share of all steps over which the rate climbs linearly to its peak."""

    def _warmup(self, step: int, total: int) -> float:
        return min(1.0, (step + 1) / max(1.0, self.warmup_ratio * total))

    def _progress(self, step: int, total: int, start: float) -> float:
        """0 at `start` (share of the run), 1 at the last step."""
        first = start * total
        return min(1.0, max(0.0, (step + 1 - first) / max(1.0, total - first)))


class CosineConfig(_Schedule):
    """Linear warm-up, then half a cosine down to `final_ratio` of the peak (Loshchilov and Hutter, 1608.03983)."""

    type: Literal["cosine"] = "cosine"
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Rate of the last step over the peak."""

    def factor(self, step: int, total: int) -> float:
        """Multiplier of the peak rate for optimizer step `step` (from 0) of `total`."""
        cosine = 0.5 * (1 + math.cos(math.pi * self._progress(step, total, self.warmup_ratio)))
        return self._warmup(step, total) * (self.final_ratio + (1 - self.final_ratio) * cosine)


class WsdConfig(_Schedule):
    """Warm-up, stable, decay: constant, then linear to `final_ratio` over the last share (MiniCPM, 2404.06395)."""

    type: Literal["wsd"] = "wsd"
    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps that the decay takes, at the end."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Rate of the last step over the peak."""

    def factor(self, step: int, total: int) -> float:
        """Multiplier of the peak rate for optimizer step `step` (from 0) of `total`."""
        decay = self._progress(step, total, 1 - self.decay_ratio)
        return self._warmup(step, total) * (1 - (1 - self.final_ratio) * decay)


class ConstantConfig(_Schedule):
    """Linear warm-up, then the peak rate to the end."""

    type: Literal["constant"] = "constant"

    def factor(self, step: int, total: int) -> float:
        """Multiplier of the peak rate for optimizer step `step` (from 0) of `total`."""
        return self._warmup(step, total)


ScheduleConfig = Annotated[CosineConfig | WsdConfig | ConstantConfig, Field(discriminator="type")]


REWARM_START = 1e-3
"""Share of the target rate that a re-warm-up starts from."""


def rewarm_factor(schedule: ScheduleConfig, step: int, total: int, first: int, steps: int) -> float:
    """The factor after a dip at step `first`, from which the rate climbs linearly over `steps` steps.

    0.001 of its target at `first`, the target at `first + steps - 1`; the target is the schedule's factor at
    `first + steps`, where the schedule takes over (Glentis et al., arXiv 2505.22922).
    """
    if step >= first + steps:
        return schedule.factor(step, total)
    target = schedule.factor(min(first + steps, total - 1), total)
    climbed = 1.0 if steps == 1 else (step - first) / (steps - 1)
    return target * (REWARM_START + (1 - REWARM_START) * climbed)
