"""How the gradients of a global batch become a step of the optimizer: all at once, or one by one inside the backward.

An `Update` is used as `begin`, `backward` for every micro-batch, `norm`, and if all is finite `apply`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.gradient_release import GradientRelease
from edgewright.offload import OffloadedState
from edgewright.optim.state import reset_all_state, reset_state, restore_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from edgewright.world import Replica


class Update(ABC):
    """Steps an optimizer, whose state may rest in host memory.

    Args:
        model: all of its parameters that require gradients are the optimizer's.
        offload: keep the optimizer's state in host memory.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: PreTrainedModel, *, offload: bool) -> None:
        self.model = model
        self.optimizer = optimizer
        self.offloaded = OffloadedState(optimizer, pin=torch.cuda.is_available()) if offload else None
        self.step: Callable[[], Any] = optimizer.step if self.offloaded is None else self.offloaded.step

    def begin(self, learning_rate: float) -> None:
        """Before the first backward of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""

    @abstractmethod
    def norm(self, replica: Replica) -> float:
        """2-norm of the whole gradient, after the last backward; it is clipped now where it is to be."""

    @abstractmethod
    def apply(self) -> None:
        """Finish the step, and free the gradients."""

    def abandon(self) -> None:
        """Free the gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def restore(self, tensors: dict[str, Tensor], replica: Replica) -> None:
        """Put the optimizer's state back, see `restore_state`."""
        place = replica.place if self.offloaded is None else self.offloaded.place
        restore_state(self.optimizer, self.model, tensors, place)

    def reset(self, parameter: nn.Parameter, mask: Tensor | None) -> None:
        """What `StepContext.reset_state` does."""
        with self._fetched(parameter):
            reset_state(self.optimizer, parameter, mask)

    def reset_all(self) -> None:
        """What `StepContext.reset_all_state` does."""
        reset_all_state(self.optimizer)

    def _fetched(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        return nullcontext() if self.offloaded is None else self.offloaded.fetched(parameter)


class WholeUpdate(Update):
    """The ordinary step: all gradients, then their norm, then all parameters.

    Args:
        max_grad_norm: clip to this; None: no clipping.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: PreTrainedModel,
        *,
        offload: bool = False,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__(optimizer, model, offload=offload)
        self.limit = math.inf if max_grad_norm is None else max_grad_norm

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def norm(self, replica: Replica) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        return float(replica.whole(nn.utils.clip_grad_norm_(parameters, self.limit, foreach=True)))

    def apply(self) -> None:
        self.step()
        self.abandon()


class ReleasedUpdate(Update):
    """Steps inside the backward pass, see `gradient_release`; one micro-batch to a step, and no clipping."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: PreTrainedModel, *, offload: bool = False) -> None:
        super().__init__(optimizer, model, offload=offload)
        owned = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self._release = GradientRelease(owned, self.step)

    def begin(self, learning_rate: float) -> None:
        super().begin(learning_rate)
        self._release.begin()

    def backward(self, loss: Tensor) -> None:
        """A loss that is not finite is left alone: it is found out afterwards, and nothing has been stepped."""
        if math.isfinite(float(loss.detach())):
            loss.backward()

    def norm(self, replica: Replica) -> float:
        return self._release.norm()

    def apply(self) -> None:
        """All is done."""
