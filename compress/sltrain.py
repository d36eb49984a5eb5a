"""SLTrain: a low-rank part and a fixed random sparse part of one weight (arXiv 2406.02214)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgewright.compress.factor_method import FactorChoice, FactorMethod
from edgewright.compress.restarts import restart
from edgewright.method import MethodReport, StepContext

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.sparse_lowrank import SparseLowRankLinear
    from edgewright.export.lattice import LatticeTensor


class SLTrainConfig(FactorChoice):
    """W = (alpha / r) B A + S, S on a random support that stays: few parameters in memory (arXiv 2406.02214)."""

    type: Literal["sltrain"] = "sltrain"
    density: float = Field(default=0.03, gt=0, le=1)
    """Share of each matrix that S holds; floor(density in out) entries, exactly."""
    alpha: float = Field(default=16.0, gt=0)
    """The product counts alpha / r; the paper's are 32 to 8 for ranks of 128 to 1024."""
    init: Literal["random", "spectral"] = "random"
    """random: the paper's, whatever weights are there; spectral: their best approximation, and S what it lacks."""

    @property
    def starts_anew(self) -> bool:
        return self.init == "random"

    def build(self) -> SLTrain:
        return SLTrain(self)


class SLTrain(FactorMethod["SLTrainConfig", "SparseLowRankLinear"]):
    """Replaces linear layers, but the head and the excluded ones, by ones that build W anew in every forward.

    Random init: A Kaiming-uniform, B = 0, the values of S uniform in +-1/sqrt(in). It saves memory (parameters,
    gradients, moments) and no operations: the whole W is built for the forward, again for the backward, and its
    gradient is there for a moment, layer by layer. Where we differ from the released code: indices are int32 (4 bytes
    an entry, not 8), and nothing is drawn per process. The finished model has plain linear layers.
    """

    type = "sltrain"
    saves = "parameters, gradients and moments, r (in + out) + density in out for in * out; no operations"

    def replacement(self, linear: nn.Linear, rank: int) -> SparseLowRankLinear:
        from edgewright.compress.sparse_lowrank import SparseLowRankLinear

        layer = SparseLowRankLinear(linear, rank=rank, scale=self.config.alpha / rank, density=self.config.density)
        if self.config.init == "spectral":
            layer.approximate(linear.weight)
        return layer

    def after_step(self, ctx: StepContext) -> None:
        """A restart, where the recipe asks for them."""
        restart(self.config, ctx, self._layers.values())

    def state_dict(self) -> dict[str, Any]:
        """The support of S in each layer."""
        return {name: layer.index for name, layer in self._layers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, layer in self._layers.items():
            layer.index.copy_(state[name])

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers."""
        from edgewright.compress.layers import merged, submodules

        plain = copy.deepcopy(model)
        for name, layer in submodules(plain, self._layers).items():
            plain.set_submodule(name, merged(layer))
        return plain, {}

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """As every method with factors, what W costs to build (`flops_per_forward`), and the share that S holds."""
        from edgewright.compress.layers import submodules

        report = super().describe(model)
        layers = submodules(model, self._layers).values()
        numbers = {
            **report.numbers,
            "flops_per_forward": float(sum(layer.flops_per_forward() for layer in layers)),
            "density": sum(len(layer.index) for layer in layers) / max(1.0, report.numbers["weights"]),
        }
        return replace(report, numbers=numbers)
