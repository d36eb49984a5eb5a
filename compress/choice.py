"""The settings by which a recipe says which layers a method gets, and what it makes of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.export.lattice import LatticeTensor


class LayerChoice(BaseModel):
    """Part of every method's settings. Without any of them a method gets all linear layers but the output head."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    quantizes: ClassVar[bool] = False
    """Whether what the method leaves is on a lattice: then `example` gives one."""
    layers: tuple[str, ...] = ()
    """Only these, by their name or the last parts of it: `down_proj`, `0.mlp.up_proj`; empty: all."""
    exclude: tuple[str, ...] = ()
    """Linear layers left to others, or in full precision; named alike."""

    @property
    def keeps_factors(self) -> bool:
        """Whether what the method leaves is no plain weight, but factors that only some formats hold."""
        return False

    @property
    def starts_anew(self) -> bool:
        """Whether the method draws new weights, whatever is there: those of a checkpoint would be lost."""
        return False

    @property
    def freezes(self) -> bool:
        """Whether the weights that are there stay as they are for a while, so that random ones are a bad start."""
        return False

    def asks_for(self, layer: str) -> bool:
        """Whether the recipe means this linear layer; by its name alone."""
        asked = not self.layers or any(named(pattern, layer) for pattern in self.layers)
        return asked and not any(named(pattern, layer) for pattern in self.exclude)

    def asks_for_all_of(self, other: LayerChoice) -> bool:
        """Whether the recipe means, as far as names tell, every layer here that it means there."""
        wider = not self.layers or (bool(other.layers) and set(self.layers) >= set(other.layers))
        return wider and set(self.exclude) <= set(other.exclude)

    def left_behind(self, after: Sequence[LayerChoice]) -> str | None:
        """What the method trains beside the weights and a next stage, with those methods, does not go on from."""
        return None

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """Refuse a layer, [rows, columns], that the method cannot take, by its name.

        Raises:
            RecipeError: with the nearest legal value.
        """

    def finished(self) -> str:
        """What is left in the place of a weight when training is over, in a few words."""
        return "plain weights, for every format"

    def leaves(self, model: PreTrainedModel) -> PreTrainedModel:
        """The architecture that is left of one, which is on meta, when training is over: where it is another."""
        return model

    def example(self, layer: str, rows: int, columns: int) -> LatticeTensor | None:
        """A weight of that shape as the method leaves it, to see which formats hold it; None: it is on no lattice.

        Raises:
            RecipeError: EW-703, the method does not take the rows of this layer.
        """
        return None


class WholeModel(LayerChoice):
    """The settings of a method that takes every layer, since it changes the sizes that they share."""

    def check_takes_all(self) -> None:
        """ValueError: the recipe gives it some layers only."""
        if self.layers or self.exclude:
            kind = self.model_dump()["type"]
            raise ValueError(f"{kind} takes the whole model: remove layers and exclude")


def named(pattern: str, layer: str) -> bool:
    """Whether a pattern of a recipe stands for a layer: its name, or the last parts of it."""
    return layer == pattern or layer.endswith(f".{pattern}")


def check_divides(layer: str, columns: int, group: int) -> None:
    """Refuse a layer whose rows are not made of whole groups.

    Args:
        layer: its name.
        columns: of its rows.
        group: columns that belong together.

    Raises:
        RecipeError: EW-703.
    """
    if columns % group == 0:
        return
    legal = [each for each in range(32, columns + 1, 32) if columns % each == 0]
    near = min(legal, key=lambda each: abs(each - group), default=None)
    raise RecipeError(
        "EW-703",
        f"the group of weights does not divide the rows of {layer}",
        expected=f"{columns} columns to be a multiple of {group}",
        found=f"{columns % group} columns left over",
        fix=f"exclude: [{layer.rpartition('.')[2]}]"
        + (f", or a group of {near}" if near is not None and group % 32 == 0 else "")
        + ", or a model whose sizes are multiples of the group",
    )
