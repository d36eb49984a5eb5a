"""GraNet: gradual pruning in which each update also drops some weights and grows as many others anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from edgewright.compress.choice import LayerChoice
from edgewright.compress.density import SHARE_EPSILON, erk, exact_counts, whole
from edgewright.compress.pruning import Schedule, cubic, does_not_fit, steps_between
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgewright.compress.masked import MaskedLinear
    from edgewright.export.lattice import LatticeTensor

GRADIENT_STEPS = 4
"""Steps over which the dense gradient is summed before it decides what grows: one batch alone is mostly noise."""
FEWEST_PRUNINGS = 20
"""In a run too short for that many at 100 steps each, updates follow each other faster; fewer than in plain pruning,
because what has grown needs time to be worth more than what is pruned."""


class GranetConfig(LayerChoice):
    """Gradual pruning with regrowth (GraNet, arXiv 2106.10404), dense to sparse or sparse to sparse.

    On ordinary hardware zeros save neither memory nor time, in training or in the file.
    """

    type: Literal["granet"] = "granet"
    density: float = Field(default=0.5, gt=0, le=1)
    """Share of weights that are used from `end` on."""
    initial_density: float = Field(default=1.0, gt=0, le=1)
    """Share at the start: 1 is dense to sparse; less is sparse to sparse, from random masks with ERK densities."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps before the first update."""
    end: float = Field(default=0.5, gt=0, le=1)
    """Share of the steps at the end of pruning; dropping and growing go on to the end of the run."""
    update_every: int | None = Field(default=None, gt=0)
    """Steps between two updates; null: 100, or fewer in a run too short for 20 prunings."""
    drop: float = Field(default=0.5, ge=0, lt=1)
    """Share of a layer's used weights that an update drops and grows anew, at the start of the run."""
    final_drop: float = Field(default=0.005, ge=0, lt=1)
    """The same at its end, along half a cosine."""
    regrow: Literal["random", "gradient", "none"] = "random"
    """What grows: random weights; those with the largest dense gradient, as in the paper, which is unstable in language
    models in bf16; or nothing, and nothing is dropped but what is pruned."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """No layer is pruned below this share of the overall density; 1: every layer alike."""

    @model_validator(mode="after")
    def _in_order(self) -> GranetConfig:
        if self.start >= self.end:
            raise ValueError("start must be below end")
        if self.density > self.initial_density:
            raise ValueError("density must not be above initial_density: weights are pruned, not added")
        if self.final_drop > self.drop:
            raise ValueError("final_drop must not be above drop")
        return self

    def schedule(self, total_steps: int) -> Schedule:
        """When weights are pruned, from `initial_density` to `density` along a cubic.

        Raises:
            RecipeError: EW-728, that does not fit into the run.
        """
        every = self.update_every or steps_between((self.end - self.start) * total_steps, FEWEST_PRUNINGS)
        first, last = self._times(every, total_steps)
        if first > last:
            shorter = range(min(every - 1, total_steps), 0, -1)
            legal = next((n for n in shorter if self._times(n, total_steps)[0] <= self._times(n, total_steps)[1]), None)
            raise does_not_fit("update_every", every, legal, total_steps)
        return Schedule(first=first, last=last, every=every, curve=cubic(self.initial_density, self.density))

    def _times(self, every: int, total_steps: int) -> tuple[int, int]:
        """First and last pruning, in steps done: multiples of `every` within start and end, before the last step."""
        first = max(1, math.ceil(self.start * total_steps / every * (1 - SHARE_EPSILON))) * every
        return first, min(whole(self.end, total_steps), total_steps - 1) // every * every

    def build(self) -> Granet:
        return Granet(self)


class Granet(Method):
    """Replaces linear layers, but the head and the excluded ones, by masked ones whose masks move.

    An update, every `update_every` steps: prune the smallest weights of all layers together down to the cubic curve;
    then, layer by layer, drop the share p of the smallest used weights and grow as many unused ones, which start at 0
    (those just dropped may return); p goes from `drop` to `final_drop` along half a cosine. Counts are exact.

    Where we differ from the published code: the curve reaches its end point; Adam's moments are zeroed where weights
    are dropped or grown; the gradient that decides is the sum over a few steps; masks hold on gradients and optimizer
    state in between; and a layer drops no more weights than it has unused ones, so that a dense one is left alone.
    """

    type = "granet"
    saves = "arithmetic where zeros are skipped; on ordinary hardware nothing, in training or in the file"

    def __init__(self, config: GranetConfig) -> None:
        self.config = config
        self._layers: dict[str, MaskedLinear] = {}
        self._gradients: dict[str, Tensor] = {}
        self._seed = 0
        self._scores: dict[str, Callable[[str, int], Tensor]] = {
            "random": self._random_scores,
            "gradient": self._gradient_scores,
        }

    def check_run(self, total_steps: int) -> None:
        """EW-728 where the updates do not fit."""
        self.config.schedule(total_steps)

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from edgewright.compress.layers import choose
        from edgewright.compress.masked import floors

        chosen = choose(model, self.config, method=self.type)
        floors({name: linear.weight.numel() for name, linear in chosen.items()}, self.config.density, self.config.floor)
        self._initial_counts(chosen)
        return chosen

    def _initial_counts(self, chosen: Mapping[str, nn.Linear]) -> Mapping[str, int]:
        """How many weights each layer has when training starts."""
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in chosen.items()}
        return exact_counts(shapes, erk(shapes, self.config.initial_density, 0))

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers, and mask them where training starts sparse.

        Raises:
            RecipeError: EW-708, EW-711, see `choose`; EW-726, there are too few weights for all layers.
        """
        import torch

        from edgewright.compress.masked import MaskedLinear, mask_randomly

        chosen = self.chosen(model)
        self._seed = torch.initial_seed()
        self._layers = {name: MaskedLinear(linear, self.type) for name, linear in chosen.items()}
        mask_randomly(self._layers, self._initial_counts(chosen), self._seed)
        for name, layer in self._layers.items():
            model.set_submodule(name, layer)

    def after_backward(self, ctx: StepContext) -> None:
        """Sum the dense gradient where it will decide, then mask it."""
        schedule, done = self.config.schedule(ctx.total_steps), ctx.step + 1
        soon = done + GRADIENT_STEPS > math.ceil(done / schedule.every) * schedule.every >= schedule.first
        for name, layer in self._layers.items():
            if self.config.regrow == "gradient" and soon and layer.weight.grad is not None:
                gradient = layer.weight.grad.nan_to_num(0.0, 0.0, 0.0)
                self._gradients[name] = gradient + self._gradients.get(name, 0.0)
            layer.fix_gradient()

    def after_step(self, ctx: StepContext) -> None:
        """Put back to 0 what an optimizer moved; where an update falls, prune, drop and grow."""
        from edgewright.compress.masked import magnitude_masks

        for layer in self._layers.values():
            layer.zero()
        schedule, done = self.config.schedule(ctx.total_steps), ctx.step + 1
        if done < schedule.first or done % schedule.every or done == ctx.total_steps:
            return
        masks = {name: layer.mask for name, layer in self._layers.items()}
        if schedule.prunes_after(done):
            masks = magnitude_masks(self._layers, schedule.density_after(done), self.config.floor)
        share = self.config.final_drop + (self.config.drop - self.config.final_drop) * half_cosine(
            done / ctx.total_steps
        )
        for name, layer in self._layers.items():
            layer.set_mask(*self._regrown(name, masks[name], share, done), ctx)
        self._gradients = {}

    def _regrown(self, name: str, mask: Tensor, share: float, done: int) -> tuple[Tensor, Tensor | None]:
        """The mask after dropping and growing, and what has grown."""
        from edgewright.compress.masked import largest, magnitudes

        if self.config.regrow == "none":
            return mask, None
        used = int(mask.sum())
        number = min(math.ceil(share * used), mask.numel() - used)
        left = largest([magnitudes(self._layers[name].weight, mask)], used - number)[0]
        scores = self._scores[self.config.regrow](name, done)
        grown = largest([scores.masked_fill(left, -1.0)], number)[0]
        return left | grown, grown

    def _random_scores(self, name: str, done: int) -> Tensor:
        from edgewright.compress.masked import random_scores

        return random_scores(self._layers[name].weight, self._seed, f"{name}/{done}")

    def _gradient_scores(self, name: str, done: int) -> Tensor:
        return self._gradients[name].float().abs()

    def state_dict(self) -> dict[str, Any]:
        from edgewright.compress.masked import mask_state

        gradients = {f"{name}.gradient": gradient for name, gradient in self._gradients.items()}
        return {"seed": self._seed, **mask_state(self._layers), **gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from edgewright.compress.masked import load_masks

        self._seed = state["seed"]
        load_masks(self._layers, state)
        self._gradients = {
            name: state[f"{name}.gradient"].to(layer.weight.device, copy=True)
            for name, layer in self._layers.items()
            if f"{name}.gradient" in state
        }

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers that hold the zeros."""
        from edgewright.compress.masked import without_masks

        return without_masks(model, self._layers), {}

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers changed, and how many weights are there: see `sparse_report`."""
        from edgewright.compress.masked import sparse_report

        return sparse_report(model, self._layers)


def half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1, along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2
