"""GPTQ against an independent reference (the paper's own form, one column at a time), and what it promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgewright.export.calibration.gptq import _Problem, damped, gptq, output_error
from edgewright.export.calibration.search import RANGES, rounded_to_half, search
from edgewright.export.lattice import LatticeTensor, round_q4_0
from edgewright.export.layout import FORMATS

SHAPES = [(5, 32), (16, 64), (40, 96), (7, 40), (3, 33), (2, 5)]


def correlated(columns: int, tokens: int = 600, seed: int = 0) -> np.ndarray:
    """Inputs `[tokens, columns]` whose columns depend on each other and differ in size."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) / np.sqrt(1 + np.arange(columns))[:, None]
    return rng.standard_normal((tokens, columns)) @ mixing * rng.uniform(0.2, 3, columns)


def weight_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, shape) * 0.05).astype(np.float32)


def paper(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, group: int, bits: int) -> np.ndarray:
    """Optimal brain quantization in a fixed order (arXiv:2210.17323, equations 2 and 3), with the inverse downdated.

    Args:
        hessian: damped, float64.
        scales: `[rows, groups]`, fixed.

    Returns:
        The codes.
    """
    low, high = RANGES[bits]
    left = weight.astype(np.float64).copy()
    inverse = np.linalg.inv(hessian)
    codes = np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        scale = scales[:, column // group]
        codes[:, column] = np.clip(np.rint(left[:, column] / scale), low, high)
        error = (left[:, column] - codes[:, column] * scale) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # the column is done: its row and column are zero from now on
    return codes


@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_is_the_papers(shape):
    """Equal codes for the scales that were chosen: another formula, the same numbers up to a tie."""
    weight, inputs = weight_of(shape), correlated(shape[1])
    found = gptq(weight, inputs.T @ inputs, bits=4, sweeps=0)
    expected = paper(weight, damped(inputs.T @ inputs, 0.01), found.scales.astype(np.float64), 32, 4)
    np.testing.assert_array_equal(found.codes, expected)


def test_descent_reaches_the_best_of_all_codes_in_a_tiny_problem():
    """Brute force over 16 ** 3 codes of a row with its final scale; coordinate descent may miss the best by little."""
    inputs = correlated(3, seed=4)
    hessian = inputs.T @ inputs
    weight = weight_of((12, 3), seed=4)
    found = gptq(weight, hessian, bits=4)
    everything = np.array(list(itertools.product(range(-8, 8), repeat=3)), np.float64)
    for row, scale, codes in zip(weight, found.scales[:, 0], found.codes, strict=True):
        errors = row - everything * scale
        costs = np.einsum("ni,ij,nj->n", errors, damped(hessian, 0.01), errors)
        error = row - codes * scale
        assert error @ damped(hessian, 0.01) @ error <= 1.3 * costs.min() + 1e-12


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_nearer_than_those_of_rounding(shape, bits):
    weight, inputs = weight_of(shape, seed=1), correlated(shape[1], seed=2)
    hessian = inputs.T @ inputs
    rounded = output_error(weight, search(weight, bits=bits), hessian)
    weighted = output_error(weight, search(weight, hessian.diagonal(), bits=bits), hessian)
    assert output_error(weight, gptq(weight, hessian, bits=bits), hessian) < min(rounded, weighted)


@pytest.mark.parametrize("shape", [(64, 96), (128, 256)])
def test_the_error_of_outputs_is_less_than_half(shape):
    """And it is measured right: the same number from the inputs themselves."""
    weight, inputs = weight_of(shape, seed=5), correlated(shape[1], tokens=2000, seed=6)
    hessian = inputs.T @ inputs
    plain, found = round_q4_0(weight), gptq(weight, hessian, bits=4)
    direct = float((((weight - found.dequantize()) @ inputs.T) ** 2).sum())
    assert output_error(weight, found, hessian) == pytest.approx(direct, rel=1e-6)
    assert direct < 0.5 * output_error(weight, plain, hessian)


def test_no_sweep_raises_the_cost_of_any_row():
    weight, inputs = weight_of((24, 96), seed=8).astype(np.float64), correlated(96, seed=8)
    problem = _Problem(damped(inputs.T @ inputs, 0.01), bits=4, group=32)
    codes, scales = problem.feedback(weight, (1.0,))

    def costs() -> np.ndarray:
        error = weight - codes * np.repeat(scales, 32, axis=1)
        return ((error @ problem.hessian) * error).sum(axis=1)

    before = costs()
    for _ in range(5):
        problem.descend(weight, codes, scales)
        assert (costs() <= before * (1 + 1e-9)).all()
        before = costs()
    assert before.sum() < 0.97 * costs_of_feedback(weight, problem)
    assert np.array_equal(scales, rounded_to_half(scales))
    assert np.mean(scales != problem.feedback(weight, (1.0,))[1]) > 0.3, "scales are fitted again as well"


def costs_of_feedback(weight: np.ndarray, problem: _Problem) -> float:
    codes, scales = problem.feedback(weight, (1.0,))
    error = weight - codes * np.repeat(scales, 32, axis=1)
    return float(((error @ problem.hessian) * error).sum())


@pytest.mark.parametrize("shape", [(9, 64), (4, 40)])
def test_what_lies_on_a_lattice_stays(shape):
    rng = np.random.default_rng(11)
    groups = -(-shape[1] // 32)
    right = LatticeTensor(
        codes=rng.integers(-8, 8, shape).astype(np.int8),
        scales=rounded_to_half(rng.uniform(0.01, 0.02, (shape[0], groups)) * rng.choice([-1, 1], (shape[0], groups))),
        group=32,
        bits=4,
        levels="int4",
    )
    inputs = correlated(shape[1])
    found = gptq(right.dequantize(), inputs.T @ inputs, bits=4)
    np.testing.assert_array_equal(found.dequantize(), right.dequantize())


def test_dead_inputs_are_rounded_and_disturb_nothing():
    weight, inputs = weight_of((10, 64), seed=12), correlated(64, seed=12)
    inputs[:, [3, 40, 63]] = 0
    found = gptq(weight, inputs.T @ inputs, bits=4)
    assert np.isfinite(found.dequantize()).all()
    error = np.abs(weight - found.dequantize())
    scales = np.abs(np.repeat(found.scales, 32, axis=1))
    clipped = np.isin(found.codes, (-8, 7))
    assert (error <= scales / 2 * (1 + 1e-6))[:, [3, 40, 63]][~clipped[:, [3, 40, 63]]].all()


@pytest.mark.parametrize("hessian", ["zero", "one token", "huge", "tiny"])
def test_poor_hessians(hessian):
    weight = weight_of((6, 64), seed=13)
    token = correlated(64, tokens=1)
    matrix = {
        "zero": np.zeros((64, 64)),
        "one token": token.T @ token,
        "huge": 1e25 * np.eye(64),
        "tiny": 1e-25 * np.eye(64),
    }[hessian]
    found = gptq(weight, matrix, bits=4)
    assert FORMATS["q4_0"].holds_exactly(found) is None
    assert np.abs(weight - found.dequantize()).max() < 0.5 * np.abs(weight).max()


def test_same_input_same_bits_and_rows_do_not_depend_on_each_other():
    weight, inputs = weight_of((12, 64), seed=14), correlated(64, seed=14)
    hessian = inputs.T @ inputs
    first, second = gptq(weight, hessian, bits=4), gptq(weight, hessian, bits=4)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scales, second.scales)
    np.testing.assert_array_equal(gptq(weight[3:5], 8 * hessian, bits=4).codes, first.codes[3:5])


def test_wrong_hessians_are_refused():
    weight = weight_of((2, 32))
    with pytest.raises(ValueError, match=r"finite \[32, 32\]"):
        gptq(weight, np.eye(31), bits=4)
    with pytest.raises(ValueError, match="finite"):
        gptq(weight, np.full((32, 32), np.nan), bits=4)
