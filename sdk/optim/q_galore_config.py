"""The recipe's section of Q-GaLore. It loads fast: torch is imported when the optimizer is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgewright.optim.projected_config import ProjectedConfig

if TYPE_CHECKING:
    from edgewright.optim.projected import ProjectedOptimizer


class QGaLoreConfig(ProjectedConfig):
    """Q-GaLore: GaLore with a 4-bit projection that is taken anew only as often as it changes (arXiv 2407.08296).

    With `training.weights: int8` the weights are in eight bits as well, as in the paper.
    """

    type: Literal["q_galore"] = "q_galore"
    learning_rate: float = Field(default=0.015, gt=0)
    """Peak learning rate, of all parameters."""
    states: Literal["fp32", "bf16", "int8"] = "int8"
    """How moments are stored; bf16 with stochastic rounding, int8 in blocks of 256."""
    update_proj_gap: int = Field(default=200, gt=0)
    """Optimizer steps between two projections to begin with; it doubles for a matrix whose subspace hardly changes."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on the update of projected matrices, the paper's alpha."""
    cos_threshold: float = Field(default=0.4, ge=0, le=1)
    """Mean likeness of leading singular vectors (|cos|) from which on the gap doubles."""
    queue_size: int = Field(default=5, gt=0)
    """Refreshes that this mean is over."""

    def kept_whole(self) -> str | None:
        """Projections in four bits are of whole matrices."""
        return "its step needs whole matrices"

    def _over(self, groups: list[dict[str, Any]]) -> ProjectedOptimizer:
        from edgewright.optim.q_galore import QGaLore

        return QGaLore(
            groups,
            **self._shared(),
            scale=self.scale,
            cos_threshold=self.cos_threshold,
            queue_size=self.queue_size,
        )
