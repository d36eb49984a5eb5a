"""The order of training: a seeded permutation of the sequences that needs no memory and starts anywhere.

A balanced Feistel network is a bijection on 2^(2h) numbers whatever its round function is; walking on from a number
that is out of range until one is in range makes it a bijection on [0, n). (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002.) So the state of the data order is one number, and resuming costs the same at any size.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MINIMUM_HALF_BITS = 2
"""Fewer bits would leave a small corpus only a handful of different orders."""


class EndlessOrder:
    """The numbers below `count` again and again, in a fresh order each time round.

    Args:
        count: how many there are, at least 1.
        seed: any integer; the same seed gives the same order on every machine.
    """

    def __init__(self, count: int, seed: int) -> None:
        assert count >= 1
        self.count = count
        self._seed = np.uint64(seed % (1 << 64))
        self._half_bits = max((max(count - 1, 1).bit_length() + 1) // 2, _MINIMUM_HALF_BITS)

    def at(self, position: int, size: int) -> np.ndarray:
        """The numbers at `position` to `position + size`: int64 [size]."""
        positions = np.arange(position, position + size, dtype=np.uint64)
        rounds, values = np.divmod(positions, np.uint64(self.count))
        keys = _mix(_mix(np.full(size, self._seed)) ^ _mix(rounds + np.uint64(1)))
        values = self._encrypt(values, keys)
        while (outside := np.flatnonzero(values >= np.uint64(self.count))).size:
            values[outside] = self._encrypt(values[outside], keys[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> half, values & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
        return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): uint64 to uint64, wrapping."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
