"""Restarts of low-rank training: every T steps the factors are balanced, and the optimizer begins anew.

Weight refactorization and momentum reset (Glentis et al., arXiv 2505.22922). After step kT, in this order: the factors
become the balanced ones of the same product; all moments and step counts of the optimizer, those of embeddings and
norms too, become zero, so that bias correction restarts; the learning rate dips to 0.001 of its value and climbs back
over `rewarm_steps` steps. Where we differ: the released code balances only SLTrain layers, works in bf16 and rebuilds
W for an SVD of its own; here all factors are balanced, in float64, by QR and an r x r SVD. And it silently changes T
for the dip, but not for the reset, where T does not divide the run; here any T will do, and a restart happens only if a
whole period is left after it, so that the run never ends in a dip or with moments of a few steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from edgewright.method import StepContext

OF_A_RESTART = ("refactor", "reset", "rewarm_steps")
"""What a recipe may say of restarts. The resolved recipe spells out their defaults where there are none."""


class Restarts(BaseModel):
    """Part of the settings of methods with factors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    restart_every: int | None = Field(default=None, gt=0)
    """T, in optimizer steps; the paper's is 200. None: no restarts."""
    refactor: bool = True
    """Whether a restart balances the factors, which keeps the function; with an activation between them none can."""
    reset: bool = True
    """Whether a restart zeroes the optimizer's state and dips the learning rate: most of the gain, by the paper."""
    rewarm_steps: int = Field(default=10, ge=0)
    """Steps of the way back from the dip of a reset; 0: no dip."""

    @property
    def heeded(self) -> frozenset[str]:
        """Those of the settings above that do anything."""
        return frozenset() if self.restart_every is None else frozenset(OF_A_RESTART)

    @model_validator(mode="after")
    def _restarts_do_something(self) -> Self:
        for name in OF_A_RESTART:
            if name not in self.heeded and getattr(self, name) != Restarts.model_fields[name].default:
                raise ValueError(f"{name} is of restarts, and there are none without restart_every")
        if self.restart_every is None:
            return self
        if not (self.refactor or self.reset):
            raise ValueError("restart_every needs refactor or reset: without both a restart does nothing")
        if not self.reset:
            if self.rewarm_steps != Restarts.model_fields["rewarm_steps"].default:
                raise ValueError(
                    "rewarm_steps is of a reset, and reset is false: a restart that only refactors dips no rate"
                )
        elif self.rewarm_steps >= self.restart_every:
            raise ValueError(
                f"rewarm_steps must be below restart_every ({self.restart_every}), or the rate never comes back"
            )
        return self


class Refactorable(Protocol):
    """A layer whose factors can be balanced in place."""

    def refactor(self) -> None: ...


def due(every: int, ctx: StepContext) -> bool:
    """Whether the step just done ends a period, and a whole one is left; for `after_step`."""
    done = ctx.step + 1
    return done % every == 0 and done + every <= ctx.total_steps


def check_period(setting: str, every: int | None, total_steps: int) -> None:
    """Refuse a period that never comes round in the run.

    Args:
        setting: its key in the recipe.
        every: the period in steps; None for none.
        total_steps: of the stage.

    Raises:
        RecipeError: EW-721.
    """
    if every is not None and 2 * every > total_steps:
        most = total_steps // 2
        raise RecipeError(
            "EW-721",
            f"{setting} is longer than half the run, so it would never happen",
            expected=f"at most {most}: one period before it and one after it in {total_steps} steps",
            found=every,
            fix=f"{setting}: {most}, or a longer budget" if most else f"leave {setting} out, or train longer",
        )


def restart(settings: Restarts, ctx: StepContext, layers: Iterable[Refactorable]) -> None:
    """Do what a restart does if one is due; to be called in `after_step`."""
    if settings.restart_every is None or not due(settings.restart_every, ctx):
        return
    if settings.refactor:
        for layer in layers:
            layer.refactor()
    if settings.reset:
        ctx.reset_all_state()
        if settings.rewarm_steps:
            ctx.rewarm(settings.rewarm_steps)
