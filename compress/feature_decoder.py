"""What hides tokens from a student, and the small decoder that has to find them again (HAD).

The student sees a text of which some tokens are hidden: no other token may look at them. From the features of those
that it sees a decoder of one cross-attention reconstructs the hidden ones, through the student's own output head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.chunked import IGNORED

if TYPE_CHECKING:
    from edgewright.objective import ModelInputs


@dataclass(frozen=True, slots=True)
class HiddenTokens:
    """What a student does not see of a micro-batch."""

    mask: Tensor
    """[B, S] bool."""
    places: Tensor
    """[B, M] int64: where they are; of them some may be seen after all."""

    def labels(self, input_ids: Tensor) -> Tensor:
        """[B, M]: the tokens at the places, `IGNORED` where they are seen."""
        return input_ids.masked_fill(~self.mask, IGNORED).gather(1, self.places)


@dataclass(frozen=True, slots=True)
class Masking:
    """Which tokens are hidden."""

    ratio: float
    """Share of all tokens."""
    span: int
    """Tokens that are hidden together."""

    def draw(self, inputs: ModelInputs) -> HiddenTokens:
        """As many in every row, anew for every micro-batch; the first of a document is always seen."""
        rows, length = inputs.input_ids.shape
        device = inputs.input_ids.device
        groups = -(-length // self.span)
        count = max(1, round(self.ratio * groups))
        chosen = torch.rand(rows, groups, device=device).argsort(-1)[:, :count]
        places = (chosen[..., None] * self.span + torch.arange(self.span, device=device)).flatten(1)
        mask = torch.zeros(rows, groups * self.span, dtype=torch.bool, device=device).scatter_(1, places, True)
        mask = mask[:, :length] & (positions(inputs) > 0)
        return HiddenTokens(mask, places.where(places < length, 0))

    def without(self, inputs: ModelInputs, hidden: HiddenTokens) -> ModelInputs:
        """The same, of which no token sees a hidden one but that one itself."""
        own = torch.eye(hidden.mask.shape[1], dtype=torch.bool, device=hidden.mask.device)
        return replace(inputs, attention_mask=causal_mask(inputs) & ~hidden.mask[:, None, None, :] | own)


def positions(inputs: ModelInputs) -> Tensor:
    """[B, S] inside each document."""
    if inputs.position_ids is not None:
        return inputs.position_ids
    return torch.arange(inputs.input_ids.shape[1], device=inputs.input_ids.device).expand_as(inputs.input_ids)


def causal_mask(inputs: ModelInputs) -> Tensor:
    """[B or 1, 1, S, S] bool, true where a query may look."""
    if inputs.attention_mask is not None:
        return inputs.attention_mask
    length = inputs.input_ids.shape[1]
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=inputs.input_ids.device).tril_()


class FeatureDecoder(nn.Module):
    """One cross-attention from the places of hidden tokens to the features of visible ones of the same document.

    A query is one learned vector and the position; keys and values are features, keys with their position. A null key
    is always there, for documents of which nothing is visible.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(hidden))
        self.null = nn.Parameter(torch.zeros(hidden))
        self.maps = nn.ParameterDict({name: torch.empty(hidden, hidden) for name in ("q", "k", "v", "out")})
        for weight in self.maps.values():
            nn.init.normal_(weight, std=hidden**-0.5)

    def forward(self, features: Tensor, hidden: HiddenTokens, inputs: ModelInputs) -> Tensor:
        """What takes the place of last hidden states at the hidden tokens, [B, M, H].

        Args:
            features: [B, S, H].
        """
        places = _sinusoids(positions(inputs), features.shape[-1]).to(features.dtype)
        both = causal_mask(inputs)
        same = both | both.transpose(2, 3)  # of one document, in either direction
        visible = F.pad(same & ~hidden.mask[:, None, None, :], (1, 0), value=True)
        null = self.null.to(features.dtype).expand(features.shape[0], 1, -1)
        wanted = places.expand_as(features).gather(1, hidden.places[..., None].expand(-1, -1, features.shape[-1]))
        q = self._heads(self.query.to(features.dtype) + wanted, "q")
        k = self._heads(torch.cat((null, features + places), 1), "k")
        v = self._heads(torch.cat((null, features), 1), "v")
        seen_from = visible.expand(features.shape[0], -1, -1, -1).gather(
            2, hidden.places[:, None, :, None].expand(-1, -1, -1, visible.shape[-1])
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_from)
        decoded = found.transpose(1, 2).flatten(2)
        return F.rms_norm(F.linear(decoded, self.maps["out"].to(decoded.dtype)), decoded.shape[-1:])

    def _heads(self, states: Tensor, name: str) -> Tensor:
        """[B, S, H] -> [B, A, S, H / A]"""
        made = F.linear(states, self.maps[name].to(states.dtype))
        return made.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _sinusoids(places: Tensor, size: int) -> Tensor:
    """[B, S, size] of positions, as in the first Transformer (arXiv 1706.03762, section 3.5)."""
    half = -(-size // 2)
    rates = torch.exp(torch.arange(half, device=places.device) * (-math.log(10_000.0) / max(1, half - 1)))
    angles = places[..., None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1)[..., :size]
