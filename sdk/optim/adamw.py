"""AdamW (Loshchilov and Hutter, 1711.05101), torch's fused implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import nn


class AdamWConfig(BaseModel):
    """AdamW with decoupled weight decay on matrices; vectors (norms, biases) are not decayed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay, times the learning rate."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters of `model`, in the model's own order."""
        import torch

        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)
