"""The optimizer's state in host memory: it is on the GPU for one parameter at a time, while that is stepped.

The host memory is pinned, so that the copies run at the full speed of the bus. They are not hidden behind the
arithmetic of the neighbouring parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from edgewright.optim.state import is_count


class OffloadedState:
    """Steps an optimizer whose state rests in host memory.

    Args:
        optimizer: its state holds tensors alone, and its `step` passes over parameters without a gradient.
        pin: whether the host memory is pinned, which needs a GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, pin: bool) -> None:
        self.optimizer = optimizer
        self.pin = pin

    def step(self) -> None:
        """Step every parameter that has a gradient, one after another, and free its gradient."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        gradients.reverse()
        for parameter in parameters:
            parameter.grad = gradients.pop()
            with self.fetched(parameter):
                self.optimizer.step()
            parameter.grad = None

    @contextmanager
    def fetched(self, parameter: Tensor) -> Iterator[None]:
        """Inside, the parameter's state is where the parameter is."""
        resting = dict(self.optimizer.state[parameter]) if parameter in self.optimizer.state else {}
        for key, value in resting.items():
            if not is_count(value):
                self.optimizer.state[parameter][key] = value.to(parameter.device, copy=True, non_blocking=True)
        try:
            yield
        finally:
            if parameter in self.optimizer.state:
                state = self.optimizer.state[parameter]
                for key, value in state.items():
                    state[key] = value if is_count(value) else self._rest(value, resting.get(key))

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A saved state tensor where it rests; for `restore_state`."""
        return self._rest(tensor, None)

    def _rest(self, tensor: Tensor, buffer: Tensor | None) -> Tensor:
        """The tensor in host memory, in its old place there if that still fits."""
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pin)
        return buffer.copy_(tensor.detach())
