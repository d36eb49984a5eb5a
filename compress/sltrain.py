"""SLTrain: a low-rank part and a fixed random sparse part of one weight (arXiv 2406.02214)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgewright.compress.rank import RankChoice
from edgewright.compress.restarts import Restarts, check_period, restart
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.sparse_lowrank import SparseLowRankLinear
    from edgewright.export.lattice import LatticeTensor


class SLTrainConfig(RankChoice, Restarts):
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


class SLTrain(Method):
    """Replaces linear layers, but the head and the excluded ones, by ones that build W anew in every forward.

    Random init: A Kaiming-uniform, B = 0, the values of S uniform in +-1/sqrt(in). It saves memory (parameters,
    gradients, moments) and no operations: the whole W is built for the forward, again for the backward, and its
    gradient is there for a moment, layer by layer. Where we differ from the released code: indices are int32 (4 bytes
    an entry, not 8), and nothing is drawn per process. The finished model has plain linear layers.
    """

    type = "sltrain"
    saves = "parameters, gradients and moments, r (in + out) + density in out for in * out; no operations"
    keeps_names = False

    def __init__(self, config: SLTrainConfig) -> None:
        self.config = config
        self._layers: dict[str, SparseLowRankLinear] = {}

    def check_run(self, total_steps: int) -> None:
        """EW-721: no restart would ever come."""
        check_period("restart_every", self.config.restart_every, total_steps)

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from edgewright.compress.layers import choose

        return choose(model, self.config, method=self.type)

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers.

        Raises:
            RecipeError: EW-720, a rank above the matrix (names the layer); EW-708, EW-711 as `choose`.
        """
        from edgewright.compress.sparse_lowrank import SparseLowRankLinear

        linears = self.chosen(model)
        ranks = {name: self.config.rank_of(name, *linear.weight.shape) for name, linear in linears.items()}
        for name, linear in linears.items():
            layer = SparseLowRankLinear(
                linear, rank=ranks[name], scale=self.config.alpha / ranks[name], density=self.config.density
            )
            if self.config.init == "spectral":
                layer.approximate(linear.weight)
            model.set_submodule(name, layer)
            self._layers[name] = layer

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
        """Layers changed, what they cost (building W: `flops_per_forward`), and the share of entries that S holds."""
        from edgewright.compress.layers import cost, skipped, submodules

        layers = submodules(model, self._layers).values()
        numbers = cost(layers)
        numbers["flops_per_forward"] = float(sum(layer.flops_per_forward() for layer in layers))
        numbers["density"] = sum(len(layer.index) for layer in layers) / max(1.0, numbers["weights"])
        numbers["without_saving"] = float(sum(layer.saves_nothing for layer in layers))
        return MethodReport(changed=len(layers), skipped=skipped(model), numbers=numbers)
