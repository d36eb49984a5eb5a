"""What the methods with factors have in common: which layers they replace, by what rank, and what they count."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from edgewright.compress.rank import RankChoice
from edgewright.compress.restarts import Restarts, check_period
from edgewright.method import Method, MethodReport

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.layers import CompressedLinear

Layer = TypeVar("Layer", bound="CompressedLinear")


class FactorChoice(RankChoice, Restarts):
    """The settings of such a method: which layers, what rank, and when to restart."""


Config = TypeVar("Config", bound=FactorChoice)


class FactorMethod(Method, Generic[Config, Layer], abstract=True):
    """Replaces linear layers, but the head and the excluded ones, by layers with factors."""

    keeps_names: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self._layers: dict[str, Layer] = {}

    @abstractmethod
    def replacement(self, linear: nn.Linear, rank: int) -> Layer:
        """The layer of that rank which takes the place of a linear one."""

    def check_run(self, total_steps: int) -> None:
        """EW-721: no restart would ever come."""
        check_period("restart_every", self.config.restart_every, total_steps)

    def kept_whole(self) -> str | None:
        return None if self.config.restart_every is None else "a restart balances whole factors"

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from edgewright.compress.layers import choose

        return choose(model, self.config, method=self.type)

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers.

        Raises:
            RecipeError: EW-720, a rank above the matrix (names the layer); EW-708, EW-711 as `choose`.
        """
        for name, linear in self.chosen(model).items():
            layer = self.replacement(linear, self.config.rank_of(name, *linear.weight.shape))
            model.set_submodule(name, layer)
            self._layers[name] = layer

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers changed, what they cost, and `without_saving`: those that hold no fewer numbers than a matrix."""
        from edgewright.compress.layers import cost, skipped, submodules

        layers = submodules(model, self._layers).values()
        numbers = cost(layers)
        numbers["without_saving"] = float(sum(layer.saves_nothing for layer in layers))
        return MethodReport(changed=len(layers), skipped=skipped(model), numbers=numbers)
