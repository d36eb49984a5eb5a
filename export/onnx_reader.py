"""Read the weights of a GenAI folder back, for the gate: independent of the code that packed them.

Nothing is shared with `layout.py`: the nibbles are taken apart here from the operators' documentation alone, so that
one mistake cannot hide in both directions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from edgewright.export.onnx_graph import Graph, attributes, checkpoint_names, embedding_nodes, norm_name
from edgewright.export.source import EMBEDDING, HEAD, Source

_WIDTHS: dict[object, str] = {2: "ternary", 4: "int4", 8: "int8"}


def read_weights(path: Path, source: Source) -> Iterable[tuple[str, np.ndarray]]:
    """Checkpoint name and float32 values of every weight of a folder."""
    return weights_of(path).items()


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """Linear weights, head, token embedding and norms, as float32, by checkpoint name.

    A matrix that joins several linear layers is taken apart again. A head that shares the embedding's bytes is
    returned as the embedding alone, as in the checkpoint.
    """
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    query = decoder["num_attention_heads"] * decoder["head_size"]
    key = decoder["num_key_value_heads"] * decoder["head_size"]
    graph = Graph(onnx.load(folder / "model.onnx"))
    weights = {EMBEDDING: _embedding(graph, columns=decoder["hidden_size"])}
    for node in graph.nodes("MatMul", "MatMulNBits"):
        names = checkpoint_names(_fp32_name(node.input[1]), head=HEAD)
        if names is None or (names == (HEAD,) and _is_tied(graph)):
            continue
        matrix = _linear(graph, node)
        sizes = {3: [query, query + key], 2: [len(matrix) // 2], 1: []}[len(names)]
        weights.update(zip(names, np.split(matrix, sizes), strict=True))
    for initializer in graph.initializers:
        name = norm_name(initializer)
        if name is not None and name not in weights:
            weights[name] = graph.array(initializer)
    return weights


def quantizes_activations(folder: Path) -> bool:
    """Whether a matrix product of this folder rounds its activations (`MatMulNBits` at accuracy level 4)."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    levels = [attributes(node).get("accuracy_level", 0) for node in model.graph.node if node.op_type == "MatMulNBits"]
    return 4 in levels


def widths(folder: Path) -> set[str]:
    """In which widths the matrices of a folder are stored, by the names of `to_genai.QUANTS`."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    widths = {_WIDTHS[attributes(node)["bits"]] for node in model.graph.node if node.op_type == "MatMulNBits"}
    weights = {tensor.name for tensor in model.graph.initializer}
    plain = any(node.op_type == "MatMul" and node.input[1] in weights for node in model.graph.node)
    return widths | ({"fp32"} if plain else set())


def dequantize(
    packed: np.ndarray, scales: np.ndarray, *, bits: int, columns: int, zeros: np.ndarray | None = None
) -> np.ndarray:
    """float32 `[rows, columns]` of codes, low bits first, with one scale and one zero point a block.

    Args:
        packed: uint8, `[rows, ...]`.
        scales: `[rows, blocks]` in any shape.
        bits: of a code.
        columns: the width without the padding of the last block.
        zeros: zero points, packed like the codes, each row to whole bytes; None stands for `2 ** (bits - 1)`.
    """
    rows = len(packed)
    stored = _unpacked(packed, rows, bits)
    scales = scales.reshape(rows, -1)
    zero = np.full_like(scales, 1 << (bits - 1)) if zeros is None else _unpacked(zeros, rows, bits)
    blocks = stored.astype(np.float32).reshape(rows, scales.shape[1], -1)
    values = (blocks - zero.astype(np.float32)[:, : scales.shape[1], None]) * scales[:, :, None]
    return values.reshape(rows, -1)[:, :columns]


def _unpacked(packed: np.ndarray, rows: int, bits: int) -> np.ndarray:
    flat = np.unpackbits(packed.reshape(rows, -1), axis=1, bitorder="little").reshape(rows, -1, bits)
    return (flat * (1 << np.arange(bits))).sum(axis=2)


def _linear(graph: Graph, node: onnx.NodeProto) -> np.ndarray:
    if node.op_type == "MatMul":
        return graph.array(node.input[1]).T
    values = attributes(node)
    bits, columns = values["bits"], values["K"]
    assert isinstance(bits, int) and isinstance(columns, int)
    return dequantize(graph.array(node.input[1]), graph.array(node.input[2]), bits=bits, columns=columns)


def _embedding(graph: Graph, *, columns: int) -> np.ndarray:
    for node in graph.nodes("GatherBlockQuantized"):
        reshape = next(other for other in graph.nodes("Reshape") if other.output[0] == node.input[0])
        bits = attributes(node)["bits"]
        assert isinstance(bits, int)
        return dequantize(graph.array(reshape.input[0]), graph.array(node.input[2]), bits=bits, columns=columns)
    gather, transpose = embedding_nodes(graph)
    if transpose is None:
        return graph.array(gather.input[0])
    return graph.array(transpose.input[0]).T


def _is_tied(graph: Graph) -> bool:
    """Whether the embedding is looked up in the weight of the head."""
    tables = {node.input[0] for node in graph.nodes("Reshape", "Transpose")}
    heads = {node.input[1] for node in graph.nodes("MatMul", "MatMulNBits") if "logits" in node.output}
    return bool(tables & heads)


def _fp32_name(name: str) -> str:
    """The name of a weight before it was packed."""
    return name.rsplit("_Q", 1)[0]
