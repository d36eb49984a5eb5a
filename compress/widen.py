"""A wider decoder that computes what a narrower one does: which channel each new one is a copy of, and with what share.

Channel j of the wide model is a copy of channel g(j) of the narrow one, and the first ones are copies of themselves;
c_j is how many copies that channel has. What *reads* an axis gets a share of the narrow weight, and the shares of a
channel's copies add up to 1 in every row:

    W'[o, j] = s[o, j] W[o, g(j)],    sum of s[o, j] over the copies of a channel = 1    (bert2BERT, arXiv 2110.07143).

Where we differ from the paper:
* RMSNorm. The paper's exactness needs every channel of the residual stream to have equally many copies, or the mean
  over the wide stream is another one. Here what *writes* to the stream is scaled by a_j = sqrt(D' / (D c_j)), so that
  sum_j X_j^2 / D' = sum_i x_i^2 / D for any width D', and norms give it back: gamma'_j = gamma_g(j) / a_j. A head that
  is tied to the embedding has a_j as well, so the norm before it is gamma'_j = gamma_g(j) D / D'.
* The shares are uneven: s = (1 + e u) / c with u drawn in each row, its mean over the copies taken off. Even ones leave
  copies with the same gradients for good; rescaled copies do, too, under Adam. The function stays exact all the same.
* Copies are spread evenly (every channel has as many, or one more), and drawn once for all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.compress.axes import Axis, Place
from edgewright.compress.cut import rows_of_heads
from edgewright.compress.shape import Shape

WRITERS = frozenset({"embed_tokens.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"})
"""Weights whose product is added to the residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Which channel of the narrow model each of the wide one's is."""

    origin: Tensor
    """g: int64 [wide]"""
    narrow: int

    @property
    def count(self) -> Tensor:
        """c_j: how many copies the channel has of which j is one; int64 [wide]."""
        return torch.bincount(self.origin, minlength=self.narrow)[self.origin]

    def blocks(self, size: int) -> Copies:
        """The same for channels in blocks of a size, as those of heads are."""
        return Copies(origin=rows_of_heads(self.origin, size), narrow=self.narrow * size)


def copies(narrow: int, wide: int, generator: torch.Generator) -> Copies:
    """The first ones themselves, the others drawn: every channel before any gets one more."""
    drawn = [torch.arange(narrow)]
    while sum(map(len, drawn)) < wide:
        drawn.append(torch.randperm(narrow, generator=generator))
    return Copies(origin=torch.cat(drawn)[:wide], narrow=narrow)


def copied_heads(source: Shape, wanted: Shape, pairs: Copies) -> Copies:
    """Query heads: those on a copy of a key and value head are copies of heads that were on it, all of them in turn."""
    used = dict.fromkeys(range(source.num_key_value_heads), 0)
    origin = []
    for pair in pairs.origin.tolist():
        for _ in range(wanted.group):
            origin.append(pair * source.group + used[pair] % source.group)
            used[pair] += 1
    return Copies(origin=torch.tensor(origin), narrow=source.num_attention_heads)


class Widening:
    """From a narrow shape to a wide one.

    Args:
        unevenness: e, in [0, 1).
        tied: whether the output head is the embedding.
    """

    def __init__(self, source: Shape, wanted: Shape, *, unevenness: float, tied: bool, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.unevenness = unevenness
        self.tied = tied
        pairs = copies(source.num_key_value_heads, wanted.num_key_value_heads, self.generator)
        self.pairs, self.heads = pairs, copied_heads(source, wanted, pairs)
        self.axes: dict[Axis, Copies] = {
            "hidden": copies(source.hidden_size, wanted.hidden_size, self.generator),
            "ffn": copies(source.intermediate_size, wanted.intermediate_size, self.generator),
            "key_value": pairs.blocks(source.head_dim),
            "query": self.heads.blocks(source.head_dim),
        }
        hidden = self.axes["hidden"]
        self.ratio = len(hidden.origin) / hidden.narrow
        self.stream = (self.ratio / hidden.count.double()).sqrt()
        """a_j"""

    def widened(self, place: Place, value: Tensor, above: Tensor | None = None) -> Tensor:
        """A weight of the wide model, in float64 on the CPU.

        Args:
            value: the weight of the narrow one.
            above: the same weight of the next block, which gives the new outputs (bert2BERT's advanced knowledge
                initialization: copies that differ, but another function); None: the weight itself does.
        """
        value = self._outputs(place, value.detach().cpu().double(), above)
        if place.axes == ("hidden",) and "norm" in place.kind:
            return value / self.ratio if self.tied and place.kind == "norm.weight" else value / self.stream
        if place.kind == "embed_tokens.weight":
            return value * self.stream
        if len(place.axes) == 2 and place.axes[1] in self.axes:
            value = self._inputs(value, self.axes[place.axes[1]])
        if place.kind in WRITERS:
            return value * (self.stream if value.ndim == 1 else self.stream[:, None])
        return value

    def _outputs(self, place: Place, value: Tensor, above: Tensor | None) -> Tensor:
        """The rows (of an embedding: the columns) that the copies have."""
        dimension = 1 if place.kind == "embed_tokens.weight" else 0
        if place.axes[dimension] not in self.axes:
            return value
        out = self.axes[place.axes[dimension]]
        rows = value.index_select(dimension, out.origin)
        if above is None:
            return rows
        new = above.detach().cpu().double().index_select(dimension, out.origin)
        return torch.cat([rows[: out.narrow], new[out.narrow :]])

    def _inputs(self, value: Tensor, read: Copies) -> Tensor:
        """[out, wide]: the columns of the copies, each with its share."""
        noise = torch.rand(len(value), len(read.origin), generator=self.generator, dtype=torch.float64) * 2 - 1
        sums = torch.zeros(len(value), read.narrow, dtype=torch.float64).index_add_(1, read.origin, noise)
        uneven = noise - (sums / torch.bincount(read.origin, minlength=read.narrow))[:, read.origin]
        return value[:, read.origin] * (1 + self.unevenness * uneven) / read.count
