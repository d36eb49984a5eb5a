"""Students that are made from another model: pruned from a larger one, grown from a smaller one, or a draft of one.

`stages/NAME/start/` is what was made, an ordinary Hugging Face directory, with `start.json` in it, which says how. It
is made once, before the first step, and a run that goes on finds it there.
"""

from __future__ import annotations

import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from edgewright.files import disk_errors, sync_directory, sync_tree, write_json
from edgewright.student import CheckpointStudentConfig, StageStudentConfig, without_progress_bars

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.data import Batches, Corpus
    from edgewright.objective import ModelInputs
    from edgewright.recipe import Recipe, StageConfig

Source = Annotated[CheckpointStudentConfig | StageStudentConfig, Field(discriminator="type")]
"""A local model directory, or the finished model of an earlier stage."""
RECORD = "start.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Text that a model is looked at on: the run's own training sequences, in the run's own order."""

    batches: Batches
    device: torch.device
    rows: int
    """Sequences at once."""
    source: Path
    """The directory of the model that is looked at."""
    counts: Callable[[], np.ndarray]
    """[V] how often each token comes in the text that the stage adds to the recipe's own, else in that."""

    def inputs(self, sequences: int) -> Iterator[ModelInputs]:
        """The first so many training sequences, or all where there are fewer; the same ones each time."""
        from edgewright.trainer import model_inputs

        count = min(sequences, len(self.batches))
        for start in range(0, count, self.rows):
            yield model_inputs(self.batches.batch(start, min(self.rows, count - start)), self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """What was made."""

    model: PreTrainedModel
    record: dict[str, Any]
    """How, for `start.json`: JSON values."""
    summary: str
    """The same in a line, for the log."""


class DerivedStudentConfig(BaseModel):
    """A student that is made from another model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: Source
    """What it is made from: {type: checkpoint, model: DIRECTORY} or {type: stage, stage: NAME}."""

    def open_source(self, directory: Path, device: torch.device) -> PreTrainedModel:
        """The model that it is made from, with its weights, on a device."""
        from edgewright.student import load_model

        model: Any = load_model(directory)
        opened: PreTrainedModel = model.to(device)
        return opened

    @abstractmethod
    def architecture(self, source: PretrainedConfig) -> PretrainedConfig:
        """The configuration of what will be made.

        Raises:
            RecipeError: the source cannot be made into that, with the nearest that it can.
        """

    @abstractmethod
    def derive(self, source: PreTrainedModel, calibration: Calibration, seed: int) -> Derived:
        """Make it. `source` is used up."""

    @property
    def speaks(self) -> CheckpointStudentConfig | StageStudentConfig:
        """The model whose tokens what is made will have: those of the data."""
        return self.source

    @property
    @abstractmethod
    def made(self) -> str:
        """What is done to the source, as a participle."""

    def check(self, source: PreTrainedModel) -> PretrainedConfig:
        """`architecture`, for a model that may be on meta.

        Raises:
            RecipeError: EW-761, its family is not known; as `architecture`.
        """
        from edgewright.compress.axes import check_axes

        check_axes(source, source.config.model_type, self.made)
        return self.architecture(source.config)

    def notes(self, recipe: Recipe, stage: StageConfig, parameters: int) -> Iterator[str]:
        """What is worth knowing before the run.

        Args:
            parameters: of the model that will be made.
        """
        yield from ()


def source_of(student: BaseModel) -> CheckpointStudentConfig | StageStudentConfig | None:
    """The model that a student comes from, as it is or made into another; None where it starts from scratch."""
    if isinstance(student, DerivedStudentConfig):
        return student.source
    return student if isinstance(student, CheckpointStudentConfig | StageStudentConfig) else None


def start_directory(
    config: DerivedStudentConfig,
    source: Path,
    folder: Path,
    recipe: Recipe,
    stage: StageConfig,
    corpus: Corpus,
    counts: Callable[[], np.ndarray],
    say: Callable[[str], None],
) -> Path:
    """Make the model that a stage starts from, or find that it is there.

    Args:
        source: model directory.
        folder: the stage's own directory.
        counts: as `Calibration.counts`.

    Raises:
        RecipeError: as `DerivedStudentConfig.check`. OutOfResources: EW-401.
    """
    import torch

    from edgewright.export.tokenizer_files import write_tokenizer
    from edgewright.export.weight_hash import weights_sha256
    from edgewright.weights import plain_state_dict

    target = folder / "start"
    if target.exists():
        return target
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = config.open_source(source, device)
    before = sum(parameter.numel() for parameter in model.parameters())
    config.check(model)
    text = Calibration(
        batches=corpus.train.batches(
            sequence_length=recipe.data.sequence_length,
            seed=recipe.seed_of(stage),
            restart_at_documents=recipe.data.restart_at_documents,
            start_id=corpus.start_id,
            eos_id=corpus.eos_id,
        ),
        device=device,
        rows=stage.training.per_device_train_batch_size,
        source=source,
        counts=counts,
    )
    derived = config.derive(model, text, recipe.seed_of(stage))
    after = sum(parameter.numel() for parameter in derived.model.parameters())
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    for leftover in folder.glob(f".tmp-*-{target.name}"):
        shutil.rmtree(leftover)
    with disk_errors(target):
        made: Any = derived.model
        made.to("cpu")
        with without_progress_bars():
            derived.model.save_pretrained(temporary, state_dict=plain_state_dict(derived.model))
        write_tokenizer(corpus.tokenizer_dir, temporary)
        record = {
            "schema_version": 1,
            "made": config.made,
            "source": {"weights_sha256": weights_sha256(source), "parameters": before},
            "parameters": after,
            "settings": config.model_dump(mode="json", exclude={"source"}),
            **derived.record,
        }
        write_json(temporary / RECORD, record)
        sync_tree(temporary)
    os.rename(temporary, target)
    sync_directory(folder)
    say(f"{stage.name}: {config.made}, {before:,} -> {after:,} parameters; {derived.summary}")
    return target
