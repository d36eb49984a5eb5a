"""Codes and scales: what they mean, what is rounded, and how they are kept beside a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from lattices import adversarial, random_lattice

from edgewright.errors import BadInput
from edgewright.export.lattice import (
    SIDECAR,
    LatticeTensor,
    detect_ternary,
    load_sidecar,
    round_int,
    round_ternary,
    save_sidecar,
)
from edgewright.export.source import load_source


def slow_dequantize(lattice: LatticeTensor) -> np.ndarray:
    """By the definition, one weight at a time."""
    rows, columns = lattice.codes.shape
    out = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            g = 0 if lattice.group is None else j // lattice.group
            scale = lattice.scales[i if len(lattice.scales) > 1 else 0, g]
            out[i, j] = np.float32(lattice.codes[i, j]) * scale
    return out


@pytest.mark.parametrize(("group", "per_tensor"), [(None, True), (None, False), (3, False), (8, False), (100, False)])
def test_dequantize_follows_the_definition(group, per_tensor):
    lattice = random_lattice("int8", 3, 8, group, 0, per_tensor)
    assert np.array_equal(lattice.dequantize(), slow_dequantize(lattice))


def test_offsets_are_added_and_codebooks_looked_up():
    offset = random_lattice("uint4", 3, 8, 4, 1, offsets=True)
    assert offset.offsets is not None
    by_hand = offset.codes * np.repeat(offset.scales, 4, axis=1) + np.repeat(offset.offsets, 4, axis=1)
    assert np.array_equal(offset.dequantize(), by_hand.astype(np.float32))
    book = random_lattice("nf4", 3, 8, 4, 1)
    assert book.codebook is not None
    by_hand = book.codebook[book.codes] * np.repeat(book.scales, 4, axis=1)
    assert np.array_equal(book.dequantize(), by_hand)
    zero = random_lattice("uint4", 3, 8, 4, 1, zeros=True)
    assert zero.zeros is not None and zero.zeros.any()
    assert np.array_equal(zero.dequantize(), zero.codes * np.repeat(zero.scales, 4, axis=1))
    assert np.array_equal(zero.stored, zero.codes + np.repeat(zero.zeros, 4, axis=1))


def test_rows_take_their_scales_zero_points_and_offsets_along():
    order = np.array([2, 0, 1])
    for extras in ({"zeros": True}, {"offsets": True}):
        lattice = random_lattice("uint4", 3, 8, 4, 2, **extras)
        assert np.array_equal(lattice.rows_reordered(order).dequantize(), lattice.dequantize()[order])


@pytest.mark.parametrize(
    ("group", "per_tensor", "columns", "found_group", "found_scales"),
    [(None, True, 300, None, (1, 1)), (None, False, 300, None, (9, 1)), (256, False, 600, 256, (9, 3))],
)
def test_ternary_weights_are_recognised_exactly(group, per_tensor, columns, found_group, found_scales):
    lattice = random_lattice("ternary", 9, columns, group, 1, per_tensor)
    weight = lattice.dequantize()
    weight[weight == 0] *= -1  # -0.0 is what rounding a small negative weight gives
    found = detect_ternary(weight)
    assert found is not None
    assert (found.group, found.scales.shape, found.levels) == (found_group, found_scales, "ternary")
    assert np.array_equal(found.codes, lattice.codes)
    assert np.array_equal(found.scales, lattice.scales)


def test_what_is_not_ternary_is_not_taken_for_it():
    weight = random_lattice("ternary", 20, 512, None, 2).dequantize()
    assert detect_ternary(np.random.default_rng(0).standard_normal((20, 512)).astype(np.float32)) is None
    for bad in (weight[13, 300] * 1.001 + 1e-9, np.nan, np.inf):
        spoiled = weight.copy()
        spoiled[13, 300] = bad
        assert detect_ternary(spoiled) is None, bad
    assert detect_ternary(np.zeros(4, np.float32)) is None


def test_what_may_be_ternary_by_chance_is_not_taken_for_it():
    draw = np.random.default_rng(3)
    for shape in ((3, 7), (40, 64)):
        assert detect_ternary(np.zeros(shape, np.float32)) is None
    for rows in (1, 6, 300):
        assert detect_ternary(draw.standard_normal((rows, 1)).astype(np.float32)) is None
    pairs = np.repeat(draw.standard_normal((300, 1)).astype(np.float32), 2, axis=1)  # two equal weights a row
    assert detect_ternary(pairs) is None


def test_rows_of_zeros_do_not_hide_a_ternary_weight():
    lattice = random_lattice("ternary", 20, 300, None, 4)
    lattice.codes[:6] = 0
    lattice.codes[17] = 0
    found = detect_ternary(lattice.dequantize())
    assert found is not None and np.array_equal(found.dequantize(), lattice.dequantize())


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": np.zeros((2, 4), np.int16)},
        {"codes": np.full((2, 4), 2, np.int8)},
        {"scales": np.ones((3, 1), np.float32)},
        {"scales": np.ones((2, 1), np.float64)},
        {"scales": np.full((2, 1), np.inf, np.float32)},
        {"group": 2},
        {"group": 0},
        {"zeros": np.zeros((2, 1), np.int8)},
        {"zeros": np.ones((2, 1), np.int16), "codes": np.ones((2, 4), np.int8)},
        {"offsets": np.full((2, 1), np.nan, np.float32)},
        {"codebook": np.zeros(16, np.float32)},
    ],
)
def test_contradictions_are_refused(wrong):
    right = {"codes": np.zeros((2, 4), np.int8), "scales": np.ones((2, 1), np.float32), "group": None}
    with pytest.raises(ValueError, match=r"codes|scales|group|zeros|offsets|codebook"):
        LatticeTensor(**{**right, **wrong}, bits=2, levels="ternary")
    LatticeTensor(**right, bits=2, levels="ternary")


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32, 100])
def test_rounding_to_integers_is_to_the_nearest_code(bits, group):
    weight = adversarial(8, 200)
    lattice = round_int(weight, bits=bits, group=group, scale_dtype=np.float32)
    scales = np.repeat(lattice.scales, group or 200, axis=1)[:, :200]
    assert (np.abs(lattice.dequantize() - weight) <= 0.5000001 * scales).all()
    assert np.array_equal(lattice.dequantize()[0], weight[0])


def test_absmean_ternary():
    weight = np.array([[0.1, -0.4, 0.7, -0.8], [0, 0, 0, 0]], np.float32)
    lattice = round_ternary(weight)
    assert lattice.codes.tolist() == [[0, -1, 1, -1], [0, 0, 0, 0]]
    assert lattice.scales.tolist() == [[0.5], [0.0]]


# ---------------------------------------------------------------- sidecar


def test_the_sidecar_keeps_every_bit(tmp_path: Path):
    lattice = {
        "a.weight": random_lattice("ternary", 3, 512, 256, 7),
        "b.weight": random_lattice("int8", 3, 10, None, 8, per_tensor=True),
        "c.weight": random_lattice("uint4", 3, 64, 32, 9, zeros=True),
        "d.weight": random_lattice("uint4", 3, 64, 32, 9, offsets=True),
        "e.weight": random_lattice("nf4", 3, 64, 64, 9),
    }
    save_sidecar(tmp_path, lattice)
    back = load_sidecar(tmp_path)
    assert back.keys() == lattice.keys()
    for name, tensor in lattice.items():
        assert np.array_equal(back[name].codes, tensor.codes)
        assert np.array_equal(back[name].scales, tensor.scales)
        assert (back[name].group, back[name].bits, back[name].levels) == (tensor.group, tensor.bits, tensor.levels)
        for extra in ("zeros", "offsets", "codebook"):
            assert np.array_equal(getattr(back[name], extra), getattr(tensor, extra)), extra
    assert [path.name for path in tmp_path.iterdir()] == [SIDECAR]


def test_a_damaged_sidecar_is_named(tmp_path: Path):
    save_sidecar(tmp_path, {"a": random_lattice("ternary", 3, 4, None, 0)})
    whole = (tmp_path / SIDECAR).read_bytes()
    for damaged in (whole[:-1], whole.replace(b"edgewright-lattice", b"something-elsewise"), b""):
        (tmp_path / SIDECAR).write_bytes(damaged)
        with pytest.raises(BadInput, match="EW-320"):
            load_sidecar(tmp_path)


def test_lattice_and_weights_must_agree(ternary_model: Path, tmp_path: Path):
    directory = tmp_path / "model"
    shutil.copytree(ternary_model, directory)
    lattice = load_source(directory).lattice
    assert len(lattice) == 14
    save_sidecar(directory, lattice)
    assert load_source(directory).lattice.keys() == lattice.keys()
    lattice["model.layers.1.mlp.up_proj.weight"].codes[17, :3] = (1, -1, 0)
    save_sidecar(directory, lattice)
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*EW-321"):
        load_source(directory)
