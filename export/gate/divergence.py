"""How far two distributions over the next token are apart, position by position.

Shapes: logits are `[positions, vocab]`; every measure is `[positions]`, in nats where it has a unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TIE = 1e-3
"""Logits closer than this are equal: which of them wins says nothing about a model."""

BLOCK = 16
"""Neighbouring positions that are drawn together for an interval."""

DRAWS = 1000


def kl(right: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(right || found); infinite where `found` is not finite."""
    result = np.full(len(right), np.inf)
    for index in np.flatnonzero(np.isfinite(found).all(axis=1)):
        p, q = log_softmax(right[index]), log_softmax(found[index])
        result[index] = max(0.0, float((np.exp(p) * (p - q)).sum()))
    return result


def surprise(rows: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood of the token that followed each row."""
    return np.array([-log_softmax(row)[token] for row, token in zip(rows, tokens, strict=True)])


def regret(right: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How much less likely `right` finds the first choice of `found` than its own: 0 where both choose alike.

    This is top-1 agreement weighed by what the choice was worth. A change of the logits by d can only turn a choice
    whose first two logits are closer than 2 d; in a model with flat logits, one that was never trained, all are.
    """
    chosen = np.take_along_axis(right, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    lost: np.ndarray = right.max(axis=1) - chosen
    return lost


def interval(texts: Sequence[np.ndarray], *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean over all positions of several texts.

    Positions of one text are correlated (a hard passage is hard for many tokens, and the cache carries an error on),
    so the interval of independent positions would be too narrow. Blocks of 16 neighbours, which never reach over the
    end of a text, are drawn with replacement instead (block bootstrap, percentiles of 1000 draws). It speaks of these
    positions in texts like these; which texts a user has is another question, for `verify --data`.
    """
    blocks = [text[start : start + BLOCK] for text in texts for start in range(0, len(text), BLOCK)]
    sums, counts = (np.array(values, np.float64) for values in zip(*((b.sum(), len(b)) for b in blocks), strict=True))
    drawn = np.random.default_rng(seed).integers(len(blocks), size=(DRAWS, len(blocks)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    centre = sums.sum() / counts.sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return min(float(low), float(centre)), max(float(high), float(centre))


def log_softmax(rows: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    shifted = rows.astype(np.float64) - rows.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
