"""LOST: a low-rank branch and a few input columns of full rank beside it (arXiv 2508.02668)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from edgewright.compress.density import whole
from edgewright.compress.factor_method import FactorChoice, FactorMethod
from edgewright.compress.rank import FACTORS
from edgewright.compress.restarts import restart
from edgewright.method import MethodReport, StepContext

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.factors import FactoredLinear
    from edgewright.export.lattice import LatticeTensor


class LostConfig(FactorChoice):
    """Low rank plus column-sparse, from one SVD (arXiv 2508.02668): y = gamma B act(A x) + (1 - gamma) W0[:, I] x[I].

    Where the factors have the full rank nothing remains to rank the columns by, and they go by their norms in W0.
    """

    type: Literal["lost"] = "lost"
    columns: float = Field(default=0.05, gt=0, le=1)
    """rho, the share of input columns in the sparse branch; 0.01 to 0.05 by the authors."""
    gamma: float = Field(default=0.7, gt=0, lt=1)
    """Weight of the low-rank branch, fixed."""
    activation: Literal["none", "silu"] = "silu"
    """Between the factors; the finished model keeps them. Without it the layers merge into plain matrices."""
    score_rank: int = Field(default=256, gt=0)
    """How many singular values after the first r rank the columns."""
    merge: bool = True
    """Whether, without an activation, the finished model has everything multiplied out; false keeps both branches."""

    @model_validator(mode="after")
    def _fits_together(self) -> LostConfig:
        if self.activation != "none" and self.restart_every is not None and self.refactor:
            raise ValueError("an activation between the factors cannot be refactored: set refactor to false")
        return self

    def build(self) -> Lost:
        return Lost(self)

    @property
    def keeps_factors(self) -> bool:
        return not self.merge or self.activation != "none"

    def finished(self) -> str:
        return FACTORS if self.keeps_factors else super().finished()


class Lost(FactorMethod["LostConfig", "FactoredLinear"]):
    """Replaces linear layers, but the head and the excluded ones, by two branches.

    From the SVD of the initial W0 the first r directions make the factors (balanced). The next `score_rank` make a
    remainder Wc = sum S_i u_i v_i^T; the floor(rho in) columns (at least 1) where it is largest, by
    ||Wc[:, j]|| = ||S_i V_ij||, are chosen for good, and trained from W0's own values. Where we differ from the public
    code: it ranks the columns by what remains of B A, a matrix of rank r, after its first r directions, which is
    rounding noise, and one of its settings drops both the SVD and the activation. Here W0 is the true one.
    """

    type = "lost"
    saves = "parameters, gradients, moments and operations, r (in + out) + rho in out for in * out; the file as well"

    def replacement(self, linear: nn.Linear, rank: int) -> FactoredLinear:
        import torch

        from edgewright.compress.factors import FactoredLinear, split

        count = max(1, whole(self.config.columns, linear.in_features))
        with torch.no_grad():
            parts = split(linear.weight, rank, columns=count, score_rank=self.config.score_rank)
            columns = linear.weight.index_select(1, parts.index)
        return FactoredLinear(
            parts.factors,
            bias=linear.bias,
            activation=self.config.activation,
            columns=columns,
            index=parts.index,
            mix=self.config.gamma,
            method=self.type,
        )

    def after_step(self, ctx: StepContext) -> None:
        """A restart, where the recipe asks for them."""
        restart(self.config, ctx, self._layers.values())

    def state_dict(self) -> dict[str, Any]:
        """The chosen columns of each layer."""
        return {name: layer.index for name, layer in self._layers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, layer in self._layers.items():
            layer.index.copy_(state[name])

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with both branches, or with plain linear layers where that is possible and asked for."""
        from edgewright.compress.layers import merged, submodules

        finished = copy.deepcopy(model)
        if not self.config.keeps_factors:
            for name, layer in submodules(finished, self._layers).items():
                finished.set_submodule(name, merged(layer))
        return finished, {}

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """As every method with factors, and the columns chosen."""
        from edgewright.compress.layers import submodules

        report = super().describe(model)
        columns = sum(len(layer.index) for layer in submodules(model, self._layers).values())
        return replace(report, numbers={**report.numbers, "columns": float(columns)})
