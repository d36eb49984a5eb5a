"""Round to nearest with searched scales: the best lattice of a weight when its columns do not talk to each other.

The formats of 4 and 8 bits that all runtimes share keep one fp16 scale per 32 weights. Taking it from the largest
weight, as the plain rules do, spends codes on outliers; a scale that minimises the weighted squared error
`sum_j importance[j] * (w[j] - s * code[j])**2` loses less in the same bytes.
"""

from __future__ import annotations

import numpy as np

from edgewright.export.lattice import LatticeTensor, Levels, ceil_div, grouped

RANGES: dict[int, tuple[int, int]] = {4: (-8, 7), 8: (-127, 127)}
"""Codes by width, both ends included: those of Q4_0 and Q8_0, which the other layouts hold as well."""

LEVEL_NAMES: dict[int, Levels] = {4: "int4", 8: "int8"}

DIVISORS: dict[int, tuple[float, ...]] = {
    4: (*range(-8, 0), *range(1, 8), -9.0, -8.5, -7.5, -6.5, 6.5, 7.5, 8.0),
    8: (127.0, 126.0, 124.0, 122.0, 128.5),
}
"""Which code the weight of largest magnitude gets, candidate by candidate; the whole ones find a lattice again."""

_ROWS = 1 << 20
"""Weights worked on at a time."""


def search(weight: np.ndarray, importance: np.ndarray | None = None, *, bits: int, group: int = 32) -> LatticeTensor:
    """The lattice with searched scales.

    Args:
        weight: float32 `[rows, columns]`, finite.
        importance: float32 `[columns]`, not negative: what an error in a column counts, the mean square of the inputs
            that it meets; None counts all alike, and so does a group of columns that no input reaches.
        bits: 4 or 8.
        group: columns per scale; the last group of a row may be short.

    Returns:
        Codes in `RANGES` and scales that fp16 holds exactly (of either sign at 4 bits, where the range is not even).
    """
    rows, columns = weight.shape
    weights = grouped(np.broadcast_to(_floored(importance, columns, group), (1, columns)), group)[0]
    step = max(1, _ROWS // max(1, columns))
    scales = np.empty((rows, ceil_div(columns, group)), np.float32)
    for start in range(0, rows, step):
        scales[start : start + step] = best_scales(grouped(weight[start : start + step], group), weights, bits=bits)
    return with_scales(weight, scales, bits=bits, group=group)


def best_scales(groups: np.ndarray, weights: np.ndarray, *, bits: int) -> np.ndarray:
    """For each group the scale, exact in fp16, that loses least.

    Every candidate gives codes, those give the scale of least squares, and that is judged with its own codes.

    Args:
        groups: `[..., columns per group]`.
        weights: of the squared errors, broadcast against `groups`.
        bits: 4 or 8.
    """
    where = np.abs(groups).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(groups, where, axis=-1)[..., 0]
    best = np.zeros(extreme.shape, np.float32)
    least = np.full(extreme.shape, np.inf)
    for divisor in DIVISORS[bits]:
        first = rounded_to_half(extreme / divisor)
        codes = codes_of(groups, first, bits)
        fitted = rounded_to_half(_ratio((weights * codes * groups).sum(axis=-1), (weights * codes**2).sum(axis=-1)))
        for scales in (first, fitted):
            loss = (weights * (groups - scales[..., None] * codes_of(groups, scales, bits)) ** 2).sum(axis=-1)
            better = loss < least
            best, least = np.where(better, scales, best), np.where(better, loss, least)
    return best


def with_scales(weight: np.ndarray, scales: np.ndarray, *, bits: int, group: int) -> LatticeTensor:
    """The weight rounded to the nearest codes of given scales, float32 `[rows, groups]`."""
    rows, columns = weight.shape
    codes = codes_of(grouped(weight, group), scales, bits).reshape(rows, -1)[:, :columns]
    return LatticeTensor(
        codes=np.ascontiguousarray(codes, np.int8), scales=scales, group=group, bits=bits, levels=LEVEL_NAMES[bits]
    )


def codes_of(groups: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The nearest legal codes, as floats; `scales` has one axis less than `groups`. A scale of 0 gives codes of 0."""
    low, high = RANGES[bits]
    return np.clip(np.rint(_ratio(groups, scales[..., None])), low, high)


def rounded_to_half(scales: np.ndarray) -> np.ndarray:
    """float32 with the precision and the range of fp16; the largest fp16 for what is larger still."""
    limit = float(np.finfo(np.float16).max)
    return np.clip(scales, -limit, limit).astype(np.float16).astype(np.float32)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where below is 0."""
    zero = below == 0
    return np.where(zero, 0, above / np.where(zero, 1, below))


def _floored(importance: np.ndarray | None, columns: int, group: int) -> np.ndarray:
    """Positive weights `[columns]`: a column without inputs counts a millionth, so that its group has an optimum."""
    if importance is None:
        return np.ones(columns, np.float32)
    mean = float(np.mean(importance, dtype=np.float64))
    return np.asarray(importance, np.float32) + np.float32(1e-6 * mean if mean > 0 else 1.0)
