"""The layer of `draft_head.py`: rows for some tokens, one row for all others, logits for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.layers import CompressedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrimmedHead(CompressedLinear):
    """y = x W^T + bias with W[v] = kept_rows[place[v]] where v is kept, and other_row for every other v.

    Args:
        linear: the head, [V, H]; its kept rows are copied, the other row begins as the mean of the rest.
        kept: int64 [K], sorted ids; rest: int64 [V - K], all others.
    """

    method = "draft_head"
    place: Tensor
    """int64 [V]: which of the K rows, K for the one of all others; in checkpoints, so that a run goes on with it."""

    def __init__(self, linear: nn.Linear, kept: Tensor, rest: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        place = torch.full((linear.out_features,), len(kept), dtype=torch.int64)
        place[kept] = torch.arange(len(kept))
        self.kept_rows = nn.Parameter(weight[kept.to(weight.device)].clone())
        self.other_row = nn.Parameter(weight[rest.to(weight.device)].mean(0, keepdim=True))
        self.register_buffer("place", place.to(weight.device))
        self.bias = linear.bias

    def effective_weight(self) -> Tensor:
        return torch.cat([self.kept_rows, self.other_row]).index_select(0, self.place)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    def flops(self) -> int:
        return 2 * self.in_features * self.out_features

    def kept_ids(self) -> list[int]:
        """The kept tokens, sorted."""
        found: list[int] = (self.place < len(self.kept_rows)).nonzero()[:, 0].tolist()
        return found

    def share_of(self, counts: np.ndarray | None) -> float:
        """Which part of a text, [V] counts, is kept tokens; 0 where no text was counted."""
        if counts is None or not counts.sum():
            return 0.0
        kept = np.array([token for token in self.kept_ids() if token < len(counts)])
        return float(counts[kept].sum() / counts.sum())


def by_frequency(counts: np.ndarray | None, number: int, rows: int, eos: int | None) -> tuple[Tensor, Tensor]:
    """The ids that come most often, the lower one where two come alike, and all others, both sorted.

    The end token is always among the first, once.

    Args:
        counts: [V] of a text; None: the first ids stand for them, where only shapes count, as in a plan.
        number: of ids.
        rows: of the head; ids from it on are none.
    """
    if counts is None:
        return torch.arange(number), torch.arange(number, rows)
    whole = np.zeros(rows, np.int64)
    whole[: min(rows, len(counts))] = counts[:rows]
    if eos is not None:
        whole[eos] = whole.max() + 1
    order = np.argsort(-whole, kind="stable")
    return torch.from_numpy(np.sort(order[:number])), torch.from_numpy(np.sort(order[number:]))


def untie(model: PreTrainedModel) -> None:
    """Let embedding and head have weights of their own from now on, also when the model is saved and opened again."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    config = model.config.get_text_config()
    config.tie_word_embeddings = model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
