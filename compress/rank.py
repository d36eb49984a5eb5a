"""The rank of factors, as a recipe gives it: a number, or a share of what the matrix could have."""

from __future__ import annotations

from pydantic import Field, model_validator

from edgewright.compress.choice import LayerChoice
from edgewright.errors import RecipeError

FACTORS = "factors, for formats whose graph is free: onnx, genai, openvino"
"""What a method leaves that does not merge them."""


class RankChoice(LayerChoice):
    """Part of the settings of every method with factors: exactly one of the two."""

    rank: int | None = Field(default=None, gt=0)
    """The same for all layers."""
    rank_fraction: float | None = Field(default=None, gt=0, le=1)
    """Of the smaller side of each matrix, rounded, at least 1."""

    @model_validator(mode="after")
    def _exactly_one(self) -> RankChoice:
        if (self.rank is None) == (self.rank_fraction is None):
            raise ValueError("give exactly one of rank and rank_fraction")
        return self

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """EW-720: the matrix has no such rank."""
        self.rank_of(layer, rows, columns)

    def rank_of(self, layer: str, rows: int, columns: int) -> int:
        """The rank of a layer's factors.

        Raises:
            RecipeError: EW-720, the matrix has no such rank.
        """
        most = min(rows, columns)
        if self.rank is None:
            assert self.rank_fraction is not None
            return max(1, round(self.rank_fraction * most))
        if self.rank > most:
            raise RecipeError(
                "EW-720",
                f"the rank is above that of the matrix: {layer}",
                key="rank",
                expected=f"at most {most} for [{rows}, {columns}]",
                found=self.rank,
                fix=f"rank: {most}, a rank_fraction, or leave the layer to others with exclude",
            )
        return self.rank
