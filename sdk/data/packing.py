"""Whole examples packed into sequences, and the batches that they make.

Best fit, the longest examples first (into the sequence with the least room left that is enough). An example of n tokens
takes n - 1 places: its last token is only predicted. Room that is left is padded, and never predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgewright.data.batches import IGNORED, Batch, Batches
from edgewright.data.examples import COUNTED
from edgewright.data.order import EndlessOrder

if TYPE_CHECKING:
    from edgewright.data.examples import ExampleStream


class PackedBatches(Batches):
    """The examples of a stream in sequences, in an endless seeded order.

    Args:
        stream: the examples, none longer than `sequence_length` + 1.
        sequence_length: `S`.
        seed: of the order.
        restart_at_documents: whether attention and positions start anew at each example.
        eos_id: what pads a sequence.
    """

    def __init__(
        self, stream: ExampleStream, *, sequence_length: int, seed: int, restart_at_documents: bool = True, eos_id: int
    ) -> None:
        self.stream: ExampleStream = stream
        self.sequence_length = sequence_length
        self.restart_at_documents = restart_at_documents
        self.eos_id = eos_id
        self._starts = stream.starts()
        self._counted = stream.flags & COUNTED
        self.packed = pack(np.diff(self._starts) - 1, sequence_length)
        self._order = EndlessOrder(len(self.packed), seed)

    @property
    def fill(self) -> float:
        """Share of the places that hold a token."""
        places = int((np.diff(self._starts) - 1).sum())
        return places / (len(self.packed) * self.sequence_length)

    def describe(self) -> str:
        share = self.stream.predicted / max(1, len(self.stream))
        packed = f"{self.stream.documents:,} examples in {len(self.packed):,} sequences, {self.fill:.0%} full"
        return f"{packed}; {share:.0%} of the tokens are learned"

    def document_at(self, sequence: int, position: int) -> tuple[int, int]:
        """The example that a position is in, the last one where it is padding, and which of its tokens; from 1."""
        examples = self.packed[sequence]
        ends = np.cumsum(np.diff(self._starts)[examples] - 1)
        number = min(int(np.searchsorted(ends, position, side="right")), len(examples) - 1)
        begin = int(ends[number - 1]) if number else 0
        return examples[number] + 1, position - begin + 1

    def rows(self, indices: list[int]) -> Batch:
        shape = (len(indices), self.sequence_length)
        inputs = np.full(shape, self.eos_id, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        documents = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int64)
        for row, index in enumerate(indices):
            place = 0
            for number, example in enumerate(self.packed[index]):
                begin, end = int(self._starts[example]), int(self._starts[example + 1])
                tokens = np.asarray(self.stream.tokens[begin:end], np.int64)
                there = slice(place, place + len(tokens) - 1)
                inputs[row, there] = tokens[:-1]
                labels[row, there] = np.where(self._counted[begin + 1 : end], tokens[1:], IGNORED)
                documents[row, there] = number
                positions[row, there] = np.arange(len(tokens) - 1)
                place = there.stop
            documents[row, place:] = number + 1  # the padding is looked at by nobody
            positions[row, place:] = np.arange(self.sequence_length - place)
        if not self.restart_at_documents:
            documents[:] = 0
            positions[:] = np.arange(self.sequence_length)
        return Batch(
            input_ids=inputs,
            labels=labels,
            position_ids=positions,
            document_ids=documents,
            has_borders=self.restart_at_documents and any(len(self.packed[index]) > 1 for index in indices),
            valid_tokens=int(np.count_nonzero(labels != IGNORED)),
            indices=indices,
        )


def pack(sizes: np.ndarray | Sequence[int], room: int) -> list[list[int]]:
    """Which examples go into which sequence, by best fit, the longest first; equal ones in their order.

    Args:
        sizes: places that each example takes, 1 to `room`.
        room: places of a sequence.

    Returns:
        The numbers of the examples of every sequence.
    """
    sizes = np.asarray(sizes)
    packed: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    there = 0  # bit r is set where a sequence has r places left
    for example in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[example])
        fitting = there >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            sequence = by_room[left].pop()
            if not by_room[left]:
                there ^= 1 << left
        else:
            left, sequence = room, len(packed)
            packed.append([])
        packed[sequence].append(example)
        rest = left - size
        if not by_room.setdefault(rest, []):
            there |= 1 << rest
        by_room[rest].append(sequence)
    return packed
