"""AdamW with moments in eight bits (Dettmers et al., 2110.02861): bitsandbytes' kernels, about 2.03 bytes a parameter.

Moments are stored in blocks of 256 values: a code a value, and the block's largest magnitude in float32. Parameters of
fewer than 4096 values keep them in float32. On a GPU the codes are in paged memory, which moves to the host when the
GPU is full. On a CPU it works, and is several times slower than float32: it saves memory there, and no time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edgewright.optim.config import OptimizerConfigBase

if TYPE_CHECKING:
    import torch
    from torch import nn


class AdamW8bitConfig(OptimizerConfigBase):
    """AdamW with decoupled weight decay on matrices and moments in eight bits."""

    type: Literal["adamw_8bit"] = "adamw_8bit"
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters of `model`; paged if they are on a GPU.

        Raises:
            RecipeError: EW-748, a parameter is of a type that the kernels do not know.
        """
        from edgewright.optim.blockwise_adamw import AdamW8bit

        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [(n, p) for n, p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [(n, p) for n, p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW8bit(
            [group for group in groups if group["params"]], lr=self.learning_rate, betas=self.betas, eps=self.eps
        )

    def state_bytes(self, model: nn.Module) -> int:
        """Two moments in eight bits, in float32 where they are small, and a step count."""
        from edgewright.optim.storage import Int8Storage

        sizes = [math.prod(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
        return sum(2 * Int8Storage(signed=True).nbytes(size) + 8 for size in sizes)

    def notes(self, device: str) -> tuple[str, ...]:
        """That it is slow on a CPU."""
        if device == "cpu":
            return ("adamw_8bit saves memory on a CPU, but takes several times the time of adamw's step",)
        return ()
