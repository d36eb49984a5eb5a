"""What a recipe says about teachers: a model, several of them, or a cache of what one said (`compress/teacher.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.paths import RecipePath
from edgewright.student import CheckpointStudentConfig, StageStudentConfig

if TYPE_CHECKING:
    from edgewright.compress.cache import CacheKey
    from edgewright.compress.targets import TargetSource
    from edgewright.compress.teacher import Ensemble, OnlineTeacher

TeacherWeights = Literal["fp32", "bf16", "int8", "nf4"]


class _OneModel(BaseModel):
    """What both ways to name a model have in common."""

    weights: TeacherWeights = "fp32"
    """What the teacher's weights are held in: int8 and nf4 (4 bits) through bitsandbytes, its linear layers but the
    output head; the rest is then bf16."""


class CheckpointTeacherConfig(CheckpointStudentConfig, _OneModel):
    """A local Hugging Face causal-LM directory; frozen, run beside the student."""

    def models(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that have to run."""
        return (self,)

    def directory(self, earlier: Mapping[str, Path]) -> Path:
        """Where the model is."""
        return self.model

    def build(self, earlier: Mapping[str, Path], key: CacheKey) -> OnlineTeacher:
        """The source of targets."""
        from edgewright.compress.teacher import OnlineTeacher

        return OnlineTeacher(self.directory(earlier), weights=self.weights)


class StageTeacherConfig(StageStudentConfig, _OneModel):
    """The result of an earlier stage of the same recipe; of a student of the same shape this is born-again training
    (arXiv 1805.04770)."""

    def models(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that have to run."""
        return (self,)

    def directory(self, earlier: Mapping[str, Path]) -> Path:
        """Where the model is."""
        return earlier[self.stage]

    def build(self, earlier: Mapping[str, Path], key: CacheKey) -> OnlineTeacher:
        """The source of targets."""
        from edgewright.compress.teacher import OnlineTeacher

        return OnlineTeacher(self.directory(earlier), weights=self.weights)


ModelTeacherConfig = Annotated[CheckpointTeacherConfig | StageTeacherConfig, Field(discriminator="type")]


class EnsembleTeacherConfig(BaseModel):
    """Several models of one tokenizer, whose logits are averaged before the softmax (arXiv 2509.14786)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["ensemble"] = "ensemble"
    members: tuple[ModelTeacherConfig, ...] = Field(min_length=2)
    resident: Literal["all", "one"] = "all"
    """all: every member stays in memory. one: a member is loaded when its turn comes, for every micro-batch again;
    their output heads stay."""

    def models(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that have to run."""
        return self.members

    def build(self, earlier: Mapping[str, Path], key: CacheKey) -> Ensemble:
        """The source of targets."""
        from edgewright.compress.teacher import Ensemble

        return Ensemble([member.build(earlier, key) for member in self.members], resident=self.resident)


class CachedTeacherConfig(BaseModel):
    """What a teacher said, from a stage of type `cache`; no teacher is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["cache"] = "cache"
    stage: str | None = None
    """Name of an earlier stage of type cache."""
    path: RecipePath | None = None
    """The folder of a cache that another run has made of the same data: RUN/stages/NAME/cache."""

    @model_validator(mode="after")
    def _one_of_both(self) -> CachedTeacherConfig:
        if (self.stage is None) == (self.path is None):
            raise ValueError("give exactly one of stage and path")
        return self

    def models(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that have to run: none."""
        return ()

    def folder(self, earlier: Mapping[str, Path]) -> Path:
        """Where the cache is."""
        if self.path is not None:
            return self.path
        assert self.stage is not None
        return earlier[self.stage]

    def build(self, earlier: Mapping[str, Path], key: CacheKey) -> TargetSource:
        """The source of targets."""
        from edgewright.compress.cache import open_cache

        return open_cache(self.folder(earlier), key)


RunningTeacherConfig = Annotated[
    CheckpointTeacherConfig | StageTeacherConfig | EnsembleTeacherConfig, Field(discriminator="type")
]
"""A teacher that runs, as the stages `cache` and `generate` need one."""
TeacherConfig = Annotated[
    CheckpointTeacherConfig | StageTeacherConfig | EnsembleTeacherConfig | CachedTeacherConfig,
    Field(discriminator="type"),
]
