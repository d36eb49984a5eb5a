"""A linear layer as two factors: y = mix * B act(A x) + (1 - mix) * S x[index] + bias.

A is `down` [r, in], B is `up` [out, r]. S, [out, columns], is there where a few input columns have a branch of their
own (LOST, arXiv 2508.02668); without it mix is 1. Also the mathematics on factors alone: truncated SVD, and the exact
balanced refactorization of Glentis et al. (arXiv 2505.22922).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.layers import CompressedLinear, plain_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "silu": F.silu}
"""What may lie between the factors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Two factors of a weight: `up` [out, r] times `down` [r, in]."""

    up: Tensor
    down: Tensor


def spectral(weight: Tensor, rank: int) -> Factors:
    """The best approximation of that rank (truncated SVD), balanced: B = U sqrt(S), A = sqrt(S) V^T.

    Args:
        weight: [out, in]; computed in float64, returned in the weight's own type.
        rank: at most min(out, in).
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return _balanced(u, s, vh, rank, weight.dtype)


def _balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    root = s[:rank].sqrt()
    return Factors(up=(u[:, :rank] * root).to(dtype), down=(root[:, None] * vh[:rank]).to(dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What one SVD says of a weight: its factors, and the columns that need more than they give."""

    factors: Factors
    index: Tensor
    """int32, sorted."""


def split(weight: Tensor, rank: int, *, columns: int, score_rank: int) -> Split:
    """The spectral factors, and the columns whose remainder is largest (LOST).

    The score of column j is the norm of column j of sum S_i u_i v_i^T over r <= i < r + score_rank, that is
    ||S_i V_ij||, since U is orthonormal. Factors of full rank leave no remainder: then it is the norm in `weight`.

    Args:
        weight: [out, in], the true initial weight: of what the factors give there is no remainder but noise.
        columns: how many to choose.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rest = slice(rank, rank + score_rank) if rank < len(s) else slice(None)
    scores = (s[rest, None] * vh[rest]).norm(dim=0)
    index = scores.topk(columns).indices.sort().values.to(torch.int32)
    return Split(factors=_balanced(u, s, vh, rank, weight.dtype), index=index)


def cola(weight: Tensor, rank: int) -> Factors:
    """CoLA's random factors (arXiv 2502.10940): entries N(0, r^-1/2 (in + out)^-1/2); of `weight` only the shape.

    Their product without the activation has entries of standard deviation (in + out)^-1/2.
    """
    rows, columns = weight.shape
    spread = rank**-0.25 * (rows + columns) ** -0.25
    return Factors(
        up=spread * torch.randn(rows, rank, dtype=weight.dtype, device=weight.device),
        down=spread * torch.randn(rank, columns, dtype=weight.dtype, device=weight.device),
    )


def rebalanced(factors: Factors) -> Factors | None:
    """Factors of the same product with B^T B = A A^T, which no other split makes better conditioned.

    QR of both and an SVD of r x r, in float64: O((in + out) r^2), and the product changes only by the rounding of the
    result. A direction that the product lacks (a singular value of 0) keeps its row of A, so that it can come back;
    split evenly, both its parts would be 0 and get no gradient ever again.

    Returns:
        None where the product is 0: there is nothing to balance.
    """
    q_up, r_up = torch.linalg.qr(factors.up.double())
    q_down, r_down = torch.linalg.qr(factors.down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    if s[0] == 0:
        return None
    there = s > s[0] * torch.finfo(torch.float32).eps / len(s)
    root = s.sqrt()
    return Factors(
        up=(q_up @ (u * torch.where(there, root, 0.0))).to(factors.up.dtype),
        down=(torch.where(there, root, root[there].min())[:, None] * (vh @ q_down.T)).to(factors.down.dtype),
    )


class FactoredLinear(CompressedLinear):
    """A linear layer that holds factors, in training and, where they cannot be merged, for good.

    Its parameters are `down.weight`, `up.weight`, with a branch of columns `columns.weight`, and `bias`.

    Args:
        factors: the initial A and B.
        bias: [out] (shared, not copied), or None.
        activation: between the factors, a key of `ACTIVATIONS`.
        columns: S [out, columns], or None.
        index: the input columns that S reads, int32, sorted; of S's width, and empty without S.
        mix: the weight of the factors' branch, in [0, 1]; 1 without S.
        method: the owner, `Method.type`.

    r is the number of rows of A; K = len(index) columns.
    """

    index: Tensor
    """[K] int32, a buffer that is not saved with the weights."""

    def __init__(
        self,
        factors: Factors,
        *,
        bias: nn.Parameter | None,
        activation: str,
        columns: Tensor | None = None,
        index: Tensor | None = None,
        mix: float = 1.0,
        method: str,
    ) -> None:
        super().__init__()
        self.method = method
        self.in_features, self.out_features = factors.down.shape[1], factors.up.shape[0]
        self.activation = activation
        self.mix = mix
        self.down = plain_linear(factors.down.contiguous(), None)
        self.up = plain_linear(factors.up.contiguous(), None)
        self.columns = None if columns is None else plain_linear(columns.contiguous(), None)
        self.bias = bias
        empty = torch.empty(0, dtype=torch.int32, device=factors.up.device)
        self.register_buffer("index", empty if index is None else index, persistent=False)

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def merges(self) -> bool:
        """Whether the layer is a product with one matrix."""
        return self.activation == "none"

    @property
    def saves_nothing(self) -> bool:
        """Whether a plain layer would hold no more numbers."""
        return self.flops() >= 2 * self.in_features * self.out_features

    def effective_weight(self) -> Tensor:
        """mix * B A + (1 - mix) * S in its columns, [out, in], with gradients.

        Raises:
            ValueError: an activation lies between the factors.
        """
        if not self.merges:
            raise ValueError(f"no matrix is this layer: {self.activation} lies between its factors")
        product = self.up.weight @ self.down.weight
        if self.columns is None:
            return product
        return (self.mix * product).index_add(1, self.index, (1 - self.mix) * self.columns.weight)

    def flops(self) -> int:
        """2 r (in + out) + 2 K out."""
        return 2 * self.rank * (self.in_features + self.out_features) + 2 * len(self.index) * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(ACTIVATIONS[self.activation](self.down(x)))
        if self.columns is not None:
            y = self.mix * y + (1 - self.mix) * self.columns(x.index_select(-1, self.index))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def refactor(self) -> None:
        """Balance the factors in place (`rebalanced`); the function stays."""
        assert self.merges, "between an activation's two sides nothing can be exchanged"
        balanced = rebalanced(Factors(up=self.up.weight, down=self.down.weight))
        if balanced is not None:
            self.up.weight.copy_(balanced.up)
            self.down.weight.copy_(balanced.down)
