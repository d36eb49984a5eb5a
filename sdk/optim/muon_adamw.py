"""torch's Muon and torch's AdamW as one optimizer, with one state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Muon for groups with `muon: True`, fused AdamW for the others.

    Args:
        params: groups, each with `muon`, whether it is of hidden matrices.
        lr: learning rate of both parts.
        momentum: of Muon.
        ns_steps: Newton-Schulz iterations of Muon.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, where a group says nothing else.

    Raises:
        ValueError: a group for Muon holds something that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        make: dict[bool, Callable[[Any], torch.optim.Optimizer]] = {
            True: partial(
                torch.optim.Muon, lr=lr, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
            ),
            False: partial(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, fused=True),
        }
        self._parts = {muon: make[muon](self._groups_of(muon)) for muon in make if self._groups_of(muon)}

    def _groups_of(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] is muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for muon, part in self._parts.items():
            part.state = self.state  # anew in every step: loading a state replaces both
            part.param_groups = self._groups_of(muon)
            part.step()
        return loss
