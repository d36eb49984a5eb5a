"""Codes and scales: what is found, what is rounded, and every bit layout against an independent reader."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewright.errors import BadInput
from edgewright.export.lattice import (
    LEVELS,
    SIDECAR,
    LatticeTensor,
    detect_ternary,
    load_sidecar,
    round_int,
    round_q4_0,
    round_q8_0,
    round_ternary,
    save_sidecar,
)
from edgewright.export.layout import FORMATS, MatMulNBits
from edgewright.export.source import load_source


def random_lattice(levels: str, rows: int, columns: int, group: int | None, seed: int, per_tensor: bool = False):
    draw = np.random.default_rng(seed)
    low, high = LEVELS[levels]  # type: ignore[index]
    codes = draw.integers(low, high + 1, (rows, columns)).astype(np.int8)
    shape = (1, 1) if per_tensor else (rows, 1 if group is None else -(-columns // group))
    scales = np.exp(draw.uniform(-12, 8, shape)).astype(np.float16).astype(np.float32)
    return LatticeTensor(codes=codes, scales=scales, group=group, bits=8, levels=levels)  # type: ignore[arg-type]


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
    zero = detect_ternary(np.zeros((3, 7), np.float32))
    assert zero is not None and not zero.dequantize().any()


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
    ],
)
def test_contradictions_are_refused(wrong):
    right = {"codes": np.zeros((2, 4), np.int8), "scales": np.ones((2, 1), np.float32), "group": None}
    with pytest.raises(ValueError, match=r"codes|scales|group"):
        LatticeTensor(**{**right, **wrong}, bits=2, levels="ternary")
    LatticeTensor(**right, bits=2, levels="ternary")


# ---------------------------------------------------------------- block types of ggml


CASES = [
    (name, levels, group, per_tensor)
    for name, form in FORMATS.items()
    for levels in ("ternary", form.levels)
    for group, per_tensor in ((None, True), (None, False), (256, False), (512, False), (form.block, False))
]


@pytest.mark.parametrize(("name", "levels", "group", "per_tensor"), CASES)
def test_blocks_read_back_as_gguf_reads_them(name, levels, group, per_tensor):
    form = FORMATS[name]
    lattice = random_lattice(levels, 5, 1024, group, 3, per_tensor)
    lattice.codes[1, :512] = 0  # whole blocks of zeros keep their scale
    lattice.scales[0, 0] = 65504
    lattice.scales[-1, -1] = np.float32(2**-24)  # the smallest of fp16
    data = form.pack(lattice)
    assert data.nbytes == lattice.codes.size * form.bits_per_weight / 8
    reference = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(reference, lattice.dequantize())
    back = form.unpack(data)
    assert np.array_equal(back.codes, lattice.codes)
    assert np.array_equal(back.dequantize(), lattice.dequantize())


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(FORMATS)))
def test_pack_and_unpack_are_inverse(seed, name):
    form = FORMATS[name]
    lattice = random_lattice(form.levels, 2, 256, form.block, seed)
    back = form.unpack(form.pack(lattice))
    assert np.array_equal(back.codes, lattice.codes)
    assert np.array_equal(back.scales, lattice.scales)


def test_ternary_bytes_are_those_of_ggml():
    weight = random_lattice("ternary", 4, 512, 256, 4).dequantize()
    found = detect_ternary(weight)
    assert found is not None
    for name in ("tq1_0", "tq2_0"):
        theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name.upper()])
        assert np.array_equal(FORMATS[name].pack(found), theirs)


@pytest.mark.parametrize(
    ("name", "lattice", "reason"),
    [
        ("tq2_0", random_lattice("ternary", 2, 704, None, 0), "704 columns are no multiple"),
        ("tq2_0", random_lattice("ternary", 2, 512, 128, 0), "straddles"),
        ("tq1_0", random_lattice("int4", 2, 512, None, 0), "codes reach"),
        ("q4_0", random_lattice("int8", 2, 512, None, 0), "codes reach"),
        ("q8_0", random_lattice("int8", 2, 512, 48, 0), "straddles"),
    ],
)
def test_a_format_says_what_it_cannot_hold(name, lattice, reason):
    assert reason in (FORMATS[name].holds_exactly(lattice) or "")
    with pytest.raises(ValueError, match=reason):
        FORMATS[name].pack(lattice)


def test_scales_that_fp16_lacks_are_not_rounded_silently():
    exact = random_lattice("ternary", 2, 256, None, 0)
    for scale in (0.1, 1e-9, 1e6):
        inexact = LatticeTensor(
            codes=exact.codes, scales=np.full((2, 1), scale, np.float32), group=None, bits=2, levels="ternary"
        )
        assert "not exact in float16" in (FORMATS["tq2_0"].holds_exactly(inexact) or "")
    assert FORMATS["tq2_0"].holds_exactly(exact) is None


# ---------------------------------------------------------------- rounding


def adversarial(rows: int, columns: int) -> np.ndarray:
    draw = np.random.default_rng(5)
    weight = draw.standard_normal((rows, columns)).astype(np.float32)
    weight[0] = 0
    weight[1, 7] = 1e5  # one huge value in a block
    weight[2] *= 1e-6
    weight[3, :64] = -0.0
    weight[4] = np.round(weight[4] * 4) / 4  # many exact halves between codes
    weight[5] = 0.25
    return weight


@pytest.mark.parametrize(("name", "rule"), [("q8_0", round_q8_0), ("q4_0", round_q4_0)])
def test_rounding_is_that_of_ggml_bit_for_bit(name, rule):
    weight = adversarial(8, 256)
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(FORMATS[name].pack(rule(weight)), theirs)
    with pytest.raises(ValueError, match="scales must be finite"):
        rule(np.full((1, 32), 1e7, np.float32))


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


# ---------------------------------------------------------------- MatMulNBits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("columns", [256, 172, 1])
def test_matmulnbits_reads_back_as_the_operator_documents(bits, block, columns):
    from edgewright.export.onnx_reader import dequantize

    levels = {2: "ternary", 4: "int4", 8: "int8"}[bits]
    lattice = random_lattice(levels, 3, columns, block, 6)
    layout = MatMulNBits(bits=bits, block=block)
    packed, scales = layout.pack(lattice)
    blocks = -(-columns // block)
    assert (packed.shape, packed.dtype) == ((3, blocks, block * bits // 8), np.uint8)
    assert scales.shape == (3, blocks)
    assert np.array_equal(dequantize(packed, scales, bits=bits, columns=columns), lattice.dequantize())
    back = layout.unpack(packed, scales, columns)
    assert np.array_equal(back.codes, lattice.codes)


def test_matmulnbits_fills_the_last_block_with_the_code_of_zero():
    lattice = LatticeTensor(
        codes=np.array([[1, -1, 0]], np.int8), scales=np.ones((1, 1), np.float32), group=None, bits=2, levels="ternary"
    )
    packed, _ = MatMulNBits(bits=2, block=16).pack(lattice)
    assert packed.tolist() == [[[0b10_10_01_11, 0b10101010, 0b10101010, 0b10101010]]]  # low bits first, code + 2


def test_matmulnbits_knows_its_limits():
    with pytest.raises(ValueError, match="2, 4 or 8"):
        MatMulNBits(bits=3, block=32)
    with pytest.raises(ValueError, match="straddles"):
        MatMulNBits(bits=2, block=128).pack(random_lattice("ternary", 2, 256, 64, 0))
    with pytest.raises(ValueError, match="codes reach"):
        MatMulNBits(bits=4, block=32).pack(random_lattice("int8", 2, 256, None, 0))


# ---------------------------------------------------------------- sidecar


def test_the_sidecar_keeps_every_bit(tmp_path: Path):
    lattice = {
        "a.weight": random_lattice("ternary", 3, 512, 256, 7),
        "b.weight": random_lattice("int8", 3, 10, None, 8, per_tensor=True),
    }
    save_sidecar(tmp_path, lattice)
    back = load_sidecar(tmp_path)
    assert back.keys() == lattice.keys()
    for name, tensor in lattice.items():
        assert np.array_equal(back[name].codes, tensor.codes)
        assert np.array_equal(back[name].scales, tensor.scales)
        assert (back[name].group, back[name].bits, back[name].levels) == (tensor.group, tensor.bits, tensor.levels)
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
