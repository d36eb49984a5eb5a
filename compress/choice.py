"""The settings by which a recipe says which layers a method gets."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class LayerChoice(BaseModel):
    """Part of every method's settings. Without any of them a method gets all linear layers but the output head."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: tuple[str, ...] = ()
    """Only these, by their name or the last parts of it: `down_proj`, `0.mlp.up_proj`; empty: all."""
    exclude: tuple[str, ...] = ()
    """Linear layers left to others, or in full precision; named alike."""
