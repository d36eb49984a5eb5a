"""Tensors that are cut up among processes (FSDP2's DTensors), as optimizers see them.

Where there is a single process nothing of `torch.distributed.tensor` is loaded, and every function gives back what it
was handed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def as_distributed(tensor: Tensor) -> DTensor | None:
    """The tensor itself if it is cut up among processes, or a whole one of such a kind."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that is the same in every process, on the device of `like`, and whole on each where that is cut up."""
    cut = as_distributed(like)
    if cut is None:
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(tensor, DTensor):
        return summed(tensor)
    mesh = cut.device_mesh
    return DTensor.from_local(tensor.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)


def summed(tensor: Tensor) -> Tensor:
    """Whole in every process: put together, or added up where a product of matrices that are cut up is in parts."""
    cut = as_distributed(tensor)
    if cut is None:
        return tensor
    from torch.distributed.tensor import Replicate

    return cut.redistribute(placements=[Replicate()] * cut.device_mesh.ndim)


def matching(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape of `like` cut up as that is. A state that was read back is whole at first."""
    cut = as_distributed(like)
    if cut is None:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(tensor, DTensor):
        return distribute_tensor(tensor, cut.device_mesh, cut.placements, src_data_rank=None)
    return tensor if tensor.placements == cut.placements else tensor.redistribute(placements=cut.placements)


def whole(tensor: Tensor) -> Tensor:
    """As an ordinary tensor, the same in every process."""
    cut = as_distributed(tensor)
    return tensor if cut is None else cut.full_tensor()


def local(tensor: Tensor) -> Tensor:
    """This process's part, as an ordinary tensor that shares its memory."""
    cut = as_distributed(tensor)
    return tensor if cut is None else cut.to_local()


def as_part(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process made of its part of `like`, elementwise, as a part of a tensor of that shape."""
    cut = as_distributed(like)
    if cut is None:
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    )
