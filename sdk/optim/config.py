"""What every optimizer section of a recipe has, and what the planner asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import nn


class OptimizerConfigBase(BaseModel, ABC):
    """The settings of an optimizer, by the name in its `type`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    chooses: ClassVar[bool] = False
    """Whether it treats some matrices of a model as others, so that there may be a model that it refuses."""
    type: str
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay, times the learning rate."""

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters of `model`, in the model's own order."""

    @abstractmethod
    def state_bytes(self, model: nn.Module) -> int:
        """Bytes of the optimizer's state after its first step: what a checkpoint holds, and memory must.

        Only shapes and types are read, so the model may be on meta.
        """

    def notes(self, device: str) -> tuple[str, ...]:
        """What somebody who trains with it on a device (`cpu`, `cuda`) should know."""
        return ()

    def kept_whole(self) -> str | None:
        """Why it cannot step weights that are cut up among processes (FSDP2); None: it can."""
        return "its step needs whole matrices"

    def kept_bytes(self, model: nn.Module) -> int:
        """Bytes kept between steps beside the state, which can be made again; the model may be on meta."""
        return 0

    def check(self, model: nn.Module) -> None:
        """Refuse a model that `build` would refuse; it may be on meta.

        Raises:
            RecipeError: what `build` raises.
        """
        self.state_bytes(model)
