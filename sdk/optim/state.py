"""Optimizer state by parameter name: to save it, restore it bit for bit, and let a method reset it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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
        state.setdefault(owner, {})[kind] = place(tensor, owner)
    optimizer.state.clear()
    optimizer.state.update(state)


def reset_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, mask: Tensor | None) -> None:
    """Zero the moments of a parameter where `mask` (its shape, bool) is true; with None all of it, its step too."""
    if mask is None:
        optimizer.state.pop(parameter, None)
        return
    for value in optimizer.state[parameter].values():
        if value.shape == parameter.shape:
            value.masked_fill_(mask, 0)
