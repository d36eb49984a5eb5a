"""Distillation: weighted losses towards what a teacher says, and cross-entropy, chunked over the heads.

Where the teacher's word comes from is a `targets.TargetSource`; what is made of it are the losses of `loss_config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.compress.loss_config import REST, CrossEntropyConfig, ForwardKLConfig, LossConfig
from edgewright.errors import RecipeError
from edgewright.objective import ModelInputs, Objective
from edgewright.student import CheckpointStudentConfig, StageStudentConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.compress.targets import TargetSource

TeacherConfig = Annotated[CheckpointStudentConfig | StageStudentConfig, Field(discriminator="type")]
KL_WEIGHT, TEMPERATURE = 0.5, 1.0
"""Where a recipe says nothing."""
STEPS_OF_NOTHING = 100
"""Optimizer steps in a row at which all divergences from the teacher are exactly 0, before that is an error."""


class DistillConfig(BaseModel):
    """Weighted losses towards a teacher, mean over the counted tokens of an optimizer step (arXiv 1503.02531)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["distill"] = "distill"
    teacher: TeacherConfig
    """A local model directory, or an earlier stage; frozen, run beside the student."""
    losses: tuple[LossConfig, ...] | None = Field(default=None, min_length=1)
    """What is summed. null: forward KL and cross-entropy, by the two keys below."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Short for a list: temperature of the forward KL, 1 if null."""
    kl_weight: float | None = Field(default=None, gt=0, le=1)
    """Short for a list: weight of the forward KL, 0.5 if null; the cross-entropy gets the rest."""

    @model_validator(mode="after")
    def _holds_together(self) -> DistillConfig:
        if self.losses is None:
            return self
        short = [name for name in ("temperature", "kl_weight") if getattr(self, name) is not None]
        if short:
            raise ValueError(
                f"give `losses` or {' and '.join(short)}, not both: they are short for losses: "
                "[{function: forward_kl, weight: KL_WEIGHT, temperature: T}, {function: cross_entropy, weight: rest}]"
            )
        if all(loss.function == CrossEntropyConfig.model_fields["function"].default for loss in self.losses):
            raise ValueError("at least one of the losses has to learn from the teacher; for none take type: next_token")
        rests = sum(loss.weight == REST for loss in self.losses)
        others = math.fsum(loss.weight for loss in self.losses if not isinstance(loss.weight, str))
        if rests > 1:
            raise ValueError("only one of the losses can have the weight that the others leave (rest)")
        if rests and others >= 1.0 and all(loss.schedule is None for loss in self.losses):
            raise ValueError(f"weight: rest gets what the others leave of 1, but they have {others:g}")
        if rests and others > 1.0:
            raise ValueError(f"weight: rest gets what the others leave of 1, but they have up to {others:g}")
        if any(loss.weight == REST and loss.schedule is not None for loss in self.losses):
            raise ValueError("weight: rest follows the schedules of the others, and has none of its own")
        return self

    def weighted(self) -> tuple[LossConfig, ...]:
        """The list of losses, whichever way it is written."""
        return mixture(self.kl_weight, self.temperature) if self.losses is None else self.losses

    def build(self, source: TargetSource) -> Distill:
        """The objective for the targets of that source.

        Raises:
            RecipeError: EW-781, a loss that cannot use what the source gives.
        """
        for index, loss in enumerate(self.weighted()):
            if loss.accepts and source.gives.kind not in loss.accepts:
                raise RecipeError(
                    "EW-781",
                    f"{loss.function} cannot use what this teacher gives",
                    where=f"objective.losses.{index}",
                    expected=f"targets of the kind {' or '.join(loss.accepts)}",
                    found=source.gives.kind,
                    fix=f"function: {source.gives.kind.replace('sampled', 'rs_kd')}, or a teacher beside the student",
                )
        return Distill(source, self.weighted())


def mixture(kl_weight: float | None, temperature: float | None) -> tuple[LossConfig, ...]:
    """Forward KL and cross-entropy, as the short form of a recipe means them."""
    weight = KL_WEIGHT if kl_weight is None else kl_weight
    divergence = ForwardKLConfig(weight=weight, temperature=TEMPERATURE if temperature is None else temperature)
    return (divergence,) if weight == 1.0 else (divergence, CrossEntropyConfig(weight=REST))


