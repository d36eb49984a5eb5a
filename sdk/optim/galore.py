"""GaLore (arXiv 2403.03507): Adam in the leading singular subspace of the gradient.

    R = project(G)                  P: leading singular vectors of G, taken anew every `update_proj_gap` steps
    D = Adam's direction of R       see `projected.py`; moments go on as they are when the subspace changes
    U = scale * project_back(D)

The update has rank r. The decomposition is exact (LAPACK, or cuSOLVER on a GPU), and costs far more than a step: with
a gap of T, 1 / T of it a step.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from edgewright.optim.projected import Matrix, Params, ProjectedOptimizer
from edgewright.optim.projection import add_projected_back


class GaLore(ProjectedOptimizer):
    """GaLore. The state of an m x n matrix (m the larger side) is 2 m r values and the n r of the projection.

    Args:
        params: tensors, (name, tensor) pairs, or groups; see `ProjectedOptimizer` for which of them are projected.
        lr: learning rate; the paper's is 0.01.
        rank: of the projection, or, if a fraction, as a share of the smaller side. The paper's is a quarter.
        update_proj_gap: steps between two decompositions.
        scale: the paper's alpha, on the projected matrices alone.
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "states": states,
        }
        super().__init__(params, defaults)

    def _update(self, matrix: Matrix, weight: Tensor) -> None:
        factor = -matrix.rate * matrix.group["scale"]
        add_projected_back(weight, matrix.direction, matrix.projection, factor)
