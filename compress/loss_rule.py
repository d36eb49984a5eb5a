"""The weighted losses of a chunk of tokens, with their gradient: what `chunked.chunked_loss` runs over both heads.

loss = scale * sum over counted tokens of sum_i weight_i T_i^2 D_i(q_i, t_i). The chunk's logits are overwritten with
the gradient. Inside a chunk the work goes block by block, small enough for a CPU's cache to hold what a loss needs in
between: so those blocks are neither slow nor large.

Shapes: C rows of a chunk, R rows of a block, V vocabulary of the student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgewright.chunked import IGNORED, ChunkRule
from edgewright.compress.divergences import RowDivergence
from edgewright.compress.sparse_losses import check_taken_at
from edgewright.compress.targets import Aligned, Logits, RowTargets, Sampled, Targets, TopK

BLOCK_BYTES = 2 * 2**20
"""Of float32 logits, on a CPU."""
FEWEST_ROWS = 8
"""Of a block, or single operations would be too short."""


class LogProbs:
    """log softmax(z / T) of some rows, made once for each temperature and vocabulary.

    Args:
        logits: [R, V], read only.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._made: dict[tuple[float, int], Tensor] = {}

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    def __call__(self, temperature: float, vocabulary: int) -> Tensor:
        """[R, vocabulary], of the first tokens alone."""
        key = (temperature, vocabulary)
        if key not in self._made:
            logits = self.logits[:, :vocabulary]
            self._made[key] = F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        return self._made[key]


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows, as a loss sees them."""

    student: LogProbs
    teacher: LogProbs | TopK | Sampled | Aligned | None
    """None where no loss asks for it."""
    labels: Tensor
    """[R] int64, `IGNORED` where a token is not counted."""


class TokenLoss(ABC):
    """A loss of each token's distribution."""

    temperature: float

    @abstractmethod
    def rows(self, block: Block) -> tuple[Tensor, Tensor]:
        """(loss [R], its gradient with respect to z / T [R, V'], new memory), without the factor T^2.

        V' is the student's vocabulary, or the part of it that the teacher has as well.
        """


@dataclass(frozen=True, slots=True)
class DenseLoss(TokenLoss):
    """A divergence between whole distributions, over the tokens that both models have.

    Rows of an embedding that only pad the vocabulary are in one of the two alone; without them both distributions add
    up to 1 again.
    """

    divergence: RowDivergence
    temperature: float

    def rows(self, block: Block) -> tuple[Tensor, Tensor]:
        assert isinstance(block.teacher, LogProbs), "the objective was checked"
        common = min(block.student.vocabulary, block.teacher.vocabulary)
        return self.divergence(block.student(self.temperature, common), block.teacher(self.temperature, common))


@dataclass(frozen=True, slots=True)
class SparseLoss(TokenLoss):
    """A loss against a few tokens of the teacher: those of a cache, or made here of its whole logits."""

    divergence: Callable[[Tensor, Any], tuple[Tensor, Tensor]]
    """(log q [R, V], the targets that it is for) -> as `RowDivergence`."""
    made: Callable[[Tensor], TopK | Sampled]
    """Targets of whole logits [R, V]."""
    temperature: float

    def rows(self, block: Block) -> tuple[Tensor, Tensor]:
        vocabulary = block.student.vocabulary
        targets = block.teacher
        if isinstance(targets, LogProbs):
            targets = self.made(targets.logits[:, :vocabulary])
        assert isinstance(targets, TopK | Sampled), "the objective was checked"
        check_taken_at(targets.temperature, self.temperature)
        return self.divergence(block.student(self.temperature, vocabulary), targets)


@dataclass(frozen=True, slots=True)
class CrossEntropy(TokenLoss):
    """-log softmax(z)[label], gradient softmax(z) - onehot, at temperature 1."""

    temperature: float = 1.0

    def rows(self, block: Block) -> tuple[Tensor, Tensor]:
        log_q = block.student(1.0, block.student.vocabulary)
        column = block.labels.clamp_min(0)[:, None]
        gradient = log_q.exp().scatter_add_(1, column, torch.full_like(column, -1, dtype=log_q.dtype))
        return -log_q.gather(1, column)[:, 0], gradient


def distillation_rule(
    losses: Sequence[TokenLoss], weights: Sequence[float], labels: Tensor, targets: Targets | None, *, scale: float
) -> ChunkRule:
    """The losses of a chunk, weighted and summed. Parts reported: each weighted loss; one of weight 0 is not computed.

    Args:
        labels: [N] int64; targets: of those N tokens, None where no loss asks for them.
        scale: 1 over the counted tokens of the whole optimizer step.
    """
    used = [(index, loss, weight) for index, (loss, weight) in enumerate(zip(losses, weights, strict=True)) if weight]

    def rule(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        parts = logits.new_zeros(len(losses))
        teacher = None if targets is None else targets.rows(rows)
        of_chunk = labels[rows]
        for window in _blocks(logits):
            block = Block(LogProbs(logits[window]), _of_block(teacher, window), of_chunk[window])
            counted = (block.labels != IGNORED).to(logits.dtype).mul_(scale)
            slopes = []
            for index, loss, weight in used:
                values, slope = loss.rows(block)
                parts[index] += weight * loss.temperature**2 * (values * counted).sum()
                slopes.append((slope, counted[:, None] * (weight * loss.temperature)))
            _overwrite(logits[window], slopes)
        return parts, logits

    return rule


def _blocks(logits: Tensor) -> list[slice]:
    """Rows of a chunk that are worked on at a time: on a GPU all."""
    total, vocabulary = logits.shape
    rows = max(FEWEST_ROWS, BLOCK_BYTES // (4 * vocabulary)) if logits.device.type == "cpu" else total
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def _overwrite(gradient: Tensor, slopes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put the sum of slope * factor there; a slope may have fewer columns."""
    gradient.zero_()
    for slope, factor in slopes:
        gradient[:, : slope.shape[-1]].addcmul_(slope, factor)


def _of_block(teacher: RowTargets | None, window: slice) -> LogProbs | TopK | Sampled | Aligned | None:
    if teacher is None:
        return None
    found = teacher.rows(window)
    return LogProbs(found.values) if isinstance(found, Logits) else found
