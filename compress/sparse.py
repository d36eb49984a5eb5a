"""Sparse pretraining: weights are 0 from the start (SPDF), more and more (The Journey Matters), or two of each four."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgewright.compress.choice import LayerChoice
from edgewright.compress.density import DISTRIBUTIONS, Distribution, exact_counts
from edgewright.compress.pruning import Schedule, journey
from edgewright.errors import RecipeError
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgewright.compress.masked import MaskedLinear, SparseLinear
    from edgewright.export.lattice import LatticeTensor


class _Mask(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def check_run(self, total_steps: int, density: float) -> None:
        """Refuse a run into which the mask's changes do not fit."""

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """Refuse a layer that cannot have such a mask."""

    def check_model(self, model: PreTrainedModel, chosen: Mapping[str, nn.Linear], density: float) -> None:
        """Refuse layers that cannot have that density together; no weight is read."""

    def pruned(self, layers: Mapping[str, MaskedLinear], density: float, ctx: StepContext) -> Mapping[str, Tensor]:
        """The masks that change after this step, by layer."""
        return {}


class StaticMask(_Mask):
    """Random weights are 0 from the first step to the last."""

    type: Literal["static"] = "static"
    distribution: Distribution = "uniform"
    """uniform: every layer alike (SPDF); erk: small layers denser; erk_plus: erk, with the output head, which stays
    dense, counted in the density."""

    def counts(self, model: PreTrainedModel, chosen: Mapping[str, nn.Linear], density: float) -> Mapping[str, int]:
        """How many weights each layer keeps.

        Raises:
            RecipeError: EW-726, a layer would keep nothing; EW-727, the dense head alone is too much.
        """
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in chosen.items()}
        head = model.get_output_embeddings().weight.numel()
        return exact_counts(shapes, DISTRIBUTIONS[self.distribution](shapes, density, head))

    def check_model(self, model: PreTrainedModel, chosen: Mapping[str, nn.Linear], density: float) -> None:
        self.counts(model, chosen, density)

    def build(self, model: PreTrainedModel, chosen: Mapping[str, nn.Linear], density: float) -> dict[str, MaskedLinear]:
        """Masked layers with their masks drawn from the run's seed; errors as `counts`."""
        import torch

        from edgewright.compress.masked import MaskedLinear, mask_randomly

        counts = self.counts(model, chosen, density)
        layers = {name: MaskedLinear(linear, Sparse.type) for name, linear in chosen.items()}
        mask_randomly(layers, counts, torch.initial_seed())
        return layers


