"""bitsandbytes' 8-bit AdamW with a state of tensors alone, so that it is saved and restored bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgewright.errors import RecipeError
from edgewright.imports import importing_bitsandbytes
from edgewright.optim.projected import Params
from edgewright.optim.state import ResettableOptimizer
from edgewright.optim.storage import Int8Storage, code_book

with importing_bitsandbytes():
    import bitsandbytes.optim

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels update."""
PAGED_FROM = 100_000
"""Values of a parameter from which bitsandbytes pages its codes."""
MOMENTS = {"state1": True, "state2": False}
"""The codes of both moments, and whether those can be negative."""


class AdamW8bit(bitsandbytes.optim.AdamW8bit, ResettableOptimizer):
    """`bitsandbytes.optim.AdamW8bit`, paged where the parameters are on a GPU. It computes what that computes.

    The state of a parameter is `step`, `state1` and `state2` (codes, or float32 below 4096 values) and `absmax1` and
    `absmax2` (float32, one a block of 256). bitsandbytes keeps a code book in the state of every parameter as well, and
    the step as a Python number; here both are put there for the time of a step.

    Raises:
        RecipeError: EW-748, a parameter is of a type that the kernels do not know.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            _check_types(group)
        self.is_paged = any(p.is_cuda for group in self.param_groups for p in group["params"])
        self._pages: dict[str, dict[Tensor, Tensor]] = {key: {} for key in MOMENTS}

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Moments of zeros."""
        super().init_state(group, p, gindex, pindex)
        state = self.state[p]
        for key in ("qmap1", "qmap2"):
            state.pop(key, None)
        state["step"] = torch.tensor(0)

    def prefetch_state(self, p: Tensor) -> None:
        """Bring paged codes to the GPU; those that were restored are ordinary tensors, and are paged first.

        bitsandbytes never frees a page, so one that was made for a parameter is used again.
        """
        state = self.state[p]
        if self.is_paged and p.numel() >= PAGED_FROM:
            for key, pages in self._pages.items():
                if state[key].is_cuda:
                    if p not in pages:
                        pages[p] = self.get_state_buffer(p, dtype=state[key].dtype)
                    state[key] = pages[p].copy_(state[key])
        super().prefetch_state(p)

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """One step of one parameter."""
        state = self.state[p]
        step = int(state["step"])
        self.state[p] = {
            **state,
            "step": step,
            "qmap1": code_book(True, p.device),
            "qmap2": code_book(False, p.device),
        }
        super().update_step(group, p, gindex, pindex)
        state["step"] = torch.tensor(step + 1)
        self.state[p] = state

    def reset_state(self, parameter: Tensor, mask: Tensor | None) -> None:
        """Forget the moments where `mask` (the parameter's shape, bool) is true; with None all, the step too."""
        if mask is None:
            self.state.pop(parameter, None)
            return
        for key, signed in MOMENTS.items():
            Int8Storage(signed=signed).zero(self.state[parameter], key, mask)


def _check_types(group: dict[str, Any]) -> None:
    names = group.get("param_names", [f"parameter {number}" for number in range(len(group["params"]))])
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.dtype not in TYPES:
            raise RecipeError(
                "EW-748",
                "8-bit states cannot serve a parameter of this type",
                where=name,
                expected=" | ".join(str(dtype).removeprefix("torch.") for dtype in TYPES),
                found=str(parameter.dtype).removeprefix("torch."),
                fix="optimizer: {type: adamw}",
            )
