"""The measures of the gate, against torch and by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.export.gate.divergence import BLOCK, interval, kl, regret, surprise


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    right, found = (draw.standard_normal((50, 40)).astype(np.float32) * 3 for _ in range(2))
    return right, found


def test_kl_is_that_of_torch(rows):
    right, found = rows
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(found).log_softmax(1),
        torch.from_numpy(right).log_softmax(1),
        log_target=True,
        reduction="none",
    ).sum(1)
    assert np.allclose(kl(right, found), expected.numpy(), rtol=1e-4)
    found[3, 7] = np.nan
    assert np.flatnonzero(np.isinf(kl(right, found))).tolist() == [3]


def test_surprise_is_the_cross_entropy_of_torch(rows):
    right, _ = rows
    tokens = list(range(40)) + list(range(10))
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(right), torch.tensor(tokens), reduction="none")
    assert np.allclose(surprise(right, tokens), expected.numpy(), rtol=1e-4)


def test_regret_is_what_the_other_choice_costs():
    right = np.array([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [2.0, 1.9, 0.0]], np.float32)
    found = np.array([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0]], np.float32)
    assert regret(right, found) == pytest.approx([0, 2, 0.1], abs=1e-6)


def test_the_interval_covers_the_mean_of_correlated_positions():
    """Texts whose positions lean on each other: the mean of all texts lies in nearly all intervals, where the interval
    of independent positions misses it often."""
    draw = np.random.default_rng(0)
    covered, naive = 0, 0
    for seed in range(200):
        texts = [_correlated(draw, 128) for _ in range(4)]
        values = np.concatenate(texts)
        low, high = interval(texts, seed=seed)
        covered += low <= 1 <= high
        naive += abs(values.mean() - 1) <= 1.96 * values.std() / np.sqrt(len(values))
    assert covered >= 170
    assert naive < 140


def _correlated(draw: np.random.Generator, count: int) -> np.ndarray:
    """Skewed and positive, as KLs are, with mean 1; each is mostly what its neighbour was."""
    value, values = float(draw.exponential()), []
    for _ in range(count):
        if draw.random() < 0.2:
            value = float(draw.exponential())
        values.append(value)
    return np.array(values)


def test_the_interval_is_a_point_where_nothing_varies():
    assert interval([np.full(3 * BLOCK, 0.25)]) == (0.25, 0.25)
    assert interval([np.array([0.5])]) == (0.5, 0.5)
