"""Find the lattice that plain float weights lie on, so that they are kept bit for bit and never rounded again.

Weights of a group are `code * scale` with small integer codes, so their ratios to the largest of them are fractions
with small denominators. The least common multiple of the denominators is the code of the largest weight, which gives
the scale. Whatever is found this way is then compared with the weights, bit for bit: a dense weight cannot pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from edgewright.export.lattice import EVIDENCE, LatticeTensor, Levels, ceil_div, detect_ternary, grouped

GROUPS = (256, 128, 64, 32, 16)
"""Columns per scale to look for, after one scale per tensor and one per row."""

INTEGERS: tuple[tuple[Levels, int], ...] = (("int4", 8), ("int8", 128))
"""The lattices to look for, the coarser first, with the largest magnitude of their codes."""

TOLERANCE = 2.0**-21
"""How far a quotient of two float32 products may be from the fraction that it stands for (fractions with denominators
up to 128 are 250 times further apart)."""

PROBES = 16
"""Rows that tell a dense weight without touching the rest."""

_CHUNK = 1 << 20
"""Weights that are looked at together; float64 quotients take eight bytes each."""


class _Grouping(NamedTuple):
    group: int | None
    per_tensor: bool


_GROUPINGS = (_Grouping(None, True), _Grouping(None, False), *(_Grouping(group, False) for group in GROUPS))


def detect_lattice(weight: np.ndarray) -> LatticeTensor | None:
    """The lattice of a float32 weight `[rows, columns]`: ternary, else 4 or 8 bits; None when it has none."""
    return detect_ternary(weight) or detect_integer(weight)


def detect_integer(weight: np.ndarray) -> LatticeTensor | None:
    """The 4- or 8-bit lattice of a float32 weight, with a scale per tensor, row, or `GROUPS` columns.

    The coarsest that fits is taken, and scales that fp16 holds are preferred to smaller codes. An 8-bit lattice whose
    codes span no more than 16 values in any group is one of 4 bits with zero points. Returns None for a dense weight,
    and for one of zeros alone.
    """
    weight = np.asarray(weight, np.float32)
    if weight.ndim != 2 or not weight.size or _is_dense(weight) or not np.isfinite(weight).all():
        return None
    if not weight.any():
        return None
    rows = np.unique(np.linspace(0, len(weight) - 1, PROBES).astype(np.int64))
    largest = np.abs(weight).max()
    for levels, limit in INTEGERS:
        for grouping in _GROUPINGS:
            probe = _scales(weight[rows], grouping, limit, largest)
            if probe is None:
                continue
            scales = _scales(weight, grouping, limit, largest, hints=_common_codes(weight[rows], grouping, probe))
            found = None if scales is None else _lattice(weight, scales, grouping, levels, limit)
            if found is not None:
                return _with_zero_points(found)
    return None


def _is_dense(weight: np.ndarray) -> bool:
    """Whether a few weights tell that the whole has no lattice: each is one on every part of its groups as well."""
    rows = np.unique(np.linspace(0, len(weight) - 1, PROBES).astype(np.int64))
    part = weight[rows, : 4 * GROUPS[-1]]
    blocks = grouped(part, GROUPS[-1]).reshape(-1, GROUPS[-1])
    return _codes_of_the_largest(blocks, np.abs(blocks).max(axis=1), INTEGERS[-1][1]) is None


def _common_codes(weight: np.ndarray, grouping: _Grouping, scales: np.ndarray) -> list[int]:
    """The most frequent codes of the largest weight of a group, for scales that were found."""
    if grouping.per_tensor:
        return []
    maxima = np.abs(grouped(weight, grouping.group)).max(axis=2)
    codes, counts = np.unique(np.rint(maxima[scales != 0] / scales[scales != 0]), return_counts=True)
    return [int(code) for code in codes[np.argsort(-counts)][:4]]


def _scales(
    weight: np.ndarray, grouping: _Grouping, limit: int, largest: np.float32, hints: Sequence[int] = ()
) -> np.ndarray | None:
    """The scale of every group: float32 `[groups of a row or 1]`; None when a group has none.

    Args:
        weight: float32 `[rows, columns]`.
        grouping: which weights share a scale.
        limit: the largest magnitude of a code.
        largest: the largest magnitude in the whole tensor.
        hints: codes that the largest weight of a group may well have, which saves looking for them.
    """
    if grouping.group is not None and weight.shape[1] < grouping.group:
        return None
    blocks = grouped(weight, grouping.group)
    blocks = blocks.reshape(-1, blocks.shape[2])
    if grouping.per_tensor:
        codes = _codes_of_the_largest(blocks, np.full(len(blocks), largest), limit)
        if codes is None:
            return None
        common = np.lcm.reduce(np.unique(codes), keepdims=True)
        blocks, maxima = blocks.reshape(1, -1), np.full(1, largest)
        scales = _fitting(blocks, maxima, common, limit) if 0 < common[0] <= limit else np.full(1, np.nan)
    else:
        maxima = np.abs(blocks).max(axis=1)
        scales = np.where(maxima == 0, np.float32(0), np.float32(np.nan))
        for code in hints:
            _take_quotients(scales, blocks, maxima, np.full(len(blocks), code))
        left = np.flatnonzero(np.isnan(scales))
        rest = _codes_of_the_largest(blocks[left], maxima[left], limit) if len(left) else np.empty(0, np.int64)
        if rest is None:
            return None
        scales[left] = _fitting(blocks[left], maxima[left], rest, limit)
    if np.isnan(scales).any() or np.count_nonzero(weight) < EVIDENCE * np.count_nonzero(maxima):
        return None
    return scales.astype(np.float32).reshape(1 if grouping.per_tensor else len(weight), -1)


def _codes_of_the_largest(blocks: np.ndarray, maxima: np.ndarray, limit: int) -> np.ndarray | None:
    """The smallest code that each group's maximum may have: int64 `[groups]`; None when a group has none."""
    values, denominators = _fractions(limit)
    codes = np.empty(len(blocks), np.int64)
    step = max(1, _CHUNK // blocks.shape[1])
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        largest = np.where(maxima[part] == 0, np.float32(1), maxima[part]).astype(np.float64)
        ratio = np.abs(blocks[part]) / largest[:, None]
        above = np.minimum(np.searchsorted(values, ratio), len(values) - 1)
        below = np.maximum(above - 1, 0)
        nearest = np.where(values[above] - ratio < ratio - values[below], above, below)
        if (np.abs(values[nearest] - ratio) > TOLERANCE * ratio).any():
            return None
        found = np.lcm.reduce(denominators[nearest], axis=1)
        if ((found < 1) | (found > limit)).any():  # an overflow is negative or too large, or fails the comparison
            return None
        codes[part] = found
    return codes


@cache
def _fractions(limit: int) -> tuple[np.ndarray, np.ndarray]:
    """All fractions from 0 to 1 with denominators up to `limit`, sorted, and their denominators in lowest terms."""
    over = np.arange(1, limit + 1)
    values = (np.arange(limit + 1)[:, None] / over)[np.arange(limit + 1)[:, None] <= over]
    denominators = np.broadcast_to(over, (limit + 1, limit))[np.arange(limit + 1)[:, None] <= over]
    order = np.lexsort((denominators, values))
    values, first = np.unique(values[order], return_index=True)
    return values, denominators[order][first]


def _fitting(blocks: np.ndarray, maxima: np.ndarray, codes: np.ndarray, limit: int) -> np.ndarray:
    """The scale of each group, NaN where none gives its weights back bit for bit.

    The maximum over its code, or over a multiple of it, whichever fp16 holds first; else the quotient and its
    neighbours in float32, since the maximum itself is a rounded product.
    """
    scales = np.where(maxima == 0, np.float32(0), np.float32(np.nan))
    for multiple in range(1, limit + 1):
        candidate = maxima / (codes * multiple).astype(np.float32)
        with np.errstate(over="ignore"):
            exact = candidate.astype(np.float16).astype(np.float32) == candidate
        _take_fitting(scales, candidate, blocks, exact & (codes * multiple <= limit))
        if not np.isnan(scales).any():
            return scales
    _take_quotients(scales, blocks, maxima, codes)
    return scales


def _take_quotients(scales: np.ndarray, blocks: np.ndarray, maxima: np.ndarray, codes: np.ndarray) -> None:
    """Set the scales still missing to maximum over code, or to a neighbour of that in float32."""
    quotient = maxima / codes.astype(np.float32)
    for candidate in (quotient, np.nextafter(quotient, np.float32(0)), np.nextafter(quotient, np.float32(np.inf))):
        _take_fitting(scales, candidate, blocks, np.ones(len(scales), bool))


def _take_fitting(scales: np.ndarray, candidate: np.ndarray, blocks: np.ndarray, allowed: np.ndarray) -> None:
    """Set the scales still missing to the candidates that give all weights of their group."""
    index = np.flatnonzero(np.isnan(scales) & allowed & (candidate > 0))
    step = max(1, _CHUNK // blocks.shape[1])
    for start in range(0, len(index), step):
        part = index[start : start + step]
        scale = candidate[part][:, None]
        weights = blocks[part]
        fits = (np.rint(weights / scale) * scale == weights).all(axis=1)
        scales[part[fits]] = candidate[part[fits]]


def _lattice(
    weight: np.ndarray, scales: np.ndarray, grouping: _Grouping, levels: Levels, limit: int
) -> LatticeTensor | None:
    """The lattice with these scales; None when a group needs both ends of a range that has only the lower one."""
    columns = weight.shape[1]
    scales = scales.copy()
    per_weight = scales if grouping.group is None else np.repeat(scales, grouping.group, axis=1)[:, :columns]
    codes = np.rint(weight / np.where(per_weight == 0, np.float32(1), per_weight)).astype(np.int16)
    highest = _over_groups(np.maximum, codes, grouping)
    if (highest >= limit).any():  # a negative scale puts the positive extreme on the lower end, as ggml's Q4_0 does
        sign = np.where(highest >= limit, np.int16(-1), np.int16(1))
        scales *= sign
        codes *= sign if grouping.group is None else np.repeat(sign, grouping.group, axis=1)[:, :columns]
        if codes.max() >= limit:
            return None
    bits = {"int4": 4, "int8": 8}[levels]
    return LatticeTensor(codes=codes.astype(np.int8), scales=scales, group=grouping.group, bits=bits, levels=levels)


def _over_groups(reduce: np.ufunc, codes: np.ndarray, grouping: _Grouping) -> np.ndarray:
    """The extreme of the codes of each group, of the shape of the scales."""
    if grouping.per_tensor:
        extreme: np.ndarray = reduce.reduce(codes, axis=None, keepdims=True)
        return extreme
    starts = np.arange(ceil_div(codes.shape[1], grouping.group or codes.shape[1])) * (grouping.group or 0)
    found: np.ndarray = reduce.reduceat(codes, starts, axis=1)
    return found


def _with_zero_points(found: LatticeTensor) -> LatticeTensor:
    """An 8-bit lattice as one of 4 bits with zero points, where its codes allow that."""
    if found.levels != "int8":
        return found
    grouping = _Grouping(found.group, found.scales.size == 1 and len(found.codes) > 1)
    low = np.minimum(_over_groups(np.minimum, found.codes, grouping), 0).astype(np.int16)
    high = _over_groups(np.maximum, found.codes, grouping)
    if (high - low > 15).any() or (low < -15).any():
        return found
    return LatticeTensor(
        codes=found.codes, scales=found.scales, group=found.group, bits=4, levels="uint4", zeros=(-low).astype(np.int16)
    )
