"""Gradient release: each parameter is stepped inside the backward pass, as soon as its gradient is complete.

The gradient is freed at once, so that the gradients of a model never all exist (LOMO, arXiv 2306.09782, does this for
SGD; here for any optimizer, whose `step` passes over parameters without a gradient). A tied parameter's gradient is
complete after its last use, so the order of the steps is that of the backward pass, and the result is that of an
ordinary step without clipping; only what is drawn at random in a step (stochastic rounding) is drawn in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class GradientRelease:
    """Hooks on parameters; there from construction on.

    A step that meets something that is not finite leaves that parameter and all after it as they were, and its `norm`
    says so; what was stepped before it is for the caller to roll back.

    Args:
        parameters: all that the optimizer steps.
        step: steps every parameter that has a gradient; there is only one at a time.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], step: Callable[[], object]) -> None:
        self._step = step
        self._norms: list[float] = []
        self._finite = True
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._release)

    def begin(self) -> None:
        """Forget the last step."""
        self._norms = []
        self._finite = True

    def norm(self) -> float:
        """2-norm of all gradients since `begin`."""
        return float(torch.tensor(self._norms, dtype=torch.float64).square().sum().sqrt())

    def _release(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        self._norms.append(norm)
        self._finite = self._finite and math.isfinite(norm)
        if self._finite:
            self._step()
        parameter.grad = None
