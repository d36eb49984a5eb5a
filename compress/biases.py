"""Biases that a method adds to a model of a known architecture, so that the result is still a plain model of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgewright.compress.layers import CompressedLinear
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS = ("attention_bias", "mlp_bias")
"""What configurations call the choice of biases."""


def settings_for_biases(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, bool]:
    """The settings of the configuration that give all these layers a bias, and as few others as may be.

    Raises:
        RecipeError: EW-732, the architecture has no place for the bias of one of them.
    """
    known = model.config.to_dict()
    found: dict[str, bool] = {}
    missing = set(layers) - biased(model, {})
    for setting in SETTINGS:
        if setting in known and missing & biased(model, {setting: True}):
            found[setting] = True
    without = sorted(missing - biased(model, found))
    if without:
        raise RecipeError(
            "EW-732",
            f"this method gives {without[0]} a bias, and the architecture has no place for it",
            expected="layers that may have a bias, as those of Llama",
            found=f"{len(without)} layers of {known['model_type']} without one",
            fix=f"another quantizer, or exclude: [{without[0].rpartition('.')[2]}]",
        )
    return found


def add_biases(model: PreTrainedModel, settings: dict[str, bool]) -> None:
    """Set these settings, and give every layer that they give a bias one of zeros, unless it has its own."""
    for name in sorted(biased(model, settings)):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | CompressedLinear)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features, device=next(layer.parameters()).device))
    for setting, value in settings.items():
        setattr(model.config, setting, value)


def biased(model: PreTrainedModel, settings: dict[str, bool]) -> set[str]:
    """The linear layers that have a bias in a model of this configuration with these settings."""
    config = copy.deepcopy(model.config)
    for setting, value in settings.items():
        setattr(config, setting, value)
    with torch.device("meta"):
        twin = type(model)(config)
    return {name for name, layer in twin.named_modules() if isinstance(layer, nn.Linear) and layer.bias is not None}
