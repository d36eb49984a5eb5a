"""A model with finite weights that says infinity."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def overflow_at(model: PreTrainedModel, token: int) -> None:
    """Finite weights with which this token, and no usual one, makes infinity: the product of two linear layers."""
    model.model.embed_tokens.weight[token] = 0.0
    model.model.embed_tokens.weight[token, 3] = 1000.0  # sqrt(hidden) after the norm, where others have about 1
    for linear in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
        linear.weight[0] = 0.0
        linear.weight[0, 3] = 3e18
