"""Distillation from an online teacher: forward KL with temperature and cross-entropy, chunked over both heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.objective import ModelInputs, Objective
from edgewright.student import CheckpointStudentConfig, StageStudentConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.compress.targets import TargetSource

TeacherConfig = Annotated[CheckpointStudentConfig | StageStudentConfig, Field(discriminator="type")]


class DistillConfig(BaseModel):
    """kl_weight * T^2 * KL(teacher || student) + (1 - kl_weight) * cross-entropy, mean over tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["distill"] = "distill"
    teacher: TeacherConfig
    """A local model directory, or an earlier stage; frozen, run beside the student."""
    temperature: float = Field(default=1.0, gt=0)
    """T: both distributions are softened by it."""
    kl_weight: float = Field(default=0.5, gt=0, le=1)
    """Weight of the divergence; the cross-entropy gets the rest."""

    def build(self, source: TargetSource) -> Distill:
        """The objective for the targets of that source."""
        return Distill(source, temperature=self.temperature, kl_weight=self.kl_weight)


class Distill(Objective):
    """Forward KL towards a teacher plus cross-entropy; neither model's full logits ever exist.

    Gradients and the factor T^2: Hinton et al., 2015 (arXiv 1503.02531), section 2. Both terms are means over the
    counted tokens of the optimizer step (not over the batch, and not over the vocabulary).
    """

    parts = ("kl", "cross_entropy")

    def __init__(self, source: TargetSource, *, temperature: float, kl_weight: float) -> None:
        self.source = source
        self.temperature = temperature
        self.kl_weight = kl_weight

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Load what the source needs, see `TargetSource.prepare`."""
        self.source.prepare(student, device)

    def teacher(self) -> PreTrainedModel | None:
        return self.source.model()

    def loss(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from edgewright.chunked import chunked_loss
        from edgewright.compress.losses import distillation_rule

        rule = distillation_rule(
            inputs.labels.flatten(),
            self.source.targets(inputs, dtype),
            scale=scale,
            temperature=self.temperature,
            kl_weight=self.kl_weight,
        )
        return chunked_loss(hidden, head, rule, parts=2, dtype=dtype)
