"""Packed sequences: fixed-length rows of the token stream with positions that restart at documents.

Rows overlap by one token: row i is `tokens[i * S : i * S + S + 1]`, its inputs are all but the last and its labels all
but the first, so every token but the very first is predicted exactly once in an epoch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from edgewright.data.order import EndlessOrder
from edgewright.data.shards import TokenStream
from edgewright.errors import BadInput

IGNORED = -100
"""A label that is not counted, as everywhere in PyTorch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`B` sequences of `S` tokens."""

    input_ids: np.ndarray
    """int64 [B, S]"""
    labels: np.ndarray
    """int64 [B, S]: the token that follows each input, -100 where it is not to be predicted."""
    position_ids: np.ndarray
    """int64 [B, S]: position inside the document (inside the row when documents are not kept apart)."""
    document_ids: np.ndarray
    """int32 [B, S]: number of the document inside the row, from 0."""
    has_borders: bool
    """Whether any row holds more than one document; if not, plain causal attention is right."""
    valid_tokens: int
    """Labels that count."""
    indices: list[int]
    """Which sequences of the stream these are."""


class Batches:
    """The sequences of a stream in an endless seeded order.

    Args:
        stream: the packed tokens.
        sequence_length: `S`.
        seed: of the order.
        restart_at_documents: whether attention and positions start anew at each document.
        start_id: token that starts a document.
        eos_id: token that ends one; the same as `start_id` where one token does both.

    Raises:
        BadInput: EW-212, the stream is shorter than one sequence.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        seed: int,
        restart_at_documents: bool = True,
        start_id: int,
        eos_id: int,
    ) -> None:
        assert type(stream) is TokenStream, "examples make sequences of their own: ask the stream for its `batches`"
        self.stream = stream
        self.sequence_length = sequence_length
        self.restart_at_documents = restart_at_documents
        self.start_id = start_id
        self.eos_id = eos_id
        count = sequences(len(stream), sequence_length)
        if not count:
            raise BadInput(
                "EW-212",
                "the text is shorter than one sequence",
                expected=f"more than {sequence_length:,} tokens",
                found=f"{len(stream):,} tokens",
                fix="give more text, or lower the sequence length",
            )
        self._order = EndlessOrder(count, seed)

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return self._order.count

    def describe(self) -> str | None:
        """What is to be said of how the sequences were made; None: nothing."""
        return None

    def index_at(self, position: int) -> int:
        """Which sequence is at a position of the endless order."""
        return int(self._order.at(position, 1)[0])

    def batch(self, position: int, size: int) -> Batch:
        """The `size` sequences from `position` of the endless order on; it may run across the end of an epoch."""
        return self.rows(self._order.at(position, size).tolist())

    def rows(self, indices: list[int]) -> Batch:
        """The sequences with these numbers, in this order."""
        length = self.sequence_length
        tokens = self.stream.tokens
        rows = np.stack([tokens[index * length : index * length + length + 1] for index in indices]).astype(np.int64)
        inputs, labels = rows[:, :-1].copy(), rows[:, 1:].copy()
        if self.start_id != self.eos_id:
            labels[labels == self.start_id] = IGNORED  # what document comes next is chance
        starts = inputs == self.start_id
        if not self.restart_at_documents:
            starts[:] = False
        starts[:, 0] = True
        columns = np.arange(length)
        document_ids = np.cumsum(starts, axis=1, dtype=np.int32) - 1
        position_ids = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        return Batch(
            input_ids=inputs,
            labels=labels,
            position_ids=position_ids.astype(np.int64),
            document_ids=document_ids.astype(np.int32),
            has_borders=bool(document_ids[:, -1].any()),
            valid_tokens=int(np.count_nonzero(labels != IGNORED)),
            indices=indices,
        )

    def document_at(self, sequence: int, position: int) -> tuple[int, int]:
        """The document that a position of a sequence is in, and which of its tokens that is; both from 1."""
        place = sequence * self.sequence_length + position
        starts = np.flatnonzero(np.asarray(self.stream.tokens[: place + 1]) == self.start_id)
        return max(1, len(starts)), place - int(starts[-1] if len(starts) else 0) + 1


class MixedBatches(Batches):
    """Two streams, each in an endless order of its own, in a fixed proportion at every position.

    Of the first p sequences floor(p * share) are of the second stream, so any stretch has its share to within one, and
    going on from a position needs nothing but the position.

    Args:
        first, second: of one sequence length and tokenizer.
        share: of the second, 0 < share <= 1.
    """

    def __init__(self, first: Batches, second: Batches, share: float) -> None:
        assert first.sequence_length == second.sequence_length and 0 < share <= 1
        self.first, self.second, self.share = first, second, Fraction(share).limit_denominator(10_000)
        self.sequence_length = first.sequence_length
        self.restart_at_documents = first.restart_at_documents

    def __len__(self) -> int:
        """Sequences of both; those of the second are numbered after those of the first."""
        return len(self.first) + len(self.second)

    def rows(self, indices: list[int]) -> Batch:
        border = len(self.first)
        parts = [self.first.rows([i]) if i < border else self.second.rows([i - border]) for i in indices]
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("input_ids", "labels", "position_ids", "document_ids")
        }
        return Batch(
            **arrays,
            has_borders=any(part.has_borders for part in parts),
            valid_tokens=sum(part.valid_tokens for part in parts),
            indices=indices,
        )

    def document_at(self, sequence: int, position: int) -> tuple[int, int]:
        inside = sequence - len(self.first)
        return self.first.document_at(sequence, position) if inside < 0 else self.second.document_at(inside, position)

    def batch(self, position: int, size: int) -> Batch:
        before = [int(p * self.share) for p in range(position, position + size + 1)]
        indices = []
        for p, (of_second, after) in enumerate(itertools.pairwise(before), start=position):
            mixed_in = after > of_second
            indices.append(
                self.second.index_at(of_second) + len(self.first) if mixed_in else self.first.index_at(p - of_second)
            )
        return self.rows(indices)


def sequences(tokens: int, sequence_length: int) -> int:
    """How many sequences a stream of `tokens` gives."""
    return max((tokens - 1) // sequence_length, 0)
