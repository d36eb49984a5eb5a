"""Every loss of a next token once: its plain form, its settings in a recipe, and targets that it accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from edgewright.compress import losses
from edgewright.compress.loss_config import LossConfig, TokenLossConfig
from edgewright.compress.targets import Logits, Sampled, Targets, TopK

CONFIG: TypeAdapter[Any] = TypeAdapter(LossConfig)


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    settings: dict[str, float] = field(default_factory=dict)
    kept: Callable[[Tensor, float], Targets] | None = None
    """Sparse targets of a teacher's logits at a temperature; None: the loss takes the logits."""

    def config(self, **more: object) -> TokenLossConfig:
        found: TokenLossConfig = CONFIG.validate_python({"function": self.name, **self.settings, **more})
        return found

    def targets(self, logits: Tensor, temperature: float) -> Targets:
        return Logits(logits) if self.kept is None else self.kept(logits, temperature)

    def plain(self, student: Tensor, teacher: Targets, temperature: float) -> Tensor:
        given = teacher.values if isinstance(teacher, Logits) else teacher
        found: Tensor = getattr(losses, self.name)(student, given, temperature=temperature, **self.settings)
        return found

    def held(self, student: Tensor, teacher: Targets, temperature: float) -> Callable[[Tensor], Tensor]:
        """The plain form, with what carries no gradient held at its value for `student`."""
        if self.name != "lk_hybrid":
            return lambda z: self.plain(z, teacher, temperature)
        assert isinstance(teacher, Logits)
        log_t = (teacher.values / temperature).log_softmax(-1)

        def variation(z: Tensor) -> Tensor:
            return 0.5 * ((z / temperature).softmax(-1) - log_t.exp()).abs().sum(-1)

        share = torch.exp(-self.settings["decay"] * (1 - variation(student)))

        def value(z: Tensor) -> Tensor:
            divergence = (log_t.exp() * (log_t - (z / temperature).log_softmax(-1))).sum(-1)
            return temperature**2 * (share * divergence + (1 - share) * variation(z)).mean()

        return value


def _drawn(logits: Tensor, temperature: float) -> Sampled:
    return Sampled.of(
        logits, 7, temperature=temperature, proposal_power=0.9, generator=torch.Generator().manual_seed(5)
    )


CASES = [
    Case("forward_kl"),
    Case("reverse_kl"),
    Case("jsd", {"beta": 0.3}),
    Case("jsd", {"beta": 0.5}),
    Case("skew_forward_kl", {"alpha": 0.0}),
    Case("skew_forward_kl", {"alpha": 0.2}),
    Case("skew_reverse_kl", {"alpha": 0.0}),
    Case("skew_reverse_kl", {"alpha": 0.2}),
    Case("total_variation"),
    Case("lk_hybrid", {"decay": 3.0}),
    Case("uld"),
    Case("top_k", kept=lambda logits, temperature: TopK.of(logits, 4, temperature=temperature)),
    Case("rs_kd", kept=_drawn),
]
IDS = ["-".join([case.name, *(f"{value:g}" for value in case.settings.values())]) for case in CASES]
DENSE = [case for case in CASES if case.kept is None and case.name != "uld"]
"""They compare the tokens that both have."""


def logits(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random ones."""
    return 1.5 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central finite differences of a scalar function, in float64."""
    assert at.dtype == torch.float64
    found = torch.empty_like(at)
    for index in range(at.numel()):
        sides = []
        for sign in (1.0, -1.0):
            moved = at.detach().clone()
            moved.view(-1)[index] += sign * step
            sides.append(float(function(moved)))
        found.view(-1)[index] = (sides[0] - sides[1]) / (2 * step)
    return found
