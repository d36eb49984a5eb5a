"""Optimizer state by parameter name: to save it, restore it bit for bit, and let a method reset it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ResettableOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose state is not all moments of the parameters' own shapes, so that it resets it by itself."""

    @abstractmethod
    def reset_state(self, parameter: Tensor, mask: Tensor | None) -> None:
        """Zero the moments of a parameter where `mask` (its shape, bool) is true; with None all of it, its step too."""

    def reset_all_state(self) -> None:
        """Forget the state of every parameter."""
        for parameter in list(self.state):
            self.reset_state(parameter, None)


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """All state tensors as `{"exp_avg/model.layers.0...weight": tensor}`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def on_device(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a saved tensor on the device of its parameter."""
    return tensor.to(like.device, copy=True)


def restore_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: dict[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor] = on_device,
) -> None:
    """Put `named_state`'s tensors back.

    Args:
        place: makes of a saved tensor what is kept for its parameter (`world.Replica.place`).
    """
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        owner = parameters[name]
        state.setdefault(owner, {})[kind] = tensor.clone() if is_count(tensor) else place(tensor, owner)
    optimizer.state.clear()
    optimizer.state.update(state)


def is_count(tensor: Tensor) -> bool:
    """Whether it is a count or a seed, which is read on the host, and so stays there."""
    return tensor.ndim == 0 and not tensor.is_floating_point()


def reset_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, mask: Tensor | None) -> None:
    """Zero the moments of a parameter where `mask` (its shape, bool) is true; with None all of it, its step too."""
    if isinstance(optimizer, ResettableOptimizer):
        optimizer.reset_state(parameter, mask)
        return
    if mask is None:
        optimizer.state.pop(parameter, None)
        return
    for value in optimizer.state[parameter].values():
        if value.shape == parameter.shape:
            value.masked_fill_(mask, 0)


def reset_all_state(optimizer: torch.optim.Optimizer) -> None:
    """Forget the state of every parameter, step counts too."""
    if isinstance(optimizer, ResettableOptimizer):
        optimizer.reset_all_state()
    else:
        optimizer.state.clear()
