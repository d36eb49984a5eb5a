"""Q-GaLore (arXiv 2407.08296): GaLore with its projection in four bits, taken anew only as often as it changes.

    R = project(G), D = Adam's direction of R, U = scale * project_back(D)          as in GaLore, see `galore.py`
    P in four bits: groups of 256, a scale and a zero point each, rounded to nearest
    every gap steps: P anew from the gradient's singular vectors; gap doubles for a matrix whose last five leading
    vectors were like those before them: mean |cos| >= 0.4

Moments are in eight bits by default. With `training.weights: int8` the weights are too, and this is the paper's recipe
(its weights in groups of 256, ours of 128). Where ours differs from the released code: it takes the cosine with its
sign, although that of a singular vector is arbitrary, so that half of the unchanged ones look opposite; it takes P anew
at multiples of the gap, so that a gap that has just doubled is cut short; and it needs rows in whole groups.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from edgewright.optim.int8_weight import quantize
from edgewright.optim.projected import Matrix, Params, ProjectedOptimizer
from edgewright.optim.projection import (
    Group,
    Projector,
    State,
    add_projected_back,
    compresses_right,
    projection_shape,
    svd_projection,
)

GROUP = 256
"""Values of a projection that share a scale and a zero point; the last group is filled up with zeros."""
LARGEST_CODE = 15


class QGaLore(ProjectedOptimizer):
    """Q-GaLore. The state of an m x n matrix (m the larger side) is 2 m r values and half a byte for each of n r.

    Args:
        params: tensors, (name, tensor) pairs, or groups; see `ProjectedOptimizer` for which of them are projected.
        lr: learning rate; the paper's is 0.015 for small models.
        rank: of the projection, or, if a fraction, as a share of the smaller side.
        update_proj_gap: steps between two decompositions, to begin with.
        scale: GaLore's alpha, on the projected matrices alone.
        cos_threshold: mean |cos| of leading vectors from which on the gap doubles.
        queue_size: refreshes that the mean is over.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, after the step.
        states: how moments are stored.

    Raises:
        RecipeError: EW-741, a rank larger than a matrix of its group.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.015,
        rank: int | float | None = 0.25,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        cos_threshold: float = 0.4,
        queue_size: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        states: Literal["fp32", "bf16", "int8"] = "int8",
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "cos_threshold": cos_threshold,
            "queue_size": queue_size,
            "proj": "lazy_svd",
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "states": states,
        }
        super().__init__(params, defaults)

    def _new_projectors(self) -> dict[str, Projector]:
        return {"lazy_svd": LazySvdProjector()}

    def _update(self, matrix: Matrix, weight: Tensor) -> None:
        factor = -matrix.rate * matrix.group["scale"]
        add_projected_back(weight, matrix.direction, matrix.projection, factor)


class LazySvdProjector(Projector):
    """The leading singular vectors at the last refresh, in four bits, and when the next one is due.

    In the state: `projection` (two codes a byte), `projection_scale`, `projection_zero`; `gap`, steps between two
    refreshes; `refreshed`, the step of the last one; `refreshes`, how many there were after the first; `likeness`
    [queue_size], the last |cos|.
    """

    def projection(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> Tensor:
        shape = projection_shape(gradient.shape, group["rank"])
        step = int(state.get("step", 0))
        if "projection" not in state:
            state["gap"] = torch.tensor(group["update_proj_gap"])
            state["refreshes"] = torch.tensor(0)
            state["likeness"] = torch.zeros(group["queue_size"])
            _keep(state, svd_projection(gradient, group["rank"]))
            state["refreshed"] = torch.tensor(step)
        elif step - int(state["refreshed"]) >= int(state["gap"]):
            before = _leading(_kept(state, shape), gradient.shape)
            _keep(state, svd_projection(gradient, group["rank"]))
            _note_likeness(state, before, _leading(_kept(state, shape), gradient.shape), group)
            state["refreshed"] = torch.tensor(step)
        return _kept(state, shape).to(gradient.dtype)

    def nbytes(self, shape: torch.Size, group: Group) -> int:
        groups = -(-math.prod(projection_shape(shape, group["rank"])) // GROUP)
        return groups * (GROUP // 2 + 4 + 1) + 3 * 8 + 4 * int(group["queue_size"])


def _keep(state: State, projection: Tensor) -> None:
    """Put a projection into the state, in four bits."""
    flat = projection.float().flatten()
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    codes, state["projection_scale"], state["projection_zero"] = quantize(
        groups, stochastic=False, largest=LARGEST_CODE
    )
    state["projection"] = codes[:, 0::2] | codes[:, 1::2] << 4


def _kept(state: State, shape: tuple[int, int]) -> Tensor:
    """The projection that the state holds, float32."""
    packed = state["projection"]
    codes = torch.stack([packed & LARGEST_CODE, packed >> 4], dim=2).view(-1, GROUP).float()
    values = codes.sub_(state["projection_zero"][:, None]).mul_(state["projection_scale"][:, None])
    return values.flatten()[: math.prod(shape)].view(shape)


def _leading(projection: Tensor, shape: torch.Size) -> Tensor:
    """The first singular vector in a projection of a gradient of that shape."""
    return projection[0] if compresses_right(shape) else projection[:, 0]


def _note_likeness(state: State, before: Tensor, now: Tensor, group: Group) -> None:
    """Remember how like the leading vector is to the one before, and double the gap where it hardly changes."""
    likeness = torch.nn.functional.cosine_similarity(before, now, dim=0).abs()
    state["likeness"] = torch.cat([state["likeness"][1:], likeness.to(state["likeness"].device)[None]])
    state["refreshes"] = state["refreshes"] + 1
    enough = int(state["refreshes"]) >= state["likeness"].numel()
    if enough and float(state["likeness"].mean()) >= group["cos_threshold"]:
        state["gap"] = state["gap"] * 2
