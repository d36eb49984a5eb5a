"""GradNormLoRP (arXiv 2412.19616): weight normalisation, with GaLore on the direction and Adam on the magnitude.

    W = g * v / |v|                          for each row: magnitude g, direction v [n]
    dg = sum_row(G * v / |v|)                the chain rule; `weight_norm_gradients`
    dv = (g / |v|) * (G - dg * v / |v|)      tangent: <dv, v> = 0 in each row
    g -= Adam's step of dg,  v -= GaLore's step of dv,  W = g * v / |v|

So the paper's text; the released optimizers do otherwise (one never writes the weight, the other leaves out the tangent
projection and forgets g's step), and the published numbers cannot be had from them.

The direction needs no copy of the weight: v / |v| is W / g, so that the state keeps g's sign with it, |v|, and
GaLore's moments and projection. Its size is taken from W in each step, which may have been decayed or masked in
between. A row of zeros has no direction, and stays as it is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from edgewright.optim.projected import Matrix, Params, ProjectedOptimizer
from edgewright.optim.projection import Group, State, add_projected_back
from edgewright.optim.sharding import matching
from edgewright.optim.weights import readable

TINY = 1e-30
"""Smallest norm of a row that has a direction."""


class GradNormLoRP(ProjectedOptimizer):
    """GradNormLoRP, as the paper defines it.

    Args:
        params: tensors, (name, tensor) pairs, or groups; see `ProjectedOptimizer` for which of them are projected.
        lr: learning rate, of magnitudes and directions; the paper's is 0.01.
        rank: of the projection, or, if a fraction, as a share of the smaller side. Half of it as in the authors'
            script for 60M parameters; their README has a quarter, which keeps half of the moments and, from scratch,
            is 8 % behind in perplexity (benchmarks/RESULTS.md).
        update_proj_gap: steps between two decompositions.
        scale: on the direction's step.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, after the step: it shrinks the magnitudes.
        states: how the direction's moments are stored; the projection is in bfloat16 unless they are in float32.

    Raises:
        RecipeError: EW-741, a rank larger than a matrix of its group.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        rank: int | float | None = 0.5,
        *,
        update_proj_gap: int = 250,
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

    def _gradient(self, parameter: Tensor, group: Group) -> Tensor:
        """dv."""
        assert parameter.grad is not None
        weight = readable(parameter)
        magnitude, length = _polar(weight, self.state[parameter])
        unit = _unit(weight, magnitude)
        return weight_norm_gradients(parameter.grad.to(weight.dtype), magnitude, unit, length)[1]

    def _update(self, matrix: Matrix, weight: Tensor) -> None:
        group, state = matrix.group, matrix.state
        assert matrix.parameter.grad is not None
        magnitude, length = _polar(weight, state)
        unit = _unit(weight, magnitude)
        step = _magnitude_direction(_along(matrix.parameter.grad.to(weight.dtype), unit), state, group)
        moved = unit * length
        add_projected_back(moved, matrix.direction, matrix.projection, -matrix.rate * group["scale"])
        state["length"] = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        state["magnitude"] = torch.where(magnitude.abs() > TINY, magnitude - matrix.rate * step, 0)
        weight.copy_(_unit(moved, state["length"]).mul_(state["magnitude"]))

    def _extra_bytes(self, shape: torch.Size, group: Group) -> int:
        return 4 * 4 * shape[0]


def weight_norm_gradients(gradient: Tensor, magnitude: Tensor, unit: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of g and v in W = g * v / |v|, from that of W.

    Args:
        gradient: of W, [m, n].
        magnitude: g, [m, 1].
        unit: v / |v|, [m, n].
        length: |v|, [m, 1].

    Returns:
        dg [m, 1] and dv [m, n], which is orthogonal to v in each row.
    """
    along = _along(gradient, unit)
    return along, torch.addcmul(gradient, along, unit, value=-1).mul_(magnitude / length.clamp_min(TINY))


def _along(gradient: Tensor, unit: Tensor) -> Tensor:
    """dg: what of each row points along the direction."""
    return (gradient * unit).sum(dim=1, keepdim=True)


def _polar(weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """(g, |v|) of each row, [m, 1] both; at first v is W itself."""
    size = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    if "length" not in state:
        return size, size
    negative = matching(state["magnitude"], size) < 0
    return torch.where(negative, -size, size), matching(state["length"], size)


def _unit(rows: Tensor, length: Tensor) -> Tensor:
    """Rows over their length (or signed magnitude); zeros where that is nothing."""
    return rows / torch.where(length.abs() > TINY, length, math.inf)


def _magnitude_direction(gradient: Tensor, state: State, group: Group) -> Tensor:
    """Adam's direction for g, [m, 1], after its moments were updated."""
    beta1, beta2 = group["betas"]
    for key in ("magnitude_exp_avg", "magnitude_exp_avg_sq"):
        if key not in state:
            state[key] = torch.zeros_like(gradient)
        state[key] = matching(state[key], gradient)
    first = state["magnitude_exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["magnitude_exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return first / second.sqrt().add_(group["eps"])
