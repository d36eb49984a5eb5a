"""Optimizer state by parameter name: to save it, restore it bit for bit, and let a method reset it."""

from __future__ import annotations

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


def restore_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `named_state`'s tensors back."""
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        state.setdefault(parameters[name], {})[kind] = tensor.to(parameters[name].device, copy=True)
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
