"""A stage of type `text`: more text than the recipe's own, in the same tokens, which later stages mix in.

    stages/NAME/corpus/   as the recipe's own `data/`: packed tokens, a report of what was kept and dropped

A draft goes on from text to its domain with it (FastDraft's continued pretraining): `{name: code, type: text, files:
[...]}`, and in a later stage `generated: {stage: code, share: 0.67}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.data.files import FilesData, Pattern
from edgewright.data.text import BadTextPolicy
from edgewright.data.tokenizer import PretrainedTokenizer
from edgewright.paths import Name

if TYPE_CHECKING:
    from pathlib import Path

    from edgewright.compress.teacher_config import ModelTeacherConfig
    from edgewright.recipe import Recipe
    from edgewright.stage_work import Made, StageWork

FOLDER = "corpus"
"""Of the stage's own folder, as that of a stage of type `generate`."""


class TextStageConfig(BaseModel):
    """More text, in the tokens of the recipe's data, for stages that come later (continued pretraining of drafts,
    arXiv 2411.11055)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["text"] = "text"
    name: Name
    """Later stages call it by this name."""
    files: Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1)]
    """One pattern or several, as in `data`."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file."""
    separator: str = Field(default="<|endoftext|>", min_length=1)
    """What stands between two documents of a .txt file."""
    held_out: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share that no stage trains on, as in `data`."""
    on_bad_text: BadTextPolicy = "strict"
    """As in `data`."""

    @property
    def seed(self) -> None:
        """Nothing here is random."""
        return None

    @property
    def teachers(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that run in this stage: none."""
        return ()

    def source(self, recipe: Recipe, tokenizer: Path) -> FilesData:
        """The text as `data` would name it."""
        settings = self.model_dump(exclude={"type", "name"})
        return FilesData(
            **settings,
            tokenizer=PretrainedTokenizer(path=tokenizer),
            sequence_length=recipe.data.sequence_length,
            restart_at_documents=recipe.data.restart_at_documents,
        )

    def carry_out(self, work: StageWork) -> Made:
        """Prepare the text, or find that it is there; errors as `data.prepare_data`."""
        from edgewright.data import prepare_data
        from edgewright.stage_work import Made

        source = self.source(work.recipe, work.corpus.tokenizer_dir)
        folder = work.directory / FOLDER

        def say(line: str) -> None:
            work.say(f"{self.name}: {line}")

        work.world.main_first(lambda: prepare_data(source, folder, say=say))
        return Made(output=folder)
