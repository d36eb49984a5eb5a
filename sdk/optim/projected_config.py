"""The recipe's sections of the optimizers over projected gradients. Torch is loaded when one is built, not before."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgewright.optim.config import OptimizerConfigBase

if TYPE_CHECKING:
    from torch import nn

    from edgewright.optim.projected import ProjectedOptimizer

Role = Literal["attention", "mlp"]
"""Keys of `groups.ROLES`."""
Rank = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, le=1)]


class ProjectedConfig(OptimizerConfigBase):
    """What all of them have. Matrices of the chosen roles are projected, all other parameters get AdamW."""

    chooses: ClassVar[bool] = True
    learning_rate: float = Field(default=0.01, gt=0)
    """Peak learning rate, of all parameters."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices, times the learning rate."""
    rank: Rank = 0.25
    """Of the projection; a fraction: as a share of each matrix's smaller side."""
    update_proj_gap: int = Field(default=200, gt=0)
    """Optimizer steps between two projections."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the root of the second moment."""
    states: Literal["fp32", "bf16", "int8"] = "fp32"
    """How moments are stored; bf16 with stochastic rounding, int8 in blocks of 256."""
    roles: tuple[Role, ...] = Field(default=("attention", "mlp"), min_length=1)
    """Whose matrices are projected."""
    layers: tuple[str, ...] = ()
    """Of those only these, by their name or the last parts of it: `down_proj`, `0.mlp.up_proj`; empty: all."""
    exclude: tuple[str, ...] = ()
    """Of those not these, named alike."""

    @abstractmethod
    def _over(self, groups: list[dict[str, Any]]) -> ProjectedOptimizer:
        """The optimizer with this section's settings."""

    def _shared(self) -> dict[str, Any]:
        """The arguments that all of the optimizers take by the same names."""
        return {
            "lr": self.learning_rate,
            "rank": self.rank,
            "update_proj_gap": self.update_proj_gap,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "states": self.states,
        }

    def build(self, model: nn.Module) -> ProjectedOptimizer:
        """The optimizer over all trainable parameters of `model`.

        Raises:
            RecipeError: EW-741, the rank is larger than a chosen matrix; EW-742, no matrix is chosen.
        """
        from edgewright.optim.groups import chosen_matrices, parameter_groups

        matrices = chosen_matrices(model, roles=self.roles, layers=self.layers, exclude=self.exclude)
        return self._over(parameter_groups(model, matrices, rank=self.rank, weight_decay=self.weight_decay))

    def kept_whole(self) -> str | None:
        """Low-rank gradients are summed over the processes; blocks of eight bits run over the borders."""
        return "states of eight bits are in blocks that run over the borders" if self.states == "int8" else None

    def state_bytes(self, model: nn.Module) -> int:
        """Moments, projections, step counts and seeds; random projections are no state: `kept_bytes`."""
        return self.build(model).state_bytes()

    def kept_bytes(self, model: nn.Module) -> int:
        """Random projections between two refreshes."""
        return self.build(model).kept_bytes()


class ApolloConfig(ProjectedConfig):
    """APOLLO: learning rates per channel, estimated in a random low-rank space (arXiv 2412.05270)."""

    type: Literal["apollo"] = "apollo"
    scale: float = Field(default=1.0, gt=0)
    """Square of the factor on the update, as in the public package."""
    proj: Literal["random", "svd"] = "random"
    """Random projections, or the gradient's singular vectors."""
    scale_front: bool = False
    """Multiply by the scale before the norm-growth limiter."""
    limiter: float | None = Field(default=1.01, gt=1)
    """Largest growth of an update's norm from step to step; null: no limit."""
    keep_projections: bool = True
    """Keep random projections in memory; otherwise they are drawn in every step, which is slow at high ranks."""

    def _over(self, groups: list[dict[str, Any]]) -> ProjectedOptimizer:
        from edgewright.optim.apollo import Apollo

        return Apollo(
            groups,
            **self._shared(),
            scale=self.scale,
            proj=self.proj,
            scale_front=self.scale_front,
            limiter=self.limiter,
            keep_projections=self.keep_projections,
        )


class ApolloMiniConfig(ProjectedConfig):
    """APOLLO-Mini: one learning rate per matrix, estimated at rank 1: next to no state (arXiv 2412.05270)."""

    type: Literal["apollo_mini"] = "apollo_mini"
    rank: Rank = 1
    """Of the projection."""
    scale: float = Field(default=128.0, gt=0)
    """Square of the factor on the update, as in the public package."""
    scale_front: bool = False
    """Multiply by the scale before the norm-growth limiter; the paper does so up to 130M parameters."""
    limiter: float | None = Field(default=1.01, gt=1)
    """Largest growth of an update's norm from step to step; null: no limit."""

    def _over(self, groups: list[dict[str, Any]]) -> ProjectedOptimizer:
        from edgewright.optim.apollo import ApolloMini

        return ApolloMini(
            groups, **self._shared(), scale=self.scale, scale_front=self.scale_front, limiter=self.limiter
        )


class GaLoreConfig(ProjectedConfig):
    """GaLore: Adam in the leading singular subspace of the gradient (arXiv 2403.03507)."""

    type: Literal["galore"] = "galore"
    scale: float = Field(default=0.25, gt=0)
    """Factor on the update of projected matrices, the paper's alpha."""

    def _over(self, groups: list[dict[str, Any]]) -> ProjectedOptimizer:
        from edgewright.optim.galore import GaLore

        return GaLore(groups, **self._shared(), scale=self.scale)


class FiraConfig(ProjectedConfig):
    """Fira: GaLore, and the rest of the gradient scaled as Adam scales its projection (arXiv 2410.01623)."""

    type: Literal["fira"] = "fira"
    scale: float = Field(default=0.25, gt=0)
    """Factor on the update of projected matrices, the paper's alpha."""
    released: bool = False
    """Leave the residual without alpha, as the released code does."""
    limiter: float | None = Field(default=1.01, gt=1)
    """Largest growth of the residual's norm from step to step; null: no limit."""

    def _over(self, groups: list[dict[str, Any]]) -> ProjectedOptimizer:
        from edgewright.optim.fira import Fira

        return Fira(groups, **self._shared(), scale=self.scale, released=self.released, limiter=self.limiter)


class GradNormLoRPConfig(ProjectedConfig):
    """GradNormLoRP: normalised weights, GaLore on their directions, Adam on their magnitudes (arXiv 2412.19616)."""

    type: Literal["gradnorm_lorp"] = "gradnorm_lorp"
    rank: Rank = 0.5
    """Of the projection; a fraction: as a share of each matrix's smaller side. A quarter saves more and learns less."""
    update_proj_gap: int = Field(default=250, gt=0)
    """Optimizer steps between two projections."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on the step of directions."""

    def _over(self, groups: list[dict[str, Any]]) -> ProjectedOptimizer:
        from edgewright.optim.gradnorm_lorp import GradNormLoRP

        return GradNormLoRP(groups, **self._shared(), scale=self.scale)
