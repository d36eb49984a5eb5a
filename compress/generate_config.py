"""The stage of type `generate` in a recipe: what a teacher is to write, and how a later stage learns from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.compress.teacher_config import ModelTeacherConfig, RunningTeacherConfig
from edgewright.data.files import Pattern
from edgewright.paths import Name

if TYPE_CHECKING:
    from edgewright.stage_work import Made, StageWork


class PromptFilesConfig(BaseModel):
    """Prompts from files: every line of a .txt file, the text of every line of a .jsonl file; each once."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["files"] = "files"
    files: Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1)]
    """One pattern or several, as in `data`."""
    text_key: str = "prompt"
    """Key of the prompt in .jsonl files."""
    separator: str = Field(default="\n", min_length=1)
    """What stands between two prompts of a .txt file."""


class CorpusPromptsConfig(BaseModel):
    """Prompts from the training text: the first tokens of documents, spread evenly over them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["corpus"] = "corpus"
    prompts: int = Field(gt=0)
    """How many, at most one for each document."""
    tokens: int = Field(default=16, gt=0)
    """Tokens of each; shorter documents are passed over."""


class NoPromptsConfig(BaseModel):
    """Nothing but the start of a document: what the teacher writes by itself (arXiv 2509.14786, section 5)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["none"] = "none"
    documents: int = Field(gt=0)
    """How many to write at each temperature, before duplicates are dropped."""


PromptsConfig = Annotated[PromptFilesConfig | CorpusPromptsConfig | NoPromptsConfig, Field(discriminator="type")]


class GenerateStageConfig(BaseModel):
    """A teacher's own continuations, which later stages train on (sequence-level distillation, arXiv 1606.07947).

    What is written is a corpus: `stages/NAME/corpus/*.jsonl`, one document a line, which `data: {type: files}` of any
    other recipe reads as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["generate"] = "generate"
    name: Name
    """Later stages call it by this name."""
    teacher: RunningTeacherConfig
    prompts: PromptsConfig
    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(default=(1.0,), min_length=1)
    """Each prompt is continued at each of them; 0: greedy."""
    samples: int = Field(default=1, gt=0)
    """Continuations of a prompt at each temperature above 0."""
    max_new_tokens: int = Field(default=128, gt=0)
    """At most this many, fewer where the teacher ends the document."""
    per_device_batch_size: int = Field(default=16, gt=0)
    """Continuations that are written at once."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of the draws; null: the recipe's."""

    @model_validator(mode="after")
    def _different(self) -> GenerateStageConfig:
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("every temperature once; `samples` asks for several continuations at each")
        if isinstance(self.prompts, NoPromptsConfig) and 0 in self.temperatures:
            raise ValueError("without prompts a greedy teacher writes one and the same text; leave temperature 0 out")
        return self

    @property
    def teachers(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that run in this stage."""
        return self.teacher.models()

    def carry_out(self, work: StageWork) -> Made:
        """See `generate_corpus`."""
        from edgewright.compress.generate import generate_corpus

        return generate_corpus(self, work)


class GeneratedTextConfig(BaseModel):
    """Text that an earlier stage of type `generate` wrote, or one of type `text` read, mixed into the training data."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: str
    """Name of the earlier stage."""
    share: float = Field(gt=0, le=1)
    """Of the sequences of every batch; the rest is the recipe's own data."""
