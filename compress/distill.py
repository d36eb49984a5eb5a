"""Distillation from an online teacher: forward KL with temperature and cross-entropy, chunked over both heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.errors import BadInput
from edgewright.objective import ModelInputs, Objective
from edgewright.student import CheckpointStudentConfig, StageStudentConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgewright.chunked import Head

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

    def build(self, teacher: Path) -> Distill:
        """The objective for a teacher in that directory."""
        return Distill(teacher, temperature=self.temperature, kl_weight=self.kl_weight)


class Distill(Objective):
    """Forward KL towards an online teacher plus cross-entropy; neither model's full logits ever exist.

    Gradients and the factor T^2: Hinton et al., 2015 (arXiv 1503.02531), section 2. Both terms are means over the
    counted tokens of the optimizer step (not over the batch, and not over the vocabulary).
    """

    parts = ("kl", "cross_entropy")

    def __init__(self, teacher: Path, *, temperature: float, kl_weight: float) -> None:
        self.directory = teacher
        self.temperature = temperature
        self.kl_weight = kl_weight
        self._teacher: PreTrainedModel | None = None

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Load the teacher, frozen.

        Raises:
            RecipeError: EW-712, the teacher's logits are not those of its head alone.
            BadInput: EW-702, the vocabularies differ in size. (That the tokens are the same is checked by `check`
                and before training, by `data.tokenizer.same_tokens`.)
        """
        from edgewright.student import check_head, load_model

        teacher: Any = load_model(self.directory)
        teacher.to(device).eval().requires_grad_(False)
        if teacher.config.vocab_size < student.config.vocab_size:
            raise BadInput(
                "EW-702",
                "the teacher's vocabulary is smaller than the student's",
                where=self.directory,
                expected=f"at least {student.config.vocab_size} tokens",
                found=teacher.config.vocab_size,
                fix="give the student the teacher's tokenizer: data.tokenizer = {type: pretrained, path: TEACHER}",
            )
        check_head(teacher, f"teacher {self.directory}")
        self.learn_from(teacher)

    def learn_from(self, teacher: PreTrainedModel) -> None:
        """Take a model as the teacher, as it is."""
        self._teacher = teacher

    def teacher(self) -> PreTrainedModel | None:
        return self._teacher

    def loss(
        self, hidden: Tensor, head: Head, inputs: ModelInputs, *, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        import torch

        from edgewright.chunked import chunked_loss
        from edgewright.compress.losses import distillation_rule
        from edgewright.student import hidden_states, output_head

        assert self._teacher is not None, "prepare() comes first"
        with torch.no_grad():
            teacher_hidden = hidden_states(self._teacher, inputs)
        rule = distillation_rule(
            inputs.labels.flatten(),
            teacher_hidden,
            output_head(self._teacher, dtype),
            scale=scale,
            temperature=self.temperature,
            kl_weight=self.kl_weight,
            dtype=dtype,
        )
        return chunked_loss(hidden, head, rule, parts=2, dtype=dtype)
