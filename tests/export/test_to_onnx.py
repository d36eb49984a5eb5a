"""ONNX folders: what lies in them, and that it is the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgewright.errors import BadInput
from edgewright.export import to_onnx
from edgewright.export.artifact import Written, digest
from edgewright.export.lattice import LatticeTensor
from edgewright.export.onnx import plain_reader as onnx_plain_reader
from edgewright.export.onnx.reader import attributes, dequantize
from edgewright.export.runtimes.onnx import OnnxSession
from edgewright.export.source import Source, load_source


class Folder:
    """A folder and what its writer said about it."""

    def __init__(self, path: Path, source: Source, written: Written) -> None:
        self.path, self.source, self.written = path, source, written
        self.graph = onnx.load(path / "model.onnx", load_external_data=False).graph

    def nodes(self, kind: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type == kind]

    def read(self) -> dict[str, np.ndarray]:
        return dict(onnx_plain_reader.read_weights(self.path, self.source))

    def place(self, initializer: str) -> dict[str, str]:
        """Where in the data file a tensor lies."""
        tensor = next(tensor for tensor in self.graph.initializer if tensor.name == initializer)
        return {entry.key: entry.value for entry in tensor.external_data}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folder]:
    """`folder(model, quant, embedding_quant)`, each written once."""
    made: dict[Any, Folder] = {}

    def of(model: Path, quant: str, embedding_quant: str | None = None) -> Folder:
        key = (model, quant, embedding_quant)
        if key not in made:
            path, source = tmp_path_factory.mktemp("onnx") / "folder", load_source(model)
            written = to_onnx.write(source, path, quant=quant, embedding_quant=embedding_quant)
            made[key] = Folder(path, source, written)
        return made[key]

    return of


@pytest.fixture
def ternary(folder: Callable[..., Folder], ternary_model: Path) -> Folder:
    return folder(ternary_model, "ternary", "int8")


@pytest.fixture
def awkward(folder: Callable[..., Folder], awkward_model: Path) -> Folder:
    return folder(awkward_model, "ternary", "int4")


@pytest.fixture
def gpt2(folder: Callable[..., Folder], tiny_model: Callable[[str], Path]) -> Folder:
    return folder(tiny_model("gpt2"), "int8")


@pytest.fixture
def half(folder: Callable[..., Folder], tiny_model: Callable[[str], Path]) -> Folder:
    return folder(tiny_model("qwen3"), "fp16")


def test_ternary_weights_come_back_bit_for_bit(ternary: Folder) -> None:
    read = ternary.read()
    assert ternary.source.lattice
    for name, lattice in ternary.source.lattice.items():
        assert np.array_equal(read[name], lattice.dequantize()), name
        assert ternary.written.lattice[name] == "exact"
    assert not ternary.written.fallbacks


def test_the_fast_kernels_are_asked_for(ternary: Folder, awkward: Folder) -> None:
    for folder in (ternary, awkward):
        for node in folder.nodes("MatMulNBits"):
            settings = attributes(node)
            assert settings["accuracy_level"] == 4
            assert settings["bits"] != 2 or settings["block_size"] in (32, 64, 128)
    assert {attributes(node)["block_size"] for node in ternary.nodes("MatMulNBits")} == {128}


def test_what_is_read_back_is_what_the_manifest_says(
    ternary: Folder, awkward: Folder, gpt2: Folder, half: Folder
) -> None:
    for folder in (ternary, awkward, gpt2, half):
        read = folder.read()
        assert set(read) == set(folder.source.names)
        for name, value in read.items():
            if name in folder.written.digests:
                assert digest(value) == folder.written.digests[name], name
            else:
                assert np.array_equal(value, folder.source.tensor(name)), name


def test_a_tied_head_is_in_the_file_once(ternary: Folder) -> None:
    name = ternary.source.embedding
    assert ternary.place(f"{name}_Q8") == ternary.place(f"{name}_Q8_rows")
    weights = sum(value.codes.size for value in ternary.source.lattice.values())
    embedding = np.prod(ternary.source.shape(name))
    stored = (ternary.path / "model.onnx.data").stat().st_size
    assert stored < 1.05 * (weights * 2.25 / 8 + embedding * (1 + 4 / 128)) + 4096 * len(ternary.source.names)


def test_what_a_width_cannot_hold_is_counted(awkward: Folder) -> None:
    lost = {fallback.tensor: fallback.quant for fallback in awkward.written.fallbacks}
    linears = set(awkward.source.linears) - {awkward.source.head}
    assert set(lost) == linears - set(awkward.source.lattice)
    assert set(lost.values()) == {"int8"}
    assert awkward.written.embedding_quant == "int4"


def test_biases_are_added_by_the_packed_product(gpt2: Folder) -> None:
    products = gpt2.nodes("MatMulNBits")
    assert not gpt2.nodes("Gemm")
    assert sum(len(node.input) == 6 for node in products) == len(products) - 1  # all but the head


def test_no_product_needs_its_input_reshaped(gpt2: Folder) -> None:
    makers = {output: node for node in gpt2.graph.node for output in node.output}
    reshaped = [node for node in gpt2.nodes("MatMulNBits") if makers[node.input[0]].op_type == "Reshape"]
    # The heads of attention, put side by side; and what transformers reshapes before the head.
    assert len(reshaped) == gpt2.source.config["num_hidden_layers"] + 1


def test_learned_positions_begin_behind_the_padding(gpt2: Folder) -> None:
    texts = [[5, 90, 17, 201, 33, 8], [64, 12]]
    with OnnxSession(gpt2.path, threads=1) as session:
        for text, found in zip(texts, session.batch_logits(texts), strict=True):
            session.rewind(0)
            right = session.append(text, "all")
            assert right is not None
            assert np.allclose(found, right, atol=1e-3)


def test_half_precision_is_a_width_of_the_file(half: Folder) -> None:
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    for name in half.source.linears:
        assert kinds[name] == onnx.TensorProto.FLOAT16
    assert onnx_plain_reader.widths(half.path) == {"fp16"}
    with OnnxSession(half.path, threads=1) as session:
        assert session.capabilities.fp32_compute


def test_widths_are_read_from_the_graph(ternary: Folder, awkward: Folder, gpt2: Folder) -> None:
    assert onnx_plain_reader.widths(ternary.path) == {"ternary", "int8"}
    assert onnx_plain_reader.widths(awkward.path) == {"ternary", "int8", "int4"}
    assert onnx_plain_reader.widths(gpt2.path) == {"int8", "fp32"}  # the table of positions is no matrix product


def test_keys_and_values_are_not_repeated_for_the_groups(half: Folder) -> None:
    config = half.source.config
    shared = {value.name: value for value in half.graph.output}
    heads = shared["present.0.key"].type.tensor_type.shape.dim[1].dim_value
    assert heads == config["num_key_value_heads"] < config["num_attention_heads"]
    makers = {output: node for node in half.graph.node for output in node.output}
    for node in half.nodes("Attention"):
        assert makers[node.input[1]].op_type != "Reshape"
        assert node.input[1].startswith("present.") or makers[node.input[1]].op_type == "Concat"


def test_norms_take_the_residual_sum_along(half: Folder, gpt2: Folder) -> None:
    layers = half.source.config["num_hidden_layers"]
    assert len(half.nodes("SkipSimplifiedLayerNormalization")) == 2 * layers  # all but the first
    layers = gpt2.source.config["num_hidden_layers"]
    assert len(gpt2.nodes("SkipLayerNormalization")) == 2 * layers + 1  # the first takes the positions along
    kinds = _profile(half.path) | _profile(gpt2.path)
    assert {"SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "Attention", "MatMulNBits"} <= kinds


def _profile(path: Path) -> set[str]:
    """The operators that the runtime really runs for one token with a cache, after its own optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.parent / "profile")
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {
        value.name: np.zeros((1, value.shape[1], 4, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    feeds |= {
        "input_ids": np.array([[7]]),
        "position_ids": np.array([[4]]),
        "attention_mask": np.ones((1, 5), np.int64),
    }
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}


def test_settings_are_those_that_transformers_4_reads(half: Folder) -> None:
    config = json.loads((half.path / "config.json").read_text())
    assert config["rope_theta"] == half.source.config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((half.path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "token_type_ids" not in tokenizer["model_input_names"]
    assert (half.path / "tokenizer.json").read_bytes() == (half.source.directory / "tokenizer.json").read_bytes()
    assert json.loads((half.path / "generation_config.json").read_text())["eos_token_id"] == 0


def test_rotary_settings_for_older_readers_of_every_shape() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5.0, "factor": 8.0}
    assert to_onnx._for_older_readers({"rope_parameters": rope}) == {
        "rope_parameters": rope,
        "rope_theta": 5.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    two = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 7.0}}
    older = to_onnx._for_older_readers({"rope_parameters": two})
    assert (older["rope_theta"], older["rope_local_base_freq"]) == (5.0, 7.0)
    assert to_onnx._for_older_readers({"n_embd": 4}) == {"n_embd": 4}


def test_zero_points_are_read(tmp_path: Path) -> None:
    """Two rows of two blocks of four 4-bit codes; the zero points are packed like them, each row to whole bytes."""
    codes = np.array([[[0x21, 0x43], [0x65, 0x87]], [[0x00, 0xFF], [0x10, 0x32]]], np.uint8)
    scales = np.array([[1.0, 2.0], [0.5, 1.0]], np.float32)
    zeros = np.array([0x51, 0xF0], np.uint8)
    expected = [[0, 1, 2, 3, 0, 2, 4, 6], [0, 0, 7.5, 7.5, -15, -14, -13, -12]]
    assert np.array_equal(dequantize(codes, scales, bits=4, columns=8, zeros=zeros), np.float32(expected))


def test_a_lattice_with_zero_points_is_stored_exactly_and_computed_with(
    folder: Callable[..., Folder], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = load_source(tiny_model("opt"))
    names = [name for name in source.linears if name != source.head]
    lattice = {name: _with_zero_points(source.matrix(name)) for name in [*names, source.embedding]}
    source = dataclasses.replace(source, lattice=lattice, restored=frozenset(lattice))
    rows = {}
    for quant in ("fp32", "int4"):
        written = to_onnx.write(source, tmp_path / quant, quant=quant, embedding_quant=quant)
        assert set(written.lattice.values()) == {"exact"}
        assert {each.tensor for each in written.fallbacks} <= {"model.decoder.embed_positions.weight"}
        for name, value in onnx_plain_reader.read_weights(tmp_path / quant, source):
            assert name not in lattice or np.array_equal(value, lattice[name].dequantize()), name
        with OnnxSession(tmp_path / quant, threads=1) as session:
            found = session.append([5, 9, 100, 7, 33], "all")
            assert found is not None
            rows[quant] = found
    assert np.abs(rows["int4"] - rows["fp32"]).max() < 0.05 * rows["fp32"].std()


def _with_zero_points(weight: np.ndarray) -> LatticeTensor:
    """4 bits per group of 32, from the least value to the largest."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, 32)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    scales = (high - low) / 15
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(groups / scales) + zeros, 0, 15) - zeros
    return LatticeTensor(
        codes=codes.reshape(rows, columns).astype(np.int8),
        scales=scales[..., 0].astype(np.float32),
        group=32,
        bits=4,
        levels="uint4",
        zeros=zeros[..., 0].astype(np.int16),
    )


def test_a_graph_that_the_runtime_cannot_open_is_refused(ternary: Folder, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(ternary.path, broken)
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMulNBits").op_type = "MatMulNBitsOfTomorrow"
    (broken / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="EW-613") as caught:
        OnnxSession(broken)
    assert "ONNX Runtime 1." in str(caught.value)


def test_a_graph_without_a_cache_is_refused(ternary: Folder, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    node = helper.make_node("Identity", ["input_ids"], ["logits"])
    value = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in ("input_ids", "logits")]
    graph = helper.make_graph([node], "plain", value[:1], value[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    (tmp_path / "config.json").write_bytes((ternary.path / "config.json").read_bytes())
    with pytest.raises(BadInput, match="EW-614"):
        OnnxSession(tmp_path)
