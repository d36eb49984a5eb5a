"""What ONNX Runtime really computes a token with, by its own profile; and the surgery that leads there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgewright.export import to_genai
from edgewright.export.lattice import round_int, round_ternary
from edgewright.export.onnx.joining import join_products
from edgewright.export.onnx.packing import SCALE_FACTORS, Part, _least_squares, pack_at
from edgewright.export.onnx.reader import attributes, dequantize
from edgewright.export.source import load_source

FUSED_NORMS = {"SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}


def profile(folder: Path, scratch: Path) -> tuple[list[dict[str, Any]], onnx.ModelProto]:
    """The kernels of one token with a cache of three, and the graph after the runtime's own optimizations.

    The session options are those of genai_config.json, as far as they change what is computed.
    """
    import onnxruntime

    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    options.log_severity_level = 3
    for key, value in decoder["session_options"].items():
        if key.startswith("optimization."):
            options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {"input_ids": np.array([[7]]), "attention_mask": np.ones((1, 4), np.int64)}
    for layer in range(decoder["num_hidden_layers"]):
        for part in ("key", "value"):
            shape = (1, decoder["num_key_value_heads"], 3, decoder["head_size"])
            feeds[f"past_key_values.{layer}.{part}"] = np.zeros(shape, np.float32)
    session.run(["logits"], feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event["args"] | {"name": event["name"]} for event in events if event["name"].endswith("_kernel_time")]
    return kernels, onnx.load(scratch / "optimized.onnx", load_external_data=False)


def test_a_ternary_token_is_computed_by_the_fast_kernels_alone(ternary_model: Path, tmp_path: Path) -> None:
    """Two layers: 4 products each (q, k and v are one, gate and up another) and the head; fused attention and norms.

    MatMulNBits is fast at 2 bits with accuracy level 4 and blocks of 32 to 128 only: all else falls back, silently.
    """
    to_genai.write(load_source(ternary_model), tmp_path / "out", quant="ternary", embedding_quant="int8")
    kernels, optimized = profile(tmp_path / "out", tmp_path)
    ran = Counter(kernel["op_name"] for kernel in kernels)
    assert ran["MatMulNBits"] == 2 * 4 + 1 and ran["GroupQueryAttention"] == 2
    assert sum(ran[kind] for kind in FUSED_NORMS) == 2 * 2 + 1 and ran["SkipSimplifiedLayerNormalization"] >= 3
    assert ran["GatherBlockQuantized"] == 1
    assert ran["Split"] == 2, "gate from up; attention takes queries, keys and values as one"
    unwanted = {"MatMul", "Gemm", "FusedMatMul", "DequantizeLinear", "ReduceMean", "Softmax", "Expand", "Pow"}
    assert not unwanted & set(ran)
    assert {kernel["provider"] for kernel in kernels} == {"CPUExecutionProvider"}
    products = [attributes(node) for node in optimized.graph.node if node.op_type == "MatMulNBits"]
    assert Counter(values["bits"] for values in products) == {2: 8, 8: 1}
    assert all(values["accuracy_level"] == 4 and values["block_size"] in (32, 64, 128) for values in products)


# ---------------------------------------------------------------- gate and up


def two_products(block_of_up: int = 128) -> ir.Model:
    rng = np.random.default_rng(0)
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info("x", 1, ["n", 256])], [])
    for part, block in (("gate", 128), ("up", block_of_up)):
        weight = f"model.layers.0.mlp.{part}_proj.weight"
        codes = rng.integers(85, 170, (256, 256 // block, block // 4), np.uint8)
        scales = rng.random((256, 256 // block), np.float32)
        names = [f"{weight}_Q2", f"{weight}_scales"]
        graph.initializer.extend(map(numpy_helper.from_array, (codes, scales), names))
        values = {"K": 256, "N": 256, "bits": 2, "block_size": block, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", *names], [part], f"/{part}_proj", domain="com.microsoft", **values)
        graph.node.append(node)
        graph.node.append(helper.make_node("Relu", [part], [f"{part}_out"]))
        graph.output.append(helper.make_tensor_value_info(f"{part}_out", 1, ["n", 256]))
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports))


def values_of(model: ir.Model) -> Iterator[np.ndarray]:
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            codes, scales = (value.const_value.numpy() for value in node.inputs[1:3])
            yield dequantize(codes, scales, bits=2, columns=256)


def test_gate_and_up_become_one() -> None:
    model = two_products()
    before = list(values_of(model))
    join_products(model)
    product, split = list(model.graph)[:2]
    assert product.attributes["N"].as_int() == 512 and split.op_type == "Split"
    assert [next(iter(part.uses()))[0].outputs[0].name for part in split.outputs] == ["gate_out", "up_out"]
    assert product.inputs[1].name == "model.layers.0.mlp.gate_proj.weight+model.layers.0.mlp.up_proj.weight_Q2"
    np.testing.assert_array_equal(next(values_of(model)), np.concatenate(before))
    assert len(model.graph.initializers) == 3, "codes, scales, and the sizes of the parts"


def test_unlike_products_stay_apart() -> None:
    model = two_products(block_of_up=64)
    join_products(model)
    assert [node.op_type for node in model.graph].count("MatMulNBits") == 2


def test_least_squares_loses_less_than_the_rule_of_q4_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of a head's block of 128 is searched."""
    weight = np.random.default_rng(0).standard_normal((64, 200)).astype(np.float32)
    weight[0] = 0

    def error() -> float:
        codes, scales = _least_squares(weight, 128)
        found = codes * np.repeat(scales, 128, axis=1)[:, :200]
        assert codes.min() >= -8 and codes.max() <= 7 and not found[0].any()
        return float(np.square(found - weight).sum())

    assert len(SCALE_FACTORS) > 1
    searched = error()
    monkeypatch.setattr("edgewright.export.onnx.packing.SCALE_FACTORS", (1.0,))
    assert searched < error()


def test_a_lattice_of_the_head_keeps_its_own_blocks() -> None:
    """A head without one is rounded in blocks of 128; what was trained or calibrated in others stays as it is."""
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for lattice, block in ((None, 128), (round_int(weight, bits=4, group=32), 32), (round_ternary(weight), 128)):
        packed, reason = pack_at([Part(name="lm_head.weight", weight=weight, lattice=lattice)], "int4", own_head=True)
        assert packed is not None and not reason and packed.layout.block == block
        if lattice is not None:
            np.testing.assert_array_equal(packed.lattices[0].dequantize(), lattice.dequantize())
