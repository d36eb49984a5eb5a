"""Sheared-LLaMA (arXiv 2310.06694): masks on channels, heads and blocks are learned, and end at the shape asked for.

While the weights train on their loss, every mask has a Lagrangian lambda_1 d + lambda_2 d^2, with d the difference of
the expected share of open gates from the one wanted at that step; the multipliers go uphill. What is wanted falls from
1 to the target along a line, over `ramp` of the run, and stays there. The finished model has the likeliest gates of
each group, as many as were asked for.

Where we differ: every group (a block's heads, its channels) has multipliers of its own; with grouped queries, key and
value heads have masks, and the heads on each; the finished model takes open gates as 1, not as the values that they
have; no batch is loaded by domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from edgewright.compress.choice import WholeModel
from edgewright.compress.prune import SIZES, PrunedSizes
from edgewright.compress.shape import Shape, check_changed
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgewright.compress.cut import Kept
    from edgewright.compress.gated_layers import GatedLinear, GatedModel
    from edgewright.export.lattice import LatticeTensor

BETAS, EPSILON = (0.9, 0.95), 1e-8
"""Of the masks' own Adam."""


class ShearConfig(PrunedSizes, WholeModel):
    """Learned masks that end at exactly the sizes given (Sheared-LLaMA, arXiv 2310.06694).

    A later stage goes on with the smaller model. The masks have an Adam of their own.
    """

    type: Literal["shear"] = "shear"
    ramp: float = Field(default=0.2, gt=0, le=1)
    """Share of the run over which the wanted sizes fall from those of the source to the target (the paper: 640 of
    3,200 steps)."""
    mask_learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of masks and multipliers."""

    @model_validator(mode="after")
    def _something(self) -> ShearConfig:
        self.check_takes_all()
        sizes = self.model_dump()
        if all(sizes[name] is None for name in SIZES):
            raise ValueError(f"nothing to prune: give at least one of {', '.join(SIZES)}")
        return self

    def finished(self) -> str:
        return "a smaller model with plain weights, for every format"

    def leaves(self, model: PreTrainedModel) -> PreTrainedModel:
        from edgewright.preview import tied

        shape = self.target(Shape.of(model.config), model.config.model_type)
        return tied(shape.config(model.config, range(shape.num_hidden_layers)))

    def target(self, source: Shape, model_type: str) -> Shape:
        """The shape that is left. EW-762: it cannot be, or it is the source's."""
        shape = self.pruned_shape(source, model_type)
        check_changed(source, shape, "EW-762", "pruned")
        return shape

    def build(self) -> Shear:
        return Shear(self)


@dataclass(slots=True)
class Moments:
    """Adam's, of one parameter."""

    mean: Tensor
    square: Tensor


class Shear(Method):
    """Puts gates into the model; the weights train as ever."""

    type = "shear"
    saves = "parameters of the finished model; nothing while it trains"
    keeps_names = False
    compiles = False

    def __init__(self, config: ShearConfig) -> None:
        self.config = config
        self.seed = 0
        self.updates = 0
        self.progress = 0.0
        self._gated: GatedModel | None = None
        self._moments: dict[str, Moments] = {}

    @property
    def gated(self) -> GatedModel:
        """The gates and where they are; `prepare` made them."""
        assert self._gated is not None, "prepare() comes first"
        return self._gated

    def kept_whole(self) -> str | None:
        return "masks are counted over whole groups"

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """The layers behind masks: those that write to the residual stream.

        Raises:
            RecipeError: EW-761, EW-762; EW-711, EW-713 as `choose`.
        """
        from edgewright.compress.axes import check_axes
        from edgewright.compress.layers import choose

        check_axes(model, model.config.model_type, "pruned by masks")
        self.config.target(Shape.of(model.config), model.config.model_type)
        layers = choose(model, self.config, method=self.type)
        return {name: layer for name, layer in layers.items() if name.endswith(("o_proj", "down_proj"))}

    def prepare(self, model: PreTrainedModel) -> None:
        """Put the gates in, as modules of the model, so that processes and checkpoints share them."""
        import torch

        from edgewright.compress.gated_layers import GatedModel

        self.chosen(model)
        shape = Shape.of(model.config)
        self.seed = torch.initial_seed()
        self._gated = GatedModel.of(model, shape, self.config.target(shape, model.config.model_type))
        self._moments = {
            name: Moments(mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            for name, parameter in self._parameters()
        }

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for kind, gates in self.gated.gates.items():
            yield from ((f"{kind}.{name}", parameter) for name, parameter in gates.named_parameters())

    def before_step(self, ctx: StepContext) -> None:
        """Draw the masks' noise, which follows from seed and step alone."""
        import torch

        self.progress = min(1.0, ctx.step / max(1.0, self.config.ramp * ctx.total_steps))
        generator = torch.Generator().manual_seed((self.seed + 7919 * (ctx.step + 1)) % 2**63)
        for gates in self.gated.gates.values():
            uniform = torch.rand(gates.log_alpha.shape, generator=generator)
            gates.set_noise(uniform.clamp(1e-6, 1 - 1e-6))

    def penalty(self) -> torch.Tensor:
        """The Lagrangians of all masks."""
        import torch

        return torch.stack([gates.lagrangian(self.progress) for gates in self.gated.gates.values()]).sum()

    def after_backward(self, ctx: StepContext) -> None:
        """Step masks downhill and multipliers uphill; the run's optimizer finds no gradient of theirs."""
        import torch

        self.updates += 1
        with torch.no_grad():
            for name, parameter in self._parameters():
                gradient, moments = parameter.grad, self._moments[name]
                assert gradient is not None, "every gate is part of the penalty"
                parameter.grad = None
                moments.mean.lerp_(gradient, 1 - BETAS[0])
                moments.square.lerp_(gradient.square(), 1 - BETAS[1])
                mean = moments.mean / (1 - BETAS[0] ** self.updates)
                root = (moments.square / (1 - BETAS[1] ** self.updates)).sqrt() + EPSILON
                uphill = name.endswith("multipliers")
                parameter.add_(mean / root, alpha=self.config.mask_learning_rate * (1 if uphill else -1))

    def state_dict(self) -> dict[str, Any]:
        """The masks' Adam; gates and multipliers are among the model's tensors."""
        tensors = {f"{name}.mean": moments.mean for name, moments in self._moments.items()}
        tensors |= {f"{name}.square": moments.square for name, moments in self._moments.items()}
        return {"updates": self.updates, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, moments in self._moments.items():
            moments.mean.copy_(state[f"{name}.mean"])
            moments.square.copy_(state[f"{name}.square"])

    def kept(self, model: PreTrainedModel) -> Kept:
        """What stays, if training ended now."""
        return self.gated.kept(Shape.of(model.config))

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The smaller model: that of the open gates."""
        from edgewright.compress.cut import cut

        return cut(model, self.kept(model)), {}

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers behind masks, what they cost, the weights that stay (`kept`), and the open shares expected now."""
        from edgewright.compress.elastic import weights_in_blocks
        from edgewright.compress.layers import cost, skipped, submodules

        layers: Mapping[str, GatedLinear] = submodules(model, self.gated.layers)
        numbers = cost(layers.values())
        shape = Shape.of(model.config)
        numbers["kept"] = weights_in_blocks(self.kept(model).shape(shape)) / weights_in_blocks(shape)
        for kind, gates in self.gated.gates.items():
            numbers[f"{kind}_open"] = float(gates.probabilities().detach().mean())
        return MethodReport(changed=len(layers), skipped=skipped(model), numbers=numbers)
