"""Work on several tensors at a time: in order, not far ahead, and errors where they belong."""

from __future__ import annotations

import threading

import pytest

from edgewright.export.in_order import AT_ONCE, in_order


def test_results_come_in_the_order_of_the_items():
    done = [threading.Event() for _ in range(6)]

    def work(index: int) -> int:
        if index % 2 == 0:
            done[index + 1].wait(10)
        done[index].set()
        return index

    assert list(in_order(work, range(6))) == list(range(6))


def test_it_is_never_far_ahead():
    begun = []
    results = in_order(begun.append, range(100))
    for taken in range(1, 50):
        next(results)
        assert len(begun) <= taken + AT_ONCE
    results.close()
    assert len(begun) <= 49 + AT_ONCE


def test_an_error_comes_in_the_place_of_its_result():
    begun = []

    def work(index: int) -> int:
        begun.append(index)
        if index == 3:
            raise ValueError("the third")
        return index

    results = in_order(work, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(results)
    assert len(begun) <= 3 + 1 + AT_ONCE
