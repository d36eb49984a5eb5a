"""Low-rank training: W = B A, from scratch or from a checkpoint, with restarts, an activation, or ReLoRA's merges."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.compress.factor_method import FactorChoice, FactorMethod
from edgewright.compress.rank import FACTORS
from edgewright.compress.restarts import check_period, due, restart
from edgewright.method import StepContext

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.factors import FactoredLinear
    from edgewright.compress.relora import ReLoRALinear
    from edgewright.export.lattice import LatticeTensor


class ReLoRAConfig(BaseModel):
    """Full rank by many low-rank steps: W stays frozen, (alpha / r) B A is merged into it now and then (2307.05695)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    merge_every: int = Field(gt=0)
    """Optimizer steps between merges; the paper's are 1000 to 5000."""
    alpha: float = Field(default=32.0, gt=0)
    """The factors' product counts alpha / r."""


class LowRankConfig(FactorChoice):
    """Two factors in the place of each matrix, y = B act(A x): fewer parameters, gradients, moments and operations.

    Plain factors (act: none) with restarts are arXiv 2505.22922; `activation: silu` with `init: cola` is CoLA (arXiv
    2502.10940). Without an activation the finished model has plain matrices again.
    """

    type: Literal["lowrank"] = "lowrank"
    activation: Literal["none", "silu"] = "none"
    """Between the factors. With one they cannot be merged, and the finished model keeps them."""
    init: Literal["spectral", "cola"] = "spectral"
    """spectral: the best approximation of the weights that are there; cola: random, whatever is there
    (a layer's bias, which CoLA's models lack, is kept as it is)."""
    relora: ReLoRAConfig | None = None
    """Train the factors beside the frozen matrices, which must be worth something: start from an earlier stage."""
    merge: bool = True
    """Whether the finished model has B A multiplied out; false keeps the factors, and their smaller size and cost, for
    the runtimes that can hold them."""

    @model_validator(mode="after")
    def _fits_together(self) -> LowRankConfig:
        if self.activation != "none" and self.restart_every is not None and self.refactor:
            raise ValueError("an activation between the factors cannot be refactored: set refactor to false")
        if self.relora is None:
            return self
        if self.activation != "none" or self.restart_every is not None or not self.merge:
            raise ValueError("relora merges B A into a matrix: it goes with no activation, restart_every or merge")
        if self.init != "spectral":
            raise ValueError("relora starts from B = 0: leave init out")
        if self.rewarm_steps >= self.relora.merge_every:
            raise ValueError(f"rewarm_steps must be below merge_every ({self.relora.merge_every})")
        return self

    def build(self) -> LowRank:
        return LowRank(self)

    @property
    def heeded(self) -> frozenset[str]:
        """ReLoRA's merges always reset the factors' moments, and dip the rate as a restart does."""
        return super().heeded if self.relora is None else frozenset({"rewarm_steps"})

    @property
    def keeps_factors(self) -> bool:
        return not self.merge or self.activation != "none"

    @property
    def starts_anew(self) -> bool:
        return self.init == "cola"

    @property
    def freezes(self) -> bool:
        return self.relora is not None

    def finished(self) -> str:
        return FACTORS if self.keeps_factors else super().finished()


class LowRank(FactorMethod["LowRankConfig", "FactoredLinear | ReLoRALinear"]):
    """Replaces linear layers, but the head and the excluded ones, by pairs of factors.

    A factor pair saves parameters and operations where r < in * out / (in + out); `describe` counts the layers where it
    does not. ReLoRA zeroes the moments of the factors wholly at a merge, where the paper prunes 99.9 % of them at
    random: what is left of them belongs to factors that are no more.
    """

    type = "lowrank"
    saves = "parameters, gradients, moments and operations, r (in + out) for in * out; the file only with its factors"

    def check_run(self, total_steps: int) -> None:
        """EW-721: no restart or merge would ever come."""
        super().check_run(total_steps)
        if self.config.relora is not None:
            check_period("merge_every", self.config.relora.merge_every, total_steps)

    def kept_whole(self) -> str | None:
        return super().kept_whole() if self.config.relora is None else "a merge adds whole factors to their matrix"

    def replacement(self, linear: nn.Linear, rank: int) -> FactoredLinear | ReLoRALinear:
        import torch

        from edgewright.compress.factors import FactoredLinear, cola, spectral
        from edgewright.compress.relora import ReLoRALinear

        if self.config.relora is not None:
            return ReLoRALinear(linear, rank=rank, alpha=self.config.relora.alpha)
        start = {"spectral": spectral, "cola": cola}[self.config.init]
        with torch.no_grad():
            factors = start(linear.weight, rank)
        return FactoredLinear(factors, bias=linear.bias, activation=self.config.activation, method=self.type)

    def after_step(self, ctx: StepContext) -> None:
        """A restart, or a merge, at the steps kT - 1 (counted from 0) that leave a whole period."""
        from edgewright.compress.factors import FactoredLinear

        relora = self.config.relora
        if relora is None:
            restart(self.config, ctx, [layer for layer in self._layers.values() if isinstance(layer, FactoredLinear)])
        elif due(relora.merge_every, ctx):
            self._merge(ctx)

    def _merge(self, ctx: StepContext) -> None:
        from edgewright.compress.relora import ReLoRALinear

        for layer in self._layers.values():
            assert isinstance(layer, ReLoRALinear)
            layer.merge()
            for factor in layer.factors:
                ctx.reset_state(factor, None)
        if self.config.rewarm_steps:
            ctx.rewarm(self.config.rewarm_steps)

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers; where an activation or the recipe forbids that, with its factors."""
        from edgewright.compress.layers import merged, submodules

        finished = copy.deepcopy(model)
        if not self.config.keeps_factors:
            for name, layer in submodules(finished, self._layers).items():
                finished.set_submodule(name, merged(layer))
        return finished, {}
