"""The endless seeded order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.data.order import EndlessOrder


@pytest.mark.parametrize("count", [*range(1, 40), 255, 256, 257, 1000, 4095, 4097, 100_003])
def test_every_epoch_is_a_permutation(count: int) -> None:
    order = EndlessOrder(count, seed=7)
    for epoch in (0, 1, 5):
        assert np.array_equal(np.sort(order.at(epoch * count, count)), np.arange(count))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 500), st.integers(0, 2**70), st.integers(0, 3000), st.lists(st.integers(1, 50), max_size=8))
def test_the_order_does_not_depend_on_how_it_is_asked_for(count: int, seed: int, start: int, sizes: list[int]) -> None:
    order = EndlessOrder(count, seed)
    parts, position = [], start
    for size in sizes:
        parts.append(order.at(position, size))
        position += size
    whole = order.at(start, position - start)
    assert np.array_equal(np.concatenate([whole[:0], *parts]), whole)


def test_epochs_and_seeds_differ_and_are_well_mixed() -> None:
    count = 2000
    first, second = EndlessOrder(count, 1).at(0, 2 * count).reshape(2, count)
    other = EndlessOrder(count, 2).at(0, count)
    for left, right in ((first, second), (first, other), (first, np.arange(count)), (first[:-1], first[1:])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.1
        assert np.count_nonzero(left == right) < 10


def test_every_first_place_is_taken_about_equally_often() -> None:
    firsts = np.array([EndlessOrder(10, seed).at(0, 1)[0] for seed in range(1000)])
    assert np.all(np.abs(np.bincount(firsts, minlength=10) - 100) < 40)


def test_the_order_is_the_same_for_ever() -> None:
    assert EndlessOrder(1000, seed=1).at(0, 6).tolist() == KNOWN
    assert EndlessOrder(10**12, seed=1).at(3 * 10**12 - 2, 4).tolist() == KNOWN_LARGE


KNOWN = [434, 370, 899, 594, 257, 596]
KNOWN_LARGE = [563894126692, 585851771083, 334944556745, 725609063614]
