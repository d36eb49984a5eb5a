"""AdamW (Loshchilov and Hutter, 1711.05101), torch's fused implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edgewright.optim.config import OptimizerConfigBase

if TYPE_CHECKING:
    import torch
    from torch import nn


class AdamWConfig(OptimizerConfigBase):
    """AdamW with decoupled weight decay on matrices; vectors (norms, biases) are not decayed."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

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

    def kept_whole(self) -> str | None:
        """Its step treats every number by itself."""
        return None

    def state_bytes(self, model: nn.Module) -> int:
        """Two moments of each parameter's own type, and a float32 step count."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return sum(2 * parameter.numel() * parameter.element_size() + 4 for parameter in trainable)
