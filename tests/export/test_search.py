"""Searched scales: never worse than the plain rule, exact where the weight lies on a lattice, legal in every format."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.export.calibration.search import RANGES, rounded_to_half, search
from edgewright.export.lattice import LatticeTensor, round_q4_0, round_q8_0
from edgewright.export.layout import FORMATS, MatMulNBits

SHAPES = [(3, 32), (17, 96), (5, 40), (1, 33), (64, 256)]
PLAIN = {4: round_q4_0, 8: round_q8_0}
HALF = np.float32(2**-10)


def loss(weight: np.ndarray, lattice: LatticeTensor, importance: np.ndarray | None = None) -> float:
    squares = (weight.astype(np.float64) - lattice.dequantize()) ** 2
    return float((squares * (1 if importance is None else importance)).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_loses_less_than_the_plain_rule(shape, bits):
    rng = np.random.default_rng(shape[1] + bits)
    weight = rng.standard_t(4, shape).astype(np.float32)
    importance = rng.uniform(0.01, 3, shape[1]).astype(np.float32)
    padded = np.pad(weight, ((0, 0), (0, -shape[1] % 32)))
    plain = loss(padded, PLAIN[bits](padded))
    assert loss(weight, search(weight, bits=bits)) < plain * (0.95 if bits == 4 else 1.0)
    weighted = loss(weight, search(weight, importance, bits=bits), importance)
    assert weighted < (1.0 if bits == 4 else 1.0001) * loss(weight, search(weight, bits=bits), importance)


def test_it_is_near_the_best_of_all_scales():
    """Against every fp16 scale in a fine grid, on one group at a time."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        weight = rng.standard_t(4, (1, 32)).astype(np.float32)
        grid = rounded_to_half(np.abs(weight).max() / np.linspace(4, 12, 4000))
        grid = np.concatenate([grid, -grid])
        codes = np.clip(np.rint(weight / grid[:, None]), -8, 7)
        best = ((weight - codes * grid[:, None]) ** 2).sum(axis=1).min()
        assert loss(weight, search(weight, bits=4)) <= 1.06 * best


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_on_a_lattice_is_found_again(shape, bits):
    """Every group reaches an end of the range at 8 bits; at 4 bits any codes do."""
    rng = np.random.default_rng(7)
    low, high = RANGES[bits]
    rows, columns = shape
    codes = rng.integers(low, high + 1, shape).astype(np.int8)
    if bits == 8:
        codes[:, ::32] = high
    groups = -(-columns // 32)
    scales = rounded_to_half(rng.uniform(0.5, 1, (rows, groups)) * rng.choice([-1, 1], (rows, groups)) * HALF)
    right = LatticeTensor(codes=codes, scales=scales, group=32, bits=bits, levels="int4" if bits == 4 else "int8")
    found = search(right.dequantize(), rng.uniform(0.1, 1, columns).astype(np.float32), bits=bits)
    np.testing.assert_array_equal(found.dequantize(), right.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_all_formats_hold_what_it_gives(bits):
    weight = np.random.default_rng(1).standard_normal((8, 128)).astype(np.float32)
    found = search(weight, bits=bits)
    assert FORMATS[f"q{bits}_0"].holds_exactly(found) is None
    assert MatMulNBits(bits=bits, block=32).holds_exactly(found) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_strange_weights(bits):
    """Zeros, one huge value, tiny values, columns that nothing reaches: finite, and zeros stay zero."""
    weight = np.zeros((6, 64), np.float32)
    weight[1, 5], weight[2] = 60000.0, 1e-30
    weight[3, :32] = np.linspace(-1, 1, 32)
    weight[4] = np.float32(1e-6)
    weight[5, 40] = -3.0
    for importance in (None, np.zeros(64, np.float32), np.eye(64, dtype=np.float32)[0]):
        found = search(weight, importance, bits=bits).dequantize()
        assert np.isfinite(found).all()
        assert not found[0].any() and not found[3, 32:].any()
        assert found[1, 5] == pytest.approx(60000, rel=1e-3) and found[5, 40] == pytest.approx(-3, rel=1e-3)
        np.testing.assert_allclose(found[3, :32], weight[3, :32], atol=0.16 if bits == 4 else 0.01)
