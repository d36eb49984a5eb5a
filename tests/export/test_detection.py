"""Weights on a lattice are recognised exactly; dense ones never."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lattices import random_lattice

from edgewright.export.detection import GROUPS, detect_integer, detect_lattice
from edgewright.export.lattice import LatticeTensor, round_int, round_q4_0, round_q8_0

NORMAL = np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32)


def found_in(lattice: LatticeTensor) -> LatticeTensor:
    found = detect_integer(lattice.dequantize())
    assert found is not None
    assert np.array_equal(found.dequantize(), lattice.dequantize())
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, *GROUPS])
@pytest.mark.parametrize("scale", [np.float16, np.float32])
def test_rounded_weights_give_their_scales_back(bits, group, scale):
    lattice = round_int(NORMAL, bits=bits, group=group, scale_dtype=scale)
    found = found_in(lattice)
    assert (found.levels, found.group, found.bits) == (lattice.levels, group, bits)
    assert np.array_equal(found.scales, lattice.scales)
    assert np.array_equal(found.codes, lattice.codes)


@pytest.mark.parametrize(("rule", "levels"), [(round_q4_0, "int4"), (round_q8_0, "int8")])
def test_the_stock_types_of_ggml_are_recognised(rule, levels):
    lattice = rule(NORMAL)
    assert lattice.scales.min() < 0 or levels == "int8"  # Q4_0 puts a positive extreme on code -8
    found = found_in(lattice)
    assert (found.levels, found.group) == (levels, 32)
    assert np.array_equal(found.scales, lattice.scales)


@pytest.mark.parametrize("levels", ["int4", "int8"])
def test_one_scale_for_the_whole_tensor(levels):
    lattice = random_lattice(levels, 24, 200, None, 1, per_tensor=True)
    found = found_in(lattice)
    assert (found.levels, found.group, found.scales.shape) == (levels, None, (1, 1))
    assert found.scales == lattice.scales


def test_learned_scales_need_no_extreme_code():
    """The largest weight may lie on any code, another one in every group."""
    draw = np.random.default_rng(3)
    tops = draw.integers(40, 120, (32, 4))
    codes = np.concatenate([draw.integers(-top, top + 1, (32, 64)) for top in tops[0]], axis=1).astype(np.int8)
    scales = draw.uniform(0.001, 0.1, (32, 4)).astype(np.float16).astype(np.float32)
    lattice = LatticeTensor(codes=codes, scales=scales, group=64, bits=8, levels="int8")
    assert found_in(lattice).group == 64


def test_scales_that_fp16_holds_are_preferred_to_smaller_codes():
    """All codes are multiples of 3, and 3 times the scale is not exact in fp16: the scale stays."""
    scale = np.float32(np.float16(0.01))
    codes = (3 * np.random.default_rng(4).integers(-2, 3, (8, 64))).astype(np.int8)
    lattice = LatticeTensor(codes=codes, scales=np.full((1, 1), scale), group=None, bits=4, levels="int4")
    assert (lattice.scales * 3).astype(np.float16) != lattice.scales * 3
    found = found_in(lattice)
    assert found.scales.astype(np.float16) == found.scales


def test_zero_points_are_found():
    lattice = random_lattice("uint4", 32, 256, 64, 5, zeros=True)
    assert lattice.zeros is not None
    found = found_in(lattice)
    assert (found.levels, found.group) == ("uint4", 64)
    assert found.zeros is not None and found.stored.min() >= 0 and found.stored.max() <= 15


def test_groups_of_zeros_and_zero_weights():
    lattice = round_int(NORMAL, bits=4, group=64, scale_dtype=np.float16)
    lattice.codes[3:6] = 0
    lattice.codes[:, 100:180] = 0
    weight = lattice.dequantize()
    weight[weight == 0] *= -1
    found = detect_integer(weight)
    assert found is not None
    assert np.array_equal(found.dequantize(), weight)


def test_one_weight_off_the_lattice_is_seen():
    weight = round_int(NORMAL, bits=8, group=None).dequantize()
    for bad in (np.nextafter(weight[17, 333], np.float32(9)), np.float32(np.nan), np.float32(np.inf)):
        spoiled = weight.copy()
        spoiled[17, 333] = bad
        assert detect_integer(spoiled) is None
    assert detect_integer(weight) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dense_weights_are_never_taken_for_a_lattice(dtype):
    """Many shapes, also a few columns a row, where chance would be kindest."""
    draw = np.random.default_rng(6)
    for _ in range(300):
        shape = int(draw.integers(1, 40)), int(draw.choice([1, 2, 4, 8, 16, 32, 48, 100]))
        weight = (draw.standard_normal(shape) * 0.02).astype(np.float32)
        assert detect_integer(torch.from_numpy(weight).to(dtype).float().numpy()) is None, shape


def test_rounding_a_lattice_to_bf16_takes_it_off_the_lattice():
    lattice = round_int(NORMAL, bits=8, group=None)
    rounded = torch.from_numpy(lattice.dequantize()).to(torch.bfloat16).float().numpy()
    assert detect_integer(rounded) is None


def test_ternary_comes_first():
    found = detect_lattice(random_lattice("ternary", 8, 64, None, 7).dequantize())
    assert found is not None and found.levels == "ternary"
    assert detect_lattice(NORMAL) is None
    assert detect_integer(np.zeros(4, np.float32)) is None
    assert detect_integer(np.zeros((0, 4), np.float32)) is None
