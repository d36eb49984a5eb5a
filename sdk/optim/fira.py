"""Fira (arXiv 2410.01623): GaLore, and what GaLore's subspace misses of the gradient, scaled as Adam scales the rest.

    R = project(G),  D = Adam's direction of R                      as in GaLore
    E = (G - project_back(R)) * |D_j| / (|R_j| + 1e-8)               for each channel j
    U = scale * (project_back(D) + E)                                E's norm growing by at most 1 % from step to step

That is the paper's form (its appendix A), in which the residual is orthogonal to the subspace, and at full rank
nothing. The released code multiplies by alpha when it projects back, so that it subtracts alpha * project_back(R) and
leaves E without alpha: `released=True`. The paper's numbers are that code's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from edgewright.optim.projected import Matrix, Params, ProjectedOptimizer, channel_norms, limit_growth
from edgewright.optim.projection import Group, add_projected_back

EPS = 1e-8
"""Added to the norm that is divided by."""


class Fira(ProjectedOptimizer):
    """Fira: updates of full rank with GaLore's state.

    Args:
        params: tensors, (name, tensor) pairs, or groups; see `ProjectedOptimizer` for which of them are projected.
        lr: learning rate; the paper's is 0.01.
        rank: of the projection, or, if a fraction, as a share of the smaller side. The paper's is a quarter.
        update_proj_gap: steps between two decompositions.
        scale: the paper's alpha: 0.25 for the smallest models to 0.0625 for 1B.
        released: compute the residual as the released code does.
        limiter: largest growth of the residual's norm in a step; None: no limit.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, after the step.
        states: how moments are stored; the projection is in bfloat16 unless they are in float32.

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
        scale: float = 0.25,
        released: bool = False,
        limiter: float | None = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        states: Literal["fp32", "bf16", "int8"] = "fp32",
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj": "svd",
            "released": released,
            "limiter": limiter,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "states": states,
        }
        super().__init__(params, defaults)

    def _update(self, matrix: Matrix, weight: Tensor) -> None:
        group, shape = matrix.group, weight.shape
        alpha = group["scale"]
        taken, given = (alpha, 1.0) if group["released"] else (1.0, alpha)
        residual = matrix.gradient.to(weight.dtype, copy=True)
        add_projected_back(residual, matrix.low, matrix.projection, -taken)
        residual *= channel_norms(matrix.direction, shape) / (channel_norms(matrix.low, shape) + EPS)
        if group["limiter"] is not None:
            (limit,) = limit_growth([torch.linalg.vector_norm(residual)], [matrix.state], group["limiter"])
            residual *= limit
        weight.add_(residual, alpha=-matrix.rate * given)
        add_projected_back(weight, matrix.direction, matrix.projection, -matrix.rate * alpha)

    def _extra_bytes(self, shape: torch.Size, group: Group) -> int:
        return 0 if group["limiter"] is None else 4
