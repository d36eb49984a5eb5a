"""The stage of type `cache` in a recipe: which teacher's targets are kept, and in what form (`compress/cache.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.compress.teacher_config import ModelTeacherConfig, RunningTeacherConfig
from edgewright.paths import Name

if TYPE_CHECKING:
    from edgewright.stage_work import Made, StageWork


class SampledConfig(BaseModel):
    """Tokens drawn from the teacher, unbiased: random sampling (Sparse Logit Sampling, arXiv 2503.16870)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["sampled"] = "sampled"
    samples: int = Field(default=50, gt=0, le=255)
    """Draws for each token, with replacement; only the different ones take space."""


class TopKConfig(BaseModel):
    """The k most probable tokens and the mass of all the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["top_k"] = "top_k"
    k: int = Field(default=50, gt=0, le=4096)
    """Tokens kept; at most the vocabulary."""


class CacheStageConfig(BaseModel):
    """A teacher's targets for the whole training text, written once; student stages then need no teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["cache"] = "cache"
    name: Name
    """Later stages call it by this name."""
    teacher: RunningTeacherConfig
    targets: Annotated[SampledConfig | TopKConfig, Field(discriminator="type")] = SampledConfig()
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What the teacher's logits are divided by; a student that learns from the cache has the same."""
    per_device_batch_size: int = Field(default=8, gt=0)
    """Sequences that the teacher reads at once."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type of the teacher's output head. auto: bf16 where the hardware multiplies it natively."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of the draws; null: the recipe's."""

    @property
    def teachers(self) -> tuple[ModelTeacherConfig, ...]:
        """The models that run in this stage."""
        return self.teacher.models()

    def carry_out(self, work: StageWork) -> Made:
        """See `make_cache`."""
        from edgewright.compress.cache_stage import make_cache

        return make_cache(self, work)
