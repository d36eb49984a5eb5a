"""When weights are pruned, and how many are left: the schedules of gradual pruning, in optimizer steps.

"After n steps" counts steps done, so pruning after n steps leaves the first n exactly as dense training has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edgewright.compress.density import whole
from edgewright.errors import RecipeError

PRUNE_EVERY = 100
"""Steps between two prunings in the papers."""
FEWEST_PRUNINGS = 50
"""In runs too short for that many at `PRUNE_EVERY`, they follow each other faster."""

Curve = Callable[[float], float]
"""Density from progress: 0 before the first pruning, 1 after the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Prunings after `first`, `first + every`, ..., `last` steps."""

    first: int
    last: int
    every: int
    curve: Curve

    @property
    def prunings(self) -> int:
        """How many there are."""
        return (self.last - self.first) // self.every + 1

    def density_after(self, steps: int) -> float:
        """Density after that many steps, with the pruning that falls on them."""
        done = 0 if steps < self.first else (min(steps, self.last) - self.first) // self.every + 1
        return self.curve(done / self.prunings)

    def prunes_after(self, steps: int) -> bool:
        """Whether a pruning falls on the end of that step."""
        return self.first <= steps <= self.last and (steps - self.first) % self.every == 0


def geometric(density: float) -> Curve:
    """Every pruning removes the same fraction of what is there: density ** progress."""
    return lambda progress: density**progress


def cubic(initial: float, final: float) -> Curve:
    """Fast at first, then ever slower (Zhu and Gupta, arXiv 1710.01878): d = f + (i - f) (1 - progress)^3."""
    return lambda progress: final + (initial - final) * (1 - progress) ** 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Steps before, during and after pruning."""

    dense: float
    pruning: float
    recovery: float

    @property
    def total(self) -> float:
        return self.dense + self.pruning + self.recovery

    def rounded(self, every: int) -> Phases:
        """Each to a multiple of `every`."""
        phases = (self.dense, self.pruning, self.recovery)
        dense, pruning, recovery = (round(steps / every) * every for steps in phases)
        return Phases(dense=dense, pruning=pruning, recovery=recovery)


def mean_density(density: float) -> float:
    """Mean of a geometric curve from 1 to `density`: (1 - d) / ln(1 / d)."""
    return 1.0 if density == 1 else (1 - density) / math.log(1 / density)


def journey_phases(dense_steps: float, density: float, *, start: float = 0.25, end: float = 0.75) -> Phases:
    """The steps that a gradually pruned run of a given compute takes (The Journey Matters, arXiv 2501.12486).

    Pruning goes from `start` to `end` of the *compute*: a step at density d costs d of a dense one, so that

        dense = start C,    pruning = (end - start) C ln(1/d) / (1 - d),    recovery = (1 - end) C / d.

    `journey_phases(C, d).rounded(100).total` steps train the sparse model with the compute of C dense ones: 72,200 for
    C = 50,000 and half of the weights, as published.

    Args:
        dense_steps: C, the compute in steps of the dense model.
        density: at the end, in (0, 1].
        start: share of the compute before pruning.
        end: share of the compute at the end of pruning.
    """
    return Phases(
        dense=start * dense_steps,
        pruning=(end - start) * dense_steps / mean_density(density),
        recovery=(1 - end) * dense_steps / density,
    )


def dense_equivalent(steps: float, density: float, *, start: float = 0.25, end: float = 0.75) -> float:
    """C, the compute of a gradually pruned run of that many steps in steps of the dense model."""
    return steps / journey_phases(1.0, density, start=start, end=end).total


def journey(total_steps: int, density: float, *, start: float, end: float, every: int | None) -> Schedule:
    """The schedule that fills a run: `journey_phases` the other way round.

    Args:
        total_steps: of the run.
        density: at the end.
        start: share of the compute before pruning, in (0, end).
        end: share of the compute at the end of pruning, at most 1.
        every: steps between two prunings; None: `PRUNE_EVERY`, or fewer in a short run.

    Raises:
        RecipeError: EW-728, they do not fit into the run.
    """
    compute = dense_equivalent(total_steps, density, start=start, end=end)
    phases = journey_phases(compute, density, start=start, end=end)
    every = every or steps_between(phases.pruning)
    times = _times(phases, every, total_steps)
    if times is None:
        shorter = range(min(every - 1, total_steps), 0, -1)
        legal = next((steps for steps in shorter if _times(phases, steps, total_steps)), None)
        raise does_not_fit("prune_every", every, legal, total_steps)
    first, last = times
    return Schedule(first=first, last=last, every=every, curve=geometric(density))


def _times(phases: Phases, every: int, total_steps: int) -> tuple[int, int] | None:
    """First and last pruning, in steps done; None where they do not fit."""
    phases = phases.rounded(every)
    first, last = int(phases.dense), int(phases.dense + phases.pruning)
    if last > total_steps:  # by the rounding
        last -= every
    return (first, last) if 0 < first < last else None


def steps_between(duration: float, fewest: int = FEWEST_PRUNINGS) -> int:
    """Steps between two prunings of a phase: `PRUNE_EVERY`, or so few that there are `fewest` of them."""
    return max(1, min(PRUNE_EVERY, whole(duration / fewest, 1)))


def does_not_fit(setting: str, every: int, legal: int | None, total_steps: int) -> RecipeError:
    """The error for prunings that do not fit into a run; `legal` is the largest number of steps that does."""
    return RecipeError(
        "EW-728",
        "the pruning schedule does not fit into the run",
        expected=f"{setting} of at most {legal}" if legal else "more steps",
        found=f"{setting} of {every} in a run of {total_steps} steps",
        fix=f"{setting}: {legal}, or a longer budget" if legal else "a longer budget",
    )
