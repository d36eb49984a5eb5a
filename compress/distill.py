"""Distillation: weighted losses towards what a teacher says, and cross-entropy, chunked over the heads.

Where the teacher's word comes from is a `targets.TargetSource`; what is made of it are the losses of `loss_config`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.compress.loss_config import (
    MODEL,
    REST,
    CrossEntropyConfig,
    ForwardKLConfig,
    HiddenLossConfig,
    LossConfig,
    TokenLossConfig,
    TopKConfig,
    UldConfig,
)
from edgewright.compress.teacher_config import TeacherConfig
from edgewright.errors import RecipeError
from edgewright.objective import BESIDE, ModelInputs, Objective

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.compress.recording import Recorder
    from edgewright.compress.targets import TargetSource

KL_WEIGHT, TEMPERATURE = 0.5, 1.0
"""Where a recipe says nothing."""
STEPS_OF_NOTHING = 100
"""Optimizer steps in a row at which all divergences from the teacher are exactly 0, before that is an error."""


class DistillConfig(BaseModel):
    """Weighted losses towards a teacher, mean over the counted tokens of an optimizer step (arXiv 1503.02531)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["distill"] = "distill"
    teacher: TeacherConfig
    """Where the targets come from: a model directory, an earlier stage, several of them, or a cache."""
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
        offered = [source.gives.kind, *([MODEL] if source.inside else [])]
        for index, loss in enumerate(self.weighted()):
            if loss.accepts and not set(loss.accepts) & set(offered):
                raise RecipeError(
                    "EW-781",
                    f"{loss.function} cannot use what this teacher gives",
                    where=f"objective.losses.{index}",
                    expected=f"a teacher that gives {' or '.join(loss.accepts)}",
                    found=" and ".join(offered),
                    fix="take a loss that accepts it (edgewright ls losses), or a model that runs beside the student",
                )
        return Distill(source, self.weighted())

    @property
    def crosses_tokenizers(self) -> bool:
        """Whether the teacher may cut text into other tokens than the data: one model may, the mean of several not."""
        return len(self.teacher.models()) == 1 and any(isinstance(loss, UldConfig) for loss in self.weighted())

    def notes(self) -> list[str]:
        """What there is to say of it before training."""
        if not all(isinstance(loss, UldConfig) for loss in self.weighted()):
            return []
        return [
            "uld compares sorted probabilities, and no loss beside it says which tokens are meant: "
            "add {function: cross_entropy, weight: rest}"
        ]

    @property
    def offered(self) -> tuple[str, ...]:
        """What a teacher that runs beside the student gives, as `build` will find it."""
        if self.crosses_tokenizers:
            return ("aligned",)
        return ("logits", MODEL) if len(self.teacher.models()) == 1 else ("logits",)

    @property
    def depends_on_shapes(self) -> bool:
        """Whether one of the losses is of layers that have to be there, or of so many tokens of the teacher."""
        return any(isinstance(loss, HiddenLossConfig | TopKConfig) for loss in self.weighted())

    def check_fit(self, student: PretrainedConfig, teacher: PretrainedConfig, where: str) -> None:
        """Refuse losses that two architectures cannot have, before anything is loaded.

        Raises:
            RecipeError: EW-785, hidden states of layers that are not there; EW-780, k is above the vocabulary.
        """
        from edgewright.compress.hidden_terms import Shape
        from edgewright.compress.targets import check_k

        for index, loss in enumerate(self.weighted()):
            if isinstance(loss, HiddenLossConfig):
                loss.build().fit(Shape.of(student), Shape.of(teacher), f"{where}.losses.{index}")
            elif isinstance(loss, TopKConfig):
                check_k(loss.k, teacher.get_text_config().vocab_size, f"{where}.losses.{index}.k")


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
        numbered = list(enumerate(self.configs))
        self.of_tokens = {index: config.build() for index, config in numbered if isinstance(config, TokenLossConfig)}
        self.of_hidden = {index: config.build() for index, config in numbered if isinstance(config, HiddenLossConfig)}
        self.weights = self._weights([0.0 if config.weight == REST else config.weight for config in self.configs])
        """At this step; before any, those without schedules."""
        self._recorders: dict[str, Recorder] = {}

    def attach(self, student: PreTrainedModel) -> None:
        """Give the student what losses of hidden states train beside it, and begin to look into it.

        Raises:
            RecipeError: EW-784, EW-785, the architectures do not have what these losses compare.
        """
        if not self.of_hidden:
            return
        from torch import nn

        from edgewright.compress.hidden_terms import Shape
        from edgewright.compress.recording import Recorder

        teacher = self.source.architecture()
        assert teacher is not None, "the objective was checked"
        shapes = Shape.of(student.config), Shape.of(teacher)
        with next(student.parameters()).device:
            made = {i: loss.fit(*shapes, f"objective.losses.{i}") for i, loss in self.of_hidden.items()}
        beside = nn.ModuleDict({self.parts[i]: module for i, module in made.items() if module is not None})
        if len(beside):
            student.add_module(BESIDE, beside)
        wanted = [loss.of_student for loss in self.of_hidden.values()]
        self._recorders["student"] = Recorder(student, functools.reduce(operator.or_, wanted))
        self._look_into_teacher()

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Load what the source needs, see `TargetSource.prepare`."""
        self.source.prepare(student, device)
        self._look_into_teacher()

    def _look_into_teacher(self) -> None:
        from edgewright.compress.recording import Recorder

        model = self.source.model()
        if self.of_hidden and model is not None and "teacher" not in self._recorders:
            wanted = [loss.of_teacher for loss in self.of_hidden.values()]
            self._recorders["teacher"] = Recorder(model, functools.reduce(operator.or_, wanted))

    def view(self, inputs: ModelInputs) -> ModelInputs:
        for loss in self.of_hidden.values():
            inputs = loss.view(inputs)
        return inputs

    def watching(self) -> AbstractContextManager[None]:
        return self._recorders["student"].recording() if self.of_hidden else nullcontext()

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

        with self._recorders["teacher"].recording() if self.of_hidden else nullcontext():
            targets = self.source.targets(inputs, dtype)
        weights = [self.weights[index] for index in self.of_tokens]
        asked = any(self.configs[index].accepts and self.weights[index] for index in self.of_tokens)
        rule = distillation_rule(
            list(self.of_tokens.values()), weights, inputs.labels.flatten(), targets if asked else None, scale=scale
        )
        loss, parts = chunked_loss(hidden, head, rule, parts=len(self.of_tokens), dtype=dtype)
        if not self.of_hidden:
            return loss, parts
        values = parts.new_zeros(len(self.parts))
        values[list(self.of_tokens)] = parts
        for index, value in self._hidden_values(hidden, head, inputs, scale=scale, dtype=dtype):
            loss = loss + value
            values[index] = value.detach()
        return loss, values

    def _hidden_values(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor]]:
        """Weighted losses of hidden states, with their numbers; what was recorded is free afterwards."""
        from edgewright.chunked import IGNORED
        from edgewright.compress.hidden_terms import Seen

        seen = Seen(
            student=self._recorders["student"],
            teacher=self._recorders["teacher"],
            hidden=hidden.unflatten(0, inputs.input_ids.shape),
            head=head,
            inputs=inputs,
            weights=(inputs.labels != IGNORED).float() * scale,
            scale=scale,
            dtype=dtype,
        )
        for index, loss in self.of_hidden.items():
            yield index, self.weights[index] * loss.value(seen)
        for recorder in self._recorders.values():
            recorder.forget()

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
