"""Every bit layout, on random and adversarial lattices, against readers that others wrote."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattices import adversarial, extremes, random_lattice

from edgewright.export.lattice import LatticeTensor, detect_ternary, round_int, round_q4_0, round_q8_0
from edgewright.export.layout import (
    FORMATS,
    LAYOUTS,
    NF4,
    Q4_1,
    BitNet,
    Int8,
    MatMulNBits,
    Nf4,
    OpenVinoWeight,
    describe_layouts,
    exact_lattices,
)
from edgewright.export.rounding import round_nf4

GGML = {**FORMATS, "q4_1": Q4_1}


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Bit for bit, but -0.0 equals 0.0."""
    return left.shape == right.shape and bool((left == right).all())


# ---------------------------------------------------------------- ggml


def ggml_reads(name: str, data: np.ndarray, columns: int) -> np.ndarray:
    """What ggml's own C makes of rows of blocks."""
    llama_cpp = pytest.importorskip("llama_cpp")
    library = ctypes.CDLL(str(next(iter((llama_cpp.llama_cpp._base_path).glob("*ggml-base*")))))
    values = np.empty((len(data), columns), np.float32)
    function = getattr(library, f"dequantize_row_{name}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    data = np.ascontiguousarray(data)
    function(data.ctypes.data, values.ctypes.data, values.size)
    return values


def gguf_reads(name: str, data: np.ndarray, columns: int) -> np.ndarray:
    """What gguf-py makes of them; it does not know Q2_0."""
    if name == "q2_0":
        return ggml_reads(name, data, columns)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])


def of_ggml(name: str, group: int | None, per_tensor: bool, seed: int) -> LatticeTensor:
    """A lattice that the type holds, with all codes it has."""
    levels = {"q2_0": "uint2", "q4_1": "int4"}.get(name) or FORMATS[name].levels
    lattice = random_lattice(levels, 5, 1024, group, seed, per_tensor)
    if name != "q2_0":
        return lattice
    zeros = np.ones(lattice.scales.shape, np.int16)
    return LatticeTensor(
        codes=lattice.codes - np.int8(1), scales=lattice.scales, group=group, bits=2, levels="uint2", zeros=zeros
    )


GROUPINGS = [(None, True), (None, False), (256, False), (512, False), ("block", False)]


@pytest.mark.parametrize("name", sorted(GGML))
@pytest.mark.parametrize(("group", "per_tensor"), GROUPINGS)
@pytest.mark.parametrize("ternary", [False, True])
def test_blocks_of_ggml_read_back_as_others_read_them(name, group, per_tensor, ternary):
    form = GGML[name]
    columns_per_scale = form.block if group == "block" else group
    if ternary:
        lattice = random_lattice("ternary", 5, 1024, columns_per_scale, 3, per_tensor)
    else:
        lattice = of_ggml(name, columns_per_scale, per_tensor, 3)
    if name == "q4_1":
        lattice.codes[-1, :512] = 0
        lattice.scales.reshape(-1)[:1] = 2.0**-24
    else:
        lattice = extremes(lattice)
    data = form.pack(lattice)
    assert data.nbytes == lattice.codes.size * form.bits_per_weight / 8
    assert same(gguf_reads(name, data, 1024), lattice.dequantize())
    assert same(form.unpack(data).dequantize(), lattice.dequantize())


@pytest.mark.parametrize("name", ["q2_0", "q5_0", "q4_1", "tq1_0"])
def test_blocks_of_ggml_are_those_of_its_c_code(name):
    lattice = of_ggml(name, None, False, 4)
    assert same(ggml_reads(name, GGML[name].pack(lattice), 1024), lattice.dequantize())


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(GGML)))
def test_pack_and_unpack_are_inverse(seed, name):
    form = GGML[name]
    lattice = of_ggml(name, form.block, False, seed)
    data = form.pack(lattice)
    back = form.unpack(data)
    assert same(back.dequantize(), lattice.dequantize())
    assert np.array_equal(form.pack(back), data)


