"""What is minimised: next-token prediction, and the interface that distillation implements.

An objective gets hidden states and the head, never logits, so every loss runs in chunks over the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgewright.chunked import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One micro-batch on the device. B rows of S tokens, N = B * S."""

    input_ids: Tensor
    """[B, S] int64."""
    labels: Tensor
    """[B, S] int64, -100 where a token is not counted."""
    position_ids: Tensor | None
    """[B, S], or None for 0..S-1 in every row."""
    attention_mask: Tensor | None
    """[B, 1, S, S] bool, true where a query may look; None for plain causal attention."""
    sequences: tuple[int, ...] | None = None
    """Which sequences of the training stream the rows are (`data.Batch.indices`): a cache finds its targets by them."""


BESIDE = "beside"
"""The student's submodule that an objective trains with it: in every checkpoint, and not in the finished model."""


class Objective(ABC):
    """The loss of a micro-batch. Subclasses are final."""

    parts: tuple[str, ...]
    """Names of the terms that `loss` reports, in order."""

    def attach(self, student: PreTrainedModel) -> None:  # noqa: B027 - an optional hook
        """Give the student a submodule `BESIDE`, where the objective has something to train.

        Called when the methods have prepared it, before the optimizer is built.
        """

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:  # noqa: B027 - an optional hook
        """Load what the objective needs besides the student, and check that it fits."""

    def teacher(self) -> PreTrainedModel | None:
        """The model that the student learns from, to be measured once on the same held-out text."""
        return None

    def view(self, inputs: ModelInputs) -> ModelInputs:
        """What the student sees of a micro-batch, if not all; `loss` gets all of it."""
        return inputs

    def watching(self) -> AbstractContextManager[None]:
        """Around the student's forward of a training step."""
        return nullcontext()

    def begin_step(self, step: int, total_steps: int) -> None:  # noqa: B027 - an optional hook
        """Called before the micro-batches of optimizer step `step` (from 0); what it sets follows from these two."""

    def after_step(self, parts: dict[str, float], kept: dict[str, Any]) -> None:  # noqa: B027 - an optional hook
        """Called after every optimizer step.

        Args:
            parts: values of the step, by name.
            kept: JSON values of this objective's own, in every checkpoint.
        """

    def not_finite(self, inputs: ModelInputs, dtype: torch.dtype) -> tuple[int, int] | None:
        """Where the loss of a micro-batch is not finite: the first token, (row, position), at which the teacher is to
        blame; None where it is not."""
        return None

    @abstractmethod
    def loss(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch.

        Args:
            hidden: [N, H] last hidden states of the student.
            head: the student's output head.
            inputs: the micro-batch.
            scale: 1 over the counted tokens of the whole optimizer step.
            dtype: compute type of the matrix products.

        Returns:
            (loss [], values of `parts` [P], scaled alike).
        """


class NextTokenConfig(BaseModel):
    """Next-token cross-entropy, chunked over the output head."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["next_token"] = "next_token"

    def build(self) -> NextToken:
        return NextToken()


class NextToken(Objective):
    """Mean cross-entropy over the counted tokens of an optimizer step."""

    parts = ("cross_entropy",)

    def loss(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from edgewright.chunked import chunked_loss, cross_entropy_rule

        rule = cross_entropy_rule(inputs.labels.flatten(), scale)
        return chunked_loss(hidden, head, rule, parts=1, dtype=dtype, few_rows=True)
