"""Muon (Jordan, 2024; Liu et al., arXiv 2502.16982): momentum, orthogonalised, for hidden matrices; AdamW for the rest.

    B = b B + (1 - b) G
    O = NewtonSchulz((1 - b) G + b B)             nearly U V^T of the singular value decomposition
    W -= lr * weight_decay * W
    W -= lr * 0.2 * sqrt(max(m, n)) * O

`torch.optim.Muon` and torch's fused AdamW do the work. Of torch's two ways to adjust the learning rate to a matrix's
shape this takes Moonshot's, with which an update is as large as AdamW's would be: so one learning rate, and one weight
decay, serve both parts. The state is one momentum a value of the hidden matrices, half of AdamW's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgewright.optim.config import OptimizerConfigBase

if TYPE_CHECKING:
    import torch
    from torch import nn


class MuonConfig(OptimizerConfigBase):
    """Muon for the matrices of attention and mlp, AdamW for all else."""

    type: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum of hidden matrices."""
    ns_steps: int = Field(default=5, gt=0, lt=100)
    """Newton-Schulz iterations."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's moments, for all else."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    roles: tuple[Literal["attention", "mlp"], ...] = Field(default=("attention", "mlp"), min_length=1)
    """Whose matrices Muon gets."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters of `model`.

        Raises:
            RecipeError: EW-742, the roles have no matrix.
        """
        from edgewright.optim.muon_adamw import Muon

        return Muon(
            self._groups(model),
            lr=self.learning_rate,
            momentum=self.momentum,
            ns_steps=self.ns_steps,
            betas=self.betas,
            eps=self.eps,
        )

    def state_bytes(self, model: nn.Module) -> int:
        """A momentum for hidden matrices; two moments and a float32 step count for each of the rest."""
        groups = self._groups(model)
        return sum(
            p.numel() * p.element_size() if group["muon"] else 2 * p.numel() * p.element_size() + 4
            for group in groups
            for _, p in group["params"]
        )

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        from edgewright.optim.groups import chosen_matrices

        hidden = chosen_matrices(model, roles=self.roles)
        rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in hidden]
        groups = [
            {"params": list(hidden.items()), "muon": True, "weight_decay": self.weight_decay},
            {"params": [(n, p) for n, p in rest if p.ndim >= 2], "muon": False, "weight_decay": self.weight_decay},
            {"params": [(n, p) for n, p in rest if p.ndim < 2], "muon": False, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]