def test_q4_1_holds_offsets_and_zero_points():
    offsets = random_lattice("uint4", 4, 128, 32, 1, offsets=True)
    assert same(gguf_reads("q4_1", Q4_1.pack(offsets), 128), offsets.dequantize())
    back = Q4_1.unpack(Q4_1.pack(offsets))
    assert same(back.codes, offsets.codes)
    zeros = random_lattice("uint4", 4, 128, 32, 1, zeros=True)
    zeros.scales[...] = 2.0**-3  # so that zero * scale is exact
    assert same(gguf_reads("q4_1", Q4_1.pack(zeros), 128), zeros.dequantize())
    zeros.scales[...] = np.float32(np.float16(0.1))
    assert "an offset is not exact" in (Q4_1.holds_exactly(zeros) or "")


def test_ternary_bytes_are_those_of_ggml():
    weight = random_lattice("ternary", 4, 512, 256, 4).dequantize()
    found = detect_ternary(weight)
    assert found is not None
    for name in ("tq1_0", "tq2_0"):
        theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name.upper()])
        assert np.array_equal(FORMATS[name].pack(found), theirs)


RULES = {"q8_0": round_q8_0, "q4_0": round_q4_0}


@pytest.mark.parametrize("name", sorted(RULES))
def test_rounding_is_that_of_ggml_bit_for_bit(name):
    weight = adversarial(8, 256)
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(GGML[name].pack(RULES[name](weight)), theirs)
    with pytest.raises(ValueError, match="scales must be finite"):
        RULES[name](np.linspace(-1e7, 1e7, 32, dtype=np.float32)[None])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("layout", "lattice", "reason"),
    [
        (FORMATS["tq2_0"], random_lattice("ternary", 2, 704, None, 0), "704 columns are no multiple"),
        (FORMATS["tq2_0"], random_lattice("ternary", 2, 512, 128, 0), "straddles"),
        (FORMATS["tq1_0"], random_lattice("int4", 2, 512, None, 0), "codes reach"),
        (FORMATS["q4_0"], random_lattice("int8", 2, 512, None, 0), "codes reach"),
        (FORMATS["q8_0"], random_lattice("int8", 2, 512, 48, 0), "straddles"),
        (FORMATS["q2_0"], random_lattice("int2", 2, 512, 64, 0), "codes reach -2..1"),
        (FORMATS["q8_0"], random_lattice("nf4", 2, 512, 64, 0), "not codes times scales"),
        (FORMATS["q8_0"], random_lattice("uint4", 2, 512, 64, 0, offsets=True), "not codes times scales"),
        (Q4_1, random_lattice("int8", 2, 512, None, 0), "codes reach"),
        (MatMulNBits(bits=4, block=32), random_lattice("int8", 2, 256, None, 0), "codes reach"),
        (MatMulNBits(bits=2, block=128), random_lattice("ternary", 2, 256, 64, 0), "straddles"),
        (MatMulNBits(bits=4, block=32), random_lattice("uint4", 2, 256, 32, 0, zeros=True), "codes reach"),
        (OpenVinoWeight(element="i4", group=None), random_lattice("int4", 2, 256, 32, 0), "one per row"),
        (OpenVinoWeight(element="u4", group=64), random_lattice("int4", 2, 96, None, 0), "no multiple"),
        (Nf4(), random_lattice("int4", 2, 256, None, 0), "codes reach"),
        (Nf4(), random_lattice("ternary", 2, 96, None, 0), "straddles"),
        (Int8(), random_lattice("int8", 2, 256, 32, 0), "one per row"),
        (BitNet(), random_lattice("ternary", 4, 256, None, 0), "one per tensor"),
        (BitNet(), random_lattice("ternary", 6, 256, None, 0, per_tensor=True), "6 rows are no multiple of 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layout_says_what_it_cannot_hold(layout, lattice, reason):
    assert reason in (layout.holds_exactly(lattice) or "")
    with pytest.raises(ValueError, match=reason):
        layout.pack(lattice)


def test_scales_that_fp16_lacks_are_not_rounded_silently():
    exact = random_lattice("ternary", 4, 256, None, 0)
    for scale in (0.1, 1e-9, 1e6):
        scales = np.full((4, 1), scale, np.float32)
        inexact = LatticeTensor(codes=exact.codes, scales=scales, group=None, bits=2, levels="ternary")
        for layout in (FORMATS["tq2_0"], OpenVinoWeight(element="u2", group=None, scale=np.float16)):
            assert "not exact in float16" in (layout.holds_exactly(inexact) or "")
        for layout in (MatMulNBits(bits=2, block=32), Nf4(), BitNet()):
            assert layout.holds_exactly(inexact) is None
    assert FORMATS["tq2_0"].holds_exactly(exact) is None


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: f"{row.target}-{row.width}")
def test_the_table_is_true(row):
    """What it says is held is held, whatever the seed; one code or one scale too many is not."""
    holds = row.layout.holds
    low, high = holds.codes
    block = holds.granularity if isinstance(holds.granularity, int) else None
    per_tensor = holds.granularity == "tensor"
    draw = np.random.default_rng(7)
    codes = draw.integers(low, high + 1, (8, 512)).astype(np.int8)
    columns = 512 // (block or 512)
    shape = (1, 1) if per_tensor else (8, columns)
    scales = draw.uniform(0.01, 1, shape).astype(np.float16).astype(np.float32)
    level = "ternary" if (low, high) == (-1, 1) else "int8"
    lattice = LatticeTensor(codes=codes, scales=scales, group=block, bits=8, levels=level)
    assert row.layout.holds_exactly(lattice) is None
    finer = LatticeTensor(
        codes=codes,
        scales=draw.uniform(0.01, 1, (8, 64)).astype(np.float16).astype(np.float32),
        group=8,
        bits=8,
        levels=level,
    )
    assert row.layout.holds_exactly(finer) is not None
    if high < 127:
        codes[3, 5] = high + 1
        wider = LatticeTensor(codes=codes, scales=scales, group=block, bits=8, levels="int8")
        assert "codes reach" in (row.layout.holds_exactly(wider) or "")


def test_the_table_can_be_read():
    assert len(describe_layouts().splitlines()) == len(LAYOUTS)
    assert exact_lattices("gguf", "q8_0")[0].startswith("codes -128..127")
    assert exact_lattices("gguf", "f16") == []


# ---------------------------------------------------------------- MatMulNBits


def matmul_of_onnxruntime(
    layout: MatMulNBits, packed: np.ndarray, scales: np.ndarray, columns: int, zeros: np.ndarray | None
) -> np.ndarray:
    """The operator's own values of a weight: its product with the unit matrix, in float32."""
    import onnx
    import onnxruntime

    feeds = {"B": packed, "scales": scales} | ({} if zeros is None else {"zero_points": zeros})
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["A", *feeds],
        ["Y"],
        domain="com.microsoft",
        K=columns,
        N=len(packed),
        bits=layout.bits,
        block_size=layout.block,
        accuracy_level=1,
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("A", onnx.TensorProto.FLOAT, [columns, columns])],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in feeds.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"A": np.eye(columns, dtype=np.float32)})[0].T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("columns", [256, 172, 1])
def test_matmulnbits_reads_back_as_the_operator_documents(bits, block, columns):
    from edgewright.export.onnx.reader import dequantize

    levels = {2: "ternary", 4: "int4", 8: "int8"}[bits]
    lattice = extremes(random_lattice(levels, 3, columns, block, 6))
    layout = MatMulNBits(bits=bits, block=block)
    packed, scales = layout.pack(lattice)
    blocks = -(-columns // block)
    assert (packed.shape, packed.dtype) == ((3, blocks, block * bits // 8), np.uint8)
    assert scales.shape == (3, blocks)
    assert same(dequantize(packed, scales, bits=bits, columns=columns), lattice.dequantize())
    assert np.array_equal(layout.unpack(packed, scales, columns).codes, lattice.codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("block", "columns"), [(32, 96), (64, 192), (128, 128)])
@pytest.mark.parametrize("zeros", [False, True])
def test_matmulnbits_reads_back_as_onnxruntime_computes(bits, block, columns, zeros):
    levels = {2: "uint2", 4: "uint4", 8: "uint8"}[bits] if zeros else {2: "ternary", 4: "int4", 8: "int8"}[bits]
    lattice = random_lattice(levels, 5, columns, block, 8, zeros=zeros)
    layout = MatMulNBits(bits=bits, block=block, zero_points=zeros)
    packed, scales = layout.pack(lattice)
    points = layout.pack_zero_points(lattice) if zeros else None
    back = layout.unpack(packed, scales, columns, points)
    assert np.array_equal(back.codes, lattice.codes)
    assert same(back.dequantize(), lattice.dequantize())
    found = matmul_of_onnxruntime(layout, packed, scales, columns, points)
    assert np.allclose(found, lattice.dequantize(), rtol=1e-5, atol=0)


def test_matmulnbits_fills_the_last_block_with_the_code_of_zero():
    lattice = LatticeTensor(
        codes=np.array([[1, -1, 0]], np.int8), scales=np.ones((1, 1), np.float32), group=None, bits=2, levels="ternary"
    )
    packed, _ = MatMulNBits(bits=2, block=16).pack(lattice)
    assert packed.tolist() == [[[0b10_10_01_11, 0b10101010, 0b10101010, 0b10101010]]]  # low bits first, code + 2


def test_matmulnbits_knows_its_limits():
    with pytest.raises(ValueError, match="2, 4 or 8"):
        MatMulNBits(bits=3, block=32)


# ---------------------------------------------------------------- OpenVINO


def openvino_reads(
    layout: OpenVinoWeight, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, shape: tuple[int, int]
) -> np.ndarray:
    """What OpenVINO makes of a compressed constant."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    rows, columns = shape
    inner = [rows, columns] if layout.group is None else [rows, columns // layout.group, layout.group]
    kind = getattr(openvino.Type, layout.element)  # Type("u2") would be 16 bits
    tensor = openvino.Tensor(np.ascontiguousarray(packed), openvino.Shape(inner), kind)
    value = ops.convert(openvino.op.Constant(tensor, False), "f32")
    per_group = [rows, 1] if layout.group is None else [rows, columns // layout.group, 1]
    if zeros is not None:
        point = zeros.reshape([1] * len(inner)) if zeros.size == 1 else zeros.reshape(per_group)
        value = ops.subtract(value, ops.constant(point.astype(np.float32)))
    value = ops.multiply(value, ops.constant(scales.reshape(per_group).astype(np.float32)))
    value = ops.reshape(value, ops.constant(np.array(shape, np.int64)), False)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.Model([value], []), "CPU", settings)  # it owns the result
    return np.array(compiled()[0])


OPENVINO = [
    ("u2", "ternary", False),
    ("u2", "uint2", True),
    ("i4", "int4", False),
    ("u4", "int4", False),
    ("u4", "uint4", True),
    ("i8", "int8", False),
    ("u8", "int8", False),
    ("u8", "uint8", True),
]


@pytest.mark.parametrize(("element", "levels", "zeros"), OPENVINO)
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("scale", [np.float16, np.float32])
def test_compressed_constants_read_back_as_openvino_reads_them(element, levels, zeros, group, scale):
    lattice = random_lattice(levels, 6, 96, group, 9, zeros=zeros, precision=scale)
    layout = OpenVinoWeight(element=element, group=group, scale=scale)
    packed, scales, points = layout.pack(lattice)
    assert len(packed) == 6 * 96 * layout.bits // 8
    assert scales.dtype == scale
    back = layout.unpack(packed, scales, points, (6, 96))
    assert np.array_equal(back.codes, lattice.codes)
    assert same(back.dequantize(), lattice.dequantize())
    assert same(openvino_reads(layout, packed, scales, points, (6, 96)), lattice.dequantize())


def test_openvino_odd_shapes_round_trip():
    for rows, columns in ((1, 3), (3, 1), (1, 1), (5, 7)):
        lattice = random_lattice("ternary", rows, columns, None, 1)
        layout = OpenVinoWeight(element="u2", group=None)
        back = layout.unpack(*layout.pack(lattice), (rows, columns))
        assert same(back.dequantize(), lattice.dequantize())


# ---------------------------------------------------------------- transformers


def nf4_state(lattice: LatticeTensor) -> tuple[object, object]:
    """bitsandbytes' own objects for a packed weight."""
    import torch
    from bitsandbytes.functional import QuantState

    codes, absmax = Nf4().pack(lattice)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(lattice.codes.shape)}
    parts = {
        "absmax": torch.from_numpy(absmax),
        "quant_map": torch.from_numpy(NF4.copy()),
        "quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return torch.from_numpy(codes).reshape(-1, 1), QuantState.from_dict(parts, device=torch.device("cpu"))


@pytest.mark.parametrize("levels", ["nf4", "ternary"])
@pytest.mark.parametrize("group", [64, 128, None])
def test_nf4_reads_back_as_bitsandbytes_reads_it(levels, group):
    functional = pytest.importorskip("bitsandbytes.functional")
    lattice = extremes(random_lattice(levels, 6, 256, group, 10))
    codes, state = nf4_state(lattice)
    assert same(functional.dequantize_4bit(codes, state).numpy(), lattice.dequantize())
    packed, absmax = Nf4().pack(lattice)
    assert same(Nf4().unpack(packed, absmax, (6, 256)).dequantize(), lattice.dequantize())


def test_nf4_blocks_may_end_in_the_next_row():
    lattice = random_lattice("nf4", 2, 96, None, 11, per_tensor=True)
    packed, absmax = Nf4().pack(lattice)
    assert absmax.shape == (3,)
    back = Nf4().unpack(packed, absmax, (2, 96))
    assert back.group == 32
    assert same(back.dequantize(), lattice.dequantize())
    assert np.array_equal(Nf4().pack(back)[1], absmax)


def test_nf4_rounds_as_bitsandbytes_does():
    import torch

    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in (adversarial(8, 256), adversarial(8, 64), np.random.default_rng(0).standard_normal((6, 96))):
        weight = weight.astype(np.float32)
        codes, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
        packed, absmax = Nf4().pack(round_nf4(weight))
        assert np.array_equal(absmax, state.absmax.numpy())
        assert np.array_equal(packed, codes.numpy().ravel())
        assert np.array_equal(state.code.numpy(), NF4)


def test_int8_reads_back_as_bitsandbytes_reads_it():
    import torch

    functional = pytest.importorskip("bitsandbytes.functional")
    for lattice in (random_lattice("int8", 6, 40, None, 12), round_int(adversarial(8, 64), bits=8, group=None)):
        if Int8().holds_exactly(lattice) is not None:
            continue
        codes, absmax = Int8().pack(lattice)
        assert same(Int8().unpack(codes, absmax).dequantize(), lattice.dequantize())
        theirs = functional.int8_vectorwise_dequant(torch.tensor(codes), torch.tensor(absmax)).numpy()
        assert np.allclose(theirs, lattice.dequantize(), rtol=3e-7, atol=0)  # it multiplies by a rounded 1 / 127


@pytest.mark.parametrize("precision", [np.float16, np.float32])
def test_int8_holds_scales_of_half_precision_always(precision):
    draw = np.random.default_rng(13)
    scales = np.exp(draw.uniform(-9, 4, (4096, 1))).astype(precision).astype(np.float32)
    lattice = LatticeTensor(codes=np.ones((4096, 1), np.int8), scales=scales, group=None, bits=8, levels="int8")
    each = [
        Int8().holds_exactly(LatticeTensor(codes=lattice.codes[:1], scales=s[None], group=None, bits=8, levels="int8"))
        for s in scales
    ]
    held = sum(reason is None for reason in each)
    assert held == 4096 if precision is np.float16 else 4000 < held < 4096


@pytest.mark.parametrize("rows", [4, 8, 172])
@pytest.mark.parametrize("inverse", [False, True])
def test_bitnet_reads_back_as_transformers_reads_it(rows, inverse):
    import torch
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    lattice = random_lattice("ternary", rows, 24, None, 14, per_tensor=True)
    if inverse:
        lattice.scales[...] = 0.125  # its inverse is exact
    codes, scale = BitNet(inverse=inverse).pack(lattice)
    assert np.array_equal(pack_weights(torch.from_numpy(lattice.codes).clone()).numpy(), codes)
    with torch.compiler.set_stance("force_eager"):
        theirs = unpack_weights(torch.from_numpy(codes), dtype=torch.float32).numpy()
    assert same(theirs / scale if inverse else theirs * scale, lattice.dequantize())
    assert same(BitNet(inverse=inverse).unpack(codes, scale).dequantize(), lattice.dequantize())
    with pytest.raises(ValueError, match="codes lie in"):
        BitNet().unpack(np.full((1, 4), 0xFF, np.uint8), np.ones(1, np.float32))


def test_one_ternary_weight_is_the_same_bits_everywhere():
    """A scale per tensor goes through every format; what each gives back is one and the same."""
    lattice = random_lattice("ternary", 32, 512, None, 15, per_tensor=True)
    exact = lattice.dequantize()
    found: dict[str, np.ndarray] = {name: gguf_reads(name, form.pack(lattice), 512) for name, form in GGML.items()}
    for bits in (2, 4, 8):
        layout = MatMulNBits(bits=bits, block=128)
        found[f"onnx {bits}"] = layout.unpack(*layout.pack(lattice), 512).dequantize()
    for element in ("u2", "i4", "u4", "i8", "u8"):
        weight = OpenVinoWeight(element=element, group=None, scale=np.float16)
        found[f"openvino {element}"] = weight.unpack(*weight.pack(lattice), (32, 512)).dequantize()
    packed: tuple[tuple[str, Callable[[], np.ndarray]], ...] = (
        ("nf4", lambda: Nf4().unpack(*Nf4().pack(lattice), (32, 512)).dequantize()),
        ("int8", lambda: Int8().unpack(*Int8().pack(lattice)).dequantize()),
        ("bitnet", lambda: BitNet().unpack(*BitNet().pack(lattice)).dequantize()),
    )
    found |= {name: read() for name, read in packed}
    assert [name for name, values in found.items() if not same(values, exact)] == []
    assert len(found) == 18


def test_an_inverse_scale_gives_the_scale_back_or_is_refused():
    draw = np.random.default_rng(16)
    held = 0
    for scale in [*np.exp(draw.uniform(-9, 4, 1000)).astype(np.float32), np.float32(0), np.float32(1e-45)]:
        lattice = LatticeTensor(
            codes=np.ones((4, 4), np.int8), scales=scale.reshape(1, 1), group=None, bits=2, levels="ternary"
        )
        for layout in (BitNet(inverse=True), BitNet(inverse=True, scale=np.float16)):
            if layout.holds_exactly(lattice) is None:
                held += 1
                assert layout.unpack(*layout.pack(lattice)).scales == scale
            else:
                with pytest.raises(ValueError, match="the inverse of a scale"):
                    layout.pack(lattice)
    assert 700 < held < 1000


def through(layout: object, lattice: LatticeTensor) -> np.ndarray:
    """What a layout gives back of a lattice."""
    rows, columns = lattice.codes.shape
    match layout:
        case MatMulNBits():
            zeros = layout.pack_zero_points(lattice) if layout.zero_points else None
            return layout.unpack(*layout.pack(lattice), columns, zeros).dequantize()
        case OpenVinoWeight():
            return layout.unpack(*layout.pack(lattice), (rows, columns)).dequantize()
        case Nf4():
            return layout.unpack(*layout.pack(lattice), (rows, columns)).dequantize()
        case _:
            data = layout.pack(lattice)  # type: ignore[attr-defined]
            return layout.unpack(*(data if isinstance(data, tuple) else (data,))).dequantize()  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: f"{row.target} {row.width}")
@given(st.integers(1, 9), st.integers(1, 400), st.booleans(), st.integers(0, 99))
def test_one_group_as_long_as_the_row_is_a_scale_per_row(row, rows, columns, longer, seed):
    """Whatever the columns are: the group need not be a multiple of the block."""
    lattice = random_lattice("ternary", rows, columns, columns + 3 * longer, seed)
    by_row = random_lattice("ternary", rows, columns, None, seed)
    assert np.array_equal(lattice.scales, by_row.scales)
    assert (row.layout.holds_exactly(lattice) is None) == (row.layout.holds_exactly(by_row) is None)
    if row.layout.holds_exactly(lattice) is None:
        assert same(through(row.layout, lattice), lattice.dequantize())


def test_per_block_repeats_the_scale_of_the_only_group():
    lattice = random_lattice("ternary", 4, 100, 100, 17)
    assert np.array_equal(lattice.block_scales(32), np.repeat(lattice.scales, 4, axis=1))
