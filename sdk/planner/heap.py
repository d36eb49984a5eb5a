"""How much memory a C library's heap takes for a sequence of allocations: more than their sum, because it has holes.

glibc's rules as training meets them (`allocator.py`): blocks of 32 MiB and more are mapped by themselves and given
back; smaller ones come from a heap that only grows, each from the smallest hole that holds it and its alignment, so
that a hole of exactly a block's size does not hold it again. Small objects of the program settle between the blocks,
and holes on both sides of one never become one hole: how often that happens is measured (`SETTLED`), where it happens
is drawn, and moves the peak by some 5 %, so that the median of several draws is taken (`typical_peak`). Together that
is a tenth to a third of what a training process takes on a CPU.
"""

from __future__ import annotations

import random
import statistics
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

MAPPED_FROM = 32 * 2**20
SETTLED = 0.06
"""Share of blocks before which something small settles: between what fp32 and bf16 trainings show, 0.04 and 0.08."""
DRAWS = 7
"""Heaps with other places for the small objects; odd, so that the median is one of them."""
_HEADER, _SMALL, _SPARE, _PAGE = 16, 48, 96, 4096

Event = tuple[int, int]
"""(key, bytes) for a new block, (key, -1) for one that is freed."""


def typical_peak(events: Sequence[Event], again: Sequence[Event], repeats: int) -> int:
    """The most that a heap takes for a sequence of events whose end, `again`, then comes so many times more."""
    peaks = []
    for seed in range(DRAWS):
        heap = Heap(seed)
        heap.play(events)
        for _ in range(repeats):
            heap.play(again)
            heap.play((key, -1) for key, _ in again)
        peaks.append(heap.peak)
    return int(statistics.median(peaks))


class Heap:
    """A heap; `peak` is the most that it ever took, mapped blocks and all.

    Args:
        seed: of the draw where small objects settle.
    """

    def __init__(self, seed: int = 0) -> None:
        self.peak = 0
        self._top = 0
        self._mapped = 0
        self._blocks: dict[int, tuple[int, int]] = {}
        """(address, size) by key; the address is -1 where the block is mapped."""
        self._free: list[tuple[int, int]] = []
        """(size, address), sorted."""
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._chance = random.Random(seed)

    def play(self, events: Iterable[Event]) -> None:
        """Allocate and free; freeing what is not there is nothing, since parts of a sequence may be repeated."""
        for key, size in events:
            if size >= 0:
                self._allocate(key, size)
            elif key in self._blocks:
                self._release(*self._blocks.pop(key))

    def _allocate(self, key: int, size: int) -> None:
        if size >= MAPPED_FROM:
            size = -(-(size + _HEADER) // _PAGE) * _PAGE
            self._mapped += size
            self._blocks[key] = (-1, size)
        else:
            size = -(-(size + _HEADER) // 16) * 16
            self._blocks[key] = (self._place(size), size)
        self.peak = max(self.peak, self._top + self._mapped)

    def _place(self, size: int) -> int:
        """The address of a block: in the smallest hole that is large enough, or at the top."""
        settled = _SMALL if self._chance.random() < SETTLED else 0
        index = bisect_left(self._free, (size + _SPARE, 0))
        if index < len(self._free):
            hole, start = self._free[index]
            self._forget(start, hole)
            self._remember(start + settled + size, hole - settled - size)
            return start + settled
        start = self._top
        if start in self._ends:  # what is free below the top is part of it
            start = self._ends[start]
            self._forget(start, self._top - start)
        self._top = start + settled + size
        return start + settled

    def _release(self, address: int, size: int) -> None:
        if address < 0:
            self._mapped -= size
            return
        end = address + size
        if end in self._starts:
            after = self._starts[end]
            self._forget(end, after)
            end += after
        if address in self._ends:
            before = self._ends[address]
            self._forget(before, address - before)
            address = before
        self._remember(address, end - address)

    def _remember(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._starts[address] = size
        self._ends[address + size] = address

    def _forget(self, address: int, size: int) -> None:
        del self._free[bisect_left(self._free, (size, address))]
        del self._starts[address]
        del self._ends[address + size]
