"""Projections of a gradient to a low rank: which side is compressed, and with what matrix.

A gradient G [m, n] is compressed along its smaller side. Where m >= n that is the right one: P is [r, n], the low-rank
gradient R = G P^T is [m, r]. Otherwise P is [m, r] and R = P^T G is [r, n]. The channels, which stay apart, lie along
the larger side: rows where the right side is compressed, columns where the left one is.

The side follows from the shape of the weight alone. (The public packages take it from the shape of R when they project
back, which is wrong as soon as r exceeds the smaller side of R.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from edgewright.optim.sharding import replicated, summed

State = dict[str, Tensor]
"""Of one parameter: tensors alone, so that they can be saved as they are."""
Group = dict[str, Any]
"""Of parameters, with their options, as torch keeps it."""

SEED_DRAWS = 15
"""The next seed is the last of so many draws, as in apollo-torch."""


def compresses_right(shape: torch.Size) -> bool:
    """Whether the columns are compressed; otherwise the rows are."""
    return shape[0] >= shape[1]


def rank_of(rank: int | float, shape: torch.Size) -> int:
    """The rank in numbers: as it is, or that fraction of the smaller side, but 1 at least."""
    return rank if isinstance(rank, int) else max(1, round(rank * min(shape)))


def projected_shape(shape: torch.Size, rank: int | float) -> tuple[int, int]:
    """Of the low-rank gradient."""
    r = rank_of(rank, shape)
    return (shape[0], r) if compresses_right(shape) else (r, shape[1])


def projection_shape(shape: torch.Size, rank: int | float) -> tuple[int, int]:
    """Of the projection P."""
    r = rank_of(rank, shape)
    return (r, shape[1]) if compresses_right(shape) else (shape[0], r)


def project(gradient: Tensor, projection: Tensor) -> Tensor:
    """R, [m, r] or [r, n], of the gradient [m, n]."""
    if compresses_right(gradient.shape):
        return gradient @ projection.T
    return summed(projection.T @ gradient)


def project_back(low: Tensor, projection: Tensor, shape: torch.Size) -> Tensor:
    """[m, n] of R."""
    return low @ projection if compresses_right(shape) else projection @ low


def add_projected_back(target: Tensor, low: Tensor, projection: Tensor, factor: float) -> None:
    """`target` [m, n] += factor * (R back in the full space), without a tensor of that size besides."""
    projection = projection.to(target.dtype)
    left, right = (low, projection) if compresses_right(target.shape) else (projection, low)
    target.addmm_(left, right, alpha=factor)


def random_projection(shape: torch.Size, rank: int | float, seed: int) -> Tensor:
    """P with entries from N(0, 1/r), float32 on the CPU: the same numbers whatever device the gradient is on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(projection_shape(shape, rank), generator=generator).div_(math.sqrt(rank_of(rank, shape)))


def next_seed(seed: int) -> int:
    """The seed of the projection after this one's."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, torch.iinfo(torch.int64).max, (SEED_DRAWS,), generator=generator)[-1])


def svd_projection(gradient: Tensor, rank: int | float) -> Tensor:
    """P of the leading singular vectors of the gradient, float32 (or float64), with P P^T = 1."""
    matrix = gradient if gradient.dtype == torch.float64 else gradient.float()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    r = rank_of(rank, gradient.shape)
    return right[:r].contiguous() if compresses_right(gradient.shape) else left[:, :r].contiguous()


class Projector(ABC):
    """Where the projection of a matrix comes from in each step. What must outlive a step is in the `state`."""

    @abstractmethod
    def projection(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> Tensor:
        """P for this step, in the gradient's type and place.

        Args:
            state: the parameter's own; without `step` when nothing was done yet.
            group: with `rank` and `update_proj_gap`.
        """

    @abstractmethod
    def nbytes(self, shape: torch.Size, group: Group) -> int:
        """Bytes that a matrix of that shape adds to the state."""

    def kept(self, shape: torch.Size, group: Group) -> int:
        """Values that a matrix of that shape keeps in memory beside the state."""
        return 0

    def forget(self, state: State) -> State:
        """What of the state stays when everything that was learned is reset."""
        return {}


def refresh_due(state: State, group: Group) -> bool:
    """Whether this step, counted from 0, begins a period of `update_proj_gap`."""
    return "step" not in state or int(state["step"]) % int(group["update_proj_gap"]) == 0


class RandomProjector(Projector):
    """Seeded random projections. The state holds a seed; the matrix is drawn again, or kept outside of the state.

    The first seed of a parameter is its number in the optimizer, from 1, so that projections are independent between
    parameters, and the same in every replica.

    Args:
        keep: keep each matrix between refreshes, which costs its size in memory, and drawing it in each step otherwise.
        first_seed: of a parameter.
    """

    def __init__(self, *, keep: bool, first_seed: Callable[[Tensor], int]) -> None:
        self.keep = keep
        self.first_seed = first_seed
        self._kept: dict[Tensor, tuple[int, Tensor]] = {}

    def projection(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> Tensor:
        if "seed" not in state:
            state["seed"] = torch.tensor(self.first_seed(parameter))
        elif "step" in state and refresh_due(state, group):
            state["seed"] = torch.tensor(next_seed(int(state["seed"])))
        seed = int(state["seed"])
        kept = self._kept.get(parameter)
        if kept is not None and kept[0] == seed:
            return kept[1]
        drawn = random_projection(gradient.shape, group["rank"], seed).to(gradient.dtype)
        placed = replicated(drawn, gradient)
        if self.keep:
            self._kept[parameter] = (seed, placed)
        return placed

    def nbytes(self, shape: torch.Size, group: Group) -> int:
        return 8

    def kept(self, shape: torch.Size, group: Group) -> int:
        return math.prod(projection_shape(shape, group["rank"])) if self.keep else 0

    def forget(self, state: State) -> State:
        """The seed moves on: a restart in the rhythm of the refresh would draw one matrix for ever."""
        return {"seed": torch.tensor(next_seed(int(state["seed"])))} if "seed" in state else {}


class SvdProjector(Projector):
    """The leading singular vectors of the gradient at the last refresh, kept in the state as `projection`.

    In float32, or in bfloat16 as soon as the moments are not in full precision either.
    """

    def projection(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> Tensor:
        if refresh_due(state, group):
            exact = svd_projection(gradient, group["rank"])
            state["projection"] = exact if group["states"] == "fp32" else exact.bfloat16()
        return replicated(state["projection"].to(gradient.dtype), gradient)

    def nbytes(self, shape: torch.Size, group: Group) -> int:
        return math.prod(projection_shape(shape, group["rank"])) * (4 if group["states"] == "fp32" else 2)


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Let float32 products on a GPU use TF32 inside the block: a random projection is an estimate anyway."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
