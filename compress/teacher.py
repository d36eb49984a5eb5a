"""Teachers: where targets come from (`targets.TargetSource`). Here a frozen model beside the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from edgewright.compress.targets import HeadLogits, Logits, TargetSource

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.objective import ModelInputs


class OnlineTeacher(TargetSource):
    """A local model that runs on every micro-batch, in evaluation mode and without gradient.

    Args:
        directory: of the model; it is loaded by `prepare`.
        model: a model taken as it is instead.
    """

    gives = Logits
    inside = True

    def __init__(self, directory: Path | None = None, *, model: PreTrainedModel | None = None) -> None:
        assert (directory is None) != (model is None), "a directory or a model"
        self.directory = directory
        self._model = model

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Load the teacher, frozen.

        Raises:
            RecipeError: EW-712, the teacher's logits are not those of its head alone. (That both speak of the same
                tokens is checked by `check` and before training, by `vocabulary.check_same_tokens`.)
        """
        from edgewright.student import check_head, load_model

        if self.directory is None:
            return
        teacher: Any = load_model(self.directory)
        teacher.to(device).eval().requires_grad_(False)
        check_head(teacher, f"teacher {self.directory}")
        self._model = teacher

    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> HeadLogits:
        from edgewright.student import hidden_states, output_head

        assert self._model is not None, "prepare() comes first"
        with torch.no_grad():
            hidden = hidden_states(self._model, inputs)
        return HeadLogits(hidden, output_head(self._model, dtype), dtype)

    def architecture(self) -> PretrainedConfig:
        from edgewright.preview import stored_architecture

        if self._model is not None:
            return self._model.config
        assert self.directory is not None
        return stored_architecture(self.directory).config

    def model(self) -> PreTrainedModel | None:
        return self._model