def in_full(section: dict[str, Any]) -> dict[str, Any]:
    """An `objective` section as JSON with its losses as a list: alike for all ways to write the same."""
    rest = {key: value for key, value in section.items() if key not in ("temperature", "kl_weight")}
    if section.get("type") == "distill" and section.get("losses") is None:
        losses = mixture(section.get("kl_weight"), section.get("temperature"))
        rest["losses"] = [loss.model_dump(mode="json") for loss in losses]
    return rest


class Distill(Objective):
    """Weighted losses towards a teacher; neither model's full logits ever exist.

    Args:
        source: what gives the targets.
        losses: by name, weight and temperature. `parts` are their values times their weights; the second of a function
            is called `NAME-2`.
    """

    def __init__(self, source: TargetSource, losses: Sequence[LossConfig]) -> None:
        self.source = source
        self.configs = tuple(losses)
        self.parts = _names(self.configs)
        self.losses = [config.build() for config in self.configs]
        self.weights = self._weights([0.0 if config.weight == REST else config.weight for config in self.configs])
        """At this step; before any, those without schedules."""

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Load what the source needs, see `TargetSource.prepare`."""
        self.source.prepare(student, device)

    def teacher(self) -> PreTrainedModel | None:
        return self.source.model()

    def weights_at(self, step: int, total_steps: int) -> list[float]:
        """The weight of every loss at an optimizer step."""
        return self._weights([config.weight_at(step, total_steps) for config in self.configs])

    def _weights(self, given: list[float]) -> list[float]:
        left = max(0.0, 1.0 - sum(given))
        return [left if config.weight == REST else one for config, one in zip(self.configs, given, strict=True)]

    def begin_step(self, step: int, total_steps: int) -> None:
        self.weights = self.weights_at(step, total_steps)

    def loss(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from edgewright.chunked import chunked_loss
        from edgewright.compress.loss_rule import distillation_rule

        targets = self.source.targets(inputs, dtype)
        rule = distillation_rule(self.losses, self.weights, inputs.labels.flatten(), targets, scale=scale)
        return chunked_loss(hidden, head, rule, parts=len(self.parts), dtype=dtype)

    def not_finite(self, inputs: ModelInputs, dtype: torch.dtype) -> tuple[int, int] | None:
        import torch

        from edgewright.compress.targets import finite_rows

        with torch.no_grad():
            found = finite_rows(self.source.targets(inputs, dtype), inputs.labels.numel())
        if bool(found.all()):
            return None
        first = int(found.logical_not().nonzero()[0])
        return divmod(first, inputs.labels.shape[1])

    def after_step(self, parts: dict[str, float], kept: dict[str, Any]) -> None:
        """Count the steps at which the student and the teacher do not differ at all.

        Raises:
            RecipeError: EW-782, there have been `STEPS_OF_NOTHING` of them in a row.
        """
        learned = [
            parts[name]
            for name, config, weight in zip(self.parts, self.configs, self.weights, strict=True)
            if config.accepts and weight
        ]
        nothing = bool(learned) and all(value == 0.0 for value in learned)
        kept["steps_of_nothing"] = kept.get("steps_of_nothing", 0) + 1 if nothing else 0
        if kept["steps_of_nothing"] >= STEPS_OF_NOTHING:
            raise RecipeError(
                "EW-782",
                "the student has nothing to learn from this teacher",
                expected="a divergence that is not exactly 0",
                found=f"{', '.join(self.parts)}: exactly 0 at {STEPS_OF_NOTHING} steps in a row",
                fix="give another teacher: this one computes just what the student does, as the same model would",
            )


def _names(losses: Sequence[LossConfig]) -> tuple[str, ...]:
    """The function of each, with a number where it comes again."""
    seen: dict[str, int] = {}
    names = []
    for loss in losses:
        seen[loss.function] = number = seen.get(loss.function, 0) + 1
        names.append(loss.function if number == 1 else f"{loss.function}-{number}")
    return tuple(names)