class GradualMask(_Mask):
    """The smallest weights of all layers together become 0, step by step, and stay 0."""

    type: Literal["gradual"] = "gradual"
    start: float = Field(default=0.25, gt=0, lt=1)
    """Share of the run's compute before pruning (a step at density d is d of a dense one)."""
    end: float = Field(default=0.75, gt=0, le=1)
    """Share of the run's compute at the end of pruning."""
    prune_every: int | None = Field(default=None, gt=0)
    """Steps between two prunings; null: 100, or fewer in a run too short for 50 of them."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """No layer gets below this share of the overall density, so that none starves; 1: every layer alike."""

    @model_validator(mode="after")
    def _in_order(self) -> GradualMask:
        if self.start >= self.end:
            raise ValueError("start must be below end")
        return self

    def schedule(self, total_steps: int, density: float) -> Schedule:
        """When weights are pruned; EW-728 where that does not fit into the run."""
        return journey(total_steps, density, start=self.start, end=self.end, every=self.prune_every)

    def check_run(self, total_steps: int, density: float) -> None:
        self.schedule(total_steps, density)

    def pruned(self, layers: Mapping[str, MaskedLinear], density: float, ctx: StepContext) -> Mapping[str, Tensor]:
        from edgewright.compress.masked import magnitude_masks

        schedule, done = self.schedule(ctx.total_steps, density), ctx.step + 1
        if not schedule.prunes_after(done):
            return {}
        return magnitude_masks(layers, schedule.density_after(done), self.floor)

    def check_model(self, model: PreTrainedModel, chosen: Mapping[str, nn.Linear], density: float) -> None:
        """EW-726: there will be too few weights for all layers."""
        from edgewright.compress.masked import floors

        floors({name: linear.weight.numel() for name, linear in chosen.items()}, density, self.floor)

    def build(self, model: PreTrainedModel, chosen: Mapping[str, nn.Linear], density: float) -> dict[str, MaskedLinear]:
        """Masked layers in which nothing is masked yet."""
        from edgewright.compress.masked import MaskedLinear

        return {name: MaskedLinear(linear, Sparse.type) for name, linear in chosen.items()}


class TwoOfFourMask(_Mask):
    """Of every four consecutive input features, the two largest weights of the step are used: `density` is 0.5."""

    type: Literal["2:4"] = "2:4"
    decay: float = Field(default=2e-4, ge=0)
    """SR-STE: this much of each unused weight is added to its gradient, so that the mask settles; 0: plain STE."""

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """EW-729: a row is no multiple of four."""
        if columns % 4:
            raise RecipeError(
                "EW-729",
                f"the 2:4 pattern does not fit the rows of {layer}",
                expected=f"a multiple of 4 columns, such as {columns // 4 * 4}",
                found=columns,
                fix=f"exclude: [{layer.rpartition('.')[2]}], or a model of other sizes",
            )

    def build(
        self, model: PreTrainedModel, chosen: Mapping[str, nn.Linear], density: float
    ) -> Mapping[str, SparseLinear]:
        """Layers that mask in the forward."""
        from edgewright.compress.semi_structured import SemiStructuredLinear

        return {name: SemiStructuredLinear(linear, Sparse.type, self.decay) for name, linear in chosen.items()}


class SparseConfig(LayerChoice):
    """Weights that are 0: static (SPDF, arXiv 2303.10464), gradual (The Journey Matters, arXiv 2501.12486) or 2:4.

    On ordinary hardware zeros save neither memory nor time, in training or in the file: `describe` counts what they
    save where they are left out. Sparse pretraining and dense fine-tuning is two stages: the second has no method.
    """

    type: Literal["sparse"] = "sparse"
    density: float = Field(default=0.5, gt=0, le=1)
    """Share of weights that are not 0, at the end of the run."""
    mask: Annotated[StaticMask | GradualMask | TwoOfFourMask, Field(discriminator="type")] = StaticMask()
    """Which ones, and when."""

    @model_validator(mode="after")
    def _half(self) -> SparseConfig:
        if self.mask.type == "2:4" and self.density != 0.5:
            raise ValueError("a 2:4 mask has the density 0.5")
        return self

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """EW-729: the layer cannot have a 2:4 mask."""
        self.mask.check_layer(layer, rows, columns)

    def build(self) -> Sparse:
        return Sparse(self)


class Sparse(Method):
    """Replaces linear layers, but the head and the excluded ones, by ones of which only some weights are used.

    Static and gradual masks hold on weights, gradients (before clipping) and optimizer state; what is pruned never
    comes back. Gradual pruning follows the paper and not its code where they differ: masks are no parameters, and the
    last pruning leaves round(density * weights) exactly. A later stage goes on from the weights with their zeros, or,
    after 2:4, from the latent ones.
    """

    type = "sparse"
    saves = "arithmetic where zeros are skipped; on ordinary hardware nothing, in training or in the file"

    def __init__(self, config: SparseConfig) -> None:
        self.config = config
        self._layers: Mapping[str, SparseLinear] = {}
        self._masked: dict[str, MaskedLinear] = {}

    def check_run(self, total_steps: int) -> None:
        """EW-728 where the pruning schedule does not fit."""
        self.config.mask.check_run(total_steps, self.config.density)

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from edgewright.compress.layers import choose

        chosen = choose(model, self.config, method=self.type)
        self.config.mask.check_model(model, chosen, self.config.density)
        return chosen

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers.

        Raises:
            RecipeError: EW-708, EW-711, see `choose`; EW-726, EW-727, EW-729, see the masks.
        """
        from edgewright.compress.masked import MaskedLinear

        self._layers = self.config.mask.build(model, self.chosen(model), self.config.density)
        self._masked = {name: layer for name, layer in self._layers.items() if isinstance(layer, MaskedLinear)}
        for name, layer in self._layers.items():
            model.set_submodule(name, layer)

    def after_backward(self, ctx: StepContext) -> None:
        for layer in self._layers.values():
            layer.fix_gradient()

    def after_step(self, ctx: StepContext) -> None:
        """Put back to 0 what an optimizer moved, and prune where the schedule says so."""
        for layer in self._masked.values():
            layer.zero()
        for name, mask in self.config.mask.pruned(self._masked, self.config.density, ctx).items():
            self._masked[name].set_mask(mask, None, ctx)

    def state_dict(self) -> dict[str, Any]:
        from edgewright.compress.masked import mask_state

        return dict(mask_state(self._masked))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from edgewright.compress.masked import load_masks

        load_masks(self._masked, state)

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers that hold the zeros."""
        from edgewright.compress.masked import without_masks

        return without_masks(model, self._layers), {}

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers changed, and how many weights are there: see `sparse_report`."""
        from edgewright.compress.masked import sparse_report

        return sparse_report(model, self._layers)
