"""APOLLO and APOLLO-Mini (arXiv 2412.05270): SGD-like memory, AdamW-level performance.

AdamW's element-wise learning rate is coarsened to one per channel (APOLLO) or per matrix (Mini), and that is estimated
in a random low-rank space, so that no moment of full size exists:

    R = G P^T                        P ~ N(0, 1/r), drawn again from the next seed every `update_proj_gap` steps
    D = Adam's direction of R        see `projected.py`
    s = |D_j| / (|R_j| + 1e-8)       for each channel j, or |D| / (|R| + 1e-8) of the matrix
    U = s * G, its norm growing by at most 1 % from step to step (Fira's limiter), times sqrt(scale)

An estimate in r of n dimensions is too small by sqrt(r / n); `scale` makes up for it. As in the public package it is
the *square* of the paper's alpha: 128 for Mini is a factor of 11.3.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from edgewright.optim.projected import Matrix, Params, ProjectedOptimizer, channel_norms, limit_growth
from edgewright.optim.projection import Group
from edgewright.optim.sharding import whole

EPS = 1e-8
"""Added to the norm that is divided by."""


class _GradientScaling(ProjectedOptimizer):
    """The gradient itself, scaled by what Adam does to its projection."""

    @abstractmethod
    def _norms(self, tensors: list[Tensor], batch: list[Matrix]) -> list[Tensor]:
        """What the scaling is a ratio of, of one tensor for each matrix; it broadcasts to the matrix's shape."""

    def _prepare(self, batch: list[Matrix]) -> None:
        """The factor between gradient and update, of all matrices."""
        group = batch[0].group
        alpha = math.sqrt(group["scale"])
        before, after = (alpha, 1.0) if group["scale_front"] else (1.0, alpha)
        factors = self._norms([matrix.direction for matrix in batch], batch)
        lows = self._norms([matrix.low for matrix in batch], batch)
        torch._foreach_add_(lows, EPS)
        torch._foreach_div_(factors, lows)
        torch._foreach_mul_(factors, before)
        if group["limiter"] is not None:
            gradients = self._norms([matrix.gradient for matrix in batch], batch)
            norms = list(torch._foreach_norm(torch._foreach_mul(gradients, factors)))
            limits = limit_growth(norms, [matrix.state for matrix in batch], group["limiter"])
            factors = [factor * limit for factor, limit in zip(factors, limits, strict=True)]
        torch._foreach_mul_(factors, [after * matrix.rate for matrix in batch])
        for matrix, factor in zip(batch, factors, strict=True):
            matrix.factor = factor

    def _update(self, matrix: Matrix, weight: Tensor) -> None:
        weight.addcmul_(matrix.gradient.to(weight.dtype), matrix.factor, value=-1)

    def _extra_bytes(self, shape: torch.Size, group: Group) -> int:
        return 0 if group["limiter"] is None else 4


class Apollo(_GradientScaling):
    """APOLLO: one learning rate per channel, estimated at rank r.

    Memory of the state: 2 r values per channel, where AdamW has 2 n. No gradient clipping is needed beside it.

    Args:
        params: tensors, (name, tensor) pairs, or groups; see `ProjectedOptimizer` for which of them are projected.
        lr: learning rate; the paper's is 0.01 for models of every size.
        rank: of the projection, or, if a fraction, as a share of the smaller side. The paper's is a quarter.
        update_proj_gap: steps between two projections.
        scale: square of the factor on the update. 1 up to 350M parameters; the paper's 1B has 1/4.
        proj: a random projection, or the leading singular vectors (the paper's ablation), which have to be stored.
        scale_front: multiply by the scale before the limiter, as the paper's Mini does for small models.
        limiter: largest growth of the update's norm in a step; None: no limit.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, after the step.
        states: how moments are stored.
        seed: added to the seeds of all projections.
        keep_projections: keep projections in memory between refreshes (r times the smaller side, per matrix); otherwise
            they are drawn on the host in every step, which is slow unless the rank is tiny.

    Raises:
        RecipeError: EW-741, a rank larger than a matrix of its group.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        rank: int | float | None = 0.25,
        *,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj: Literal["random", "svd"] = "random",
        scale_front: bool = False,
        limiter: float | None = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        states: Literal["fp32", "bf16", "int8"] = "fp32",
        seed: int = 0,
        keep_projections: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj": proj,
            "scale_front": scale_front,
            "limiter": limiter,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "states": states,
        }
        super().__init__(params, defaults, seed=seed, keep_projections=keep_projections)

    def _norms(self, tensors: list[Tensor], batch: list[Matrix]) -> list[Tensor]:
        return [
            channel_norms(tensor, matrix.parameter.shape, matrix.low.dtype)
            for tensor, matrix in zip(tensors, batch, strict=True)
        ]


class ApolloMini(_GradientScaling):
    """APOLLO-Mini: one learning rate per matrix, estimated at rank 1, so that a matrix has next to no state.

    Args:
        lr: the paper's is 0.01; 0.02 is better in its ablation.
        scale: 128, a factor of 11.3: rank 1 underestimates by the root of the smaller side.
        others: see `Apollo`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        rank: int | float | None = 1,
        *,
        update_proj_gap: int = 200,
        scale: float = 128.0,
        scale_front: bool = False,
        limiter: float | None = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        states: Literal["fp32", "bf16", "int8"] = "fp32",
        seed: int = 0,
        keep_projections: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj": "random",
            "scale_front": scale_front,
            "limiter": limiter,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "states": states,
        }
        super().__init__(params, defaults, seed=seed, keep_projections=keep_projections)

    def _norms(self, tensors: list[Tensor], batch: list[Matrix]) -> list[Tensor]:
        return [whole(norm) for norm in torch._foreach_norm(tensors, 2, batch[0].low.dtype)]
