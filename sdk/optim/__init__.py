"""Optimizers: plain `torch.optim.Optimizer`s that need nothing of the rest. Nothing is imported until it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgewright.optim.apollo import Apollo as Apollo
    from edgewright.optim.apollo import ApolloMini as ApolloMini
    from edgewright.optim.fira import Fira as Fira
    from edgewright.optim.galore import GaLore as GaLore
    from edgewright.optim.gradnorm_lorp import GradNormLoRP as GradNormLoRP
    from edgewright.optim.q_galore import QGaLore as QGaLore

_HOMES = {
    "Apollo": "apollo",
    "ApolloMini": "apollo",
    "Fira": "fira",
    "GaLore": "galore",
    "GradNormLoRP": "gradnorm_lorp",
    "QGaLore": "q_galore",
}
__all__ = ["Apollo", "ApolloMini", "Fira", "GaLore", "GradNormLoRP", "QGaLore"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"edgewright.optim.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'edgewright.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
