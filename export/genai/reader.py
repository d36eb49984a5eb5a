"""Read the weights of a GenAI folder back, for the gate: independent of the code that laid them out.

A folder with the vendor's graph has its weights under the builder's names, several of the checkpoint's in one matrix;
one with a traced graph is read as a plain ONNX folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from edgewright.export.genai.families import FAMILIES, checkpoint_names
from edgewright.export.onnx import plain_reader as onnx_plain_reader
from edgewright.export.onnx.graph import Graph, attributes, embedding_nodes
from edgewright.export.onnx.reader import dequantize
from edgewright.export.source import Source

_WIDTHS: dict[object, str] = {2: "ternary", 4: "int4", 8: "int8"}


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and float32 values of every weight of a folder, matrices `[out, in]`.

    A matrix that joins several linear layers is taken apart again. A head that shares the embedding's bytes is
    returned as the embedding alone, as in the checkpoint.
    """
    if _is_traced(onnx.load(path / "model.onnx", load_external_data=False)):
        yield from onnx_plain_reader.read_weights(path, source)
        return
    graph = Graph(onnx.load(path / "model.onnx"))
    yield source.embedding, _embedding(graph, columns=source.shape(source.embedding)[1])
    for node in graph.nodes("MatMul", "MatMulNBits"):
        names = checkpoint_names(_fp32_name(node.input[1]), source)
        if names is not None and names != (source.embedding,):
            yield from _apart(_linear(graph, node), names, source)
    for initializer, tensor in graph.initializers.items():
        names = checkpoint_names(initializer, source) if len(tensor.dims) == 1 else None
        if names is not None:
            yield from _apart(graph.array(initializer), names, source)


def widths(path: Path) -> set[str]:
    """In which widths the matrices of a folder are stored, by the names of `to_genai.QUANTS`."""
    model = onnx.load(path / "model.onnx", load_external_data=False)
    if _is_traced(model):
        return onnx_plain_reader.widths(path)
    packed = ("MatMulNBits", "GatherBlockQuantized")
    widths = {_WIDTHS[attributes(node)["bits"]] for node in model.graph.node if node.op_type in packed}
    weights = {tensor.name for tensor in model.graph.initializer}
    plain = any(node.op_type == "MatMul" and node.input[1] in weights for node in model.graph.node)
    return widths | ({"fp32"} if plain else set())


def _is_traced(model: onnx.ModelProto) -> bool:
    """Whether this is no graph of the builder, whose attention is always a fused one of its own."""
    return not any(node.op_type == "GroupQueryAttention" for node in model.graph.node)


def _apart(values: np.ndarray, names: tuple[str, ...], source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of the checkpoint that an initializer joins by rows; none where the checkpoint has no such one."""
    if not source.files.keys() >= set(names):
        return
    ends = np.cumsum([source.shape(name)[0] for name in names])
    for name, part in zip(names, np.split(values, ends[:-1]), strict=True):
        more = values.ndim == 1 and name.endswith("norm.weight") and FAMILIES[source.config["model_type"]].one_more
        yield name, _without_one(part, source.tensor(name)) if more else part


def _without_one(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights of a norm that was stored plus 1.

    That sum was rounded, so several weights lead to one stored value; the checkpoint's is taken where it is one.
    """
    one = np.float32(1)
    return np.where(weights + one == values, weights, values - one) if weights.shape == values.shape else values - one


def _linear(graph: Graph, node: onnx.NodeProto) -> np.ndarray:
    if node.op_type == "MatMul":
        return graph.array(node.input[1]).T
    columns = attributes(node)["K"]
    assert isinstance(columns, int)
    return _unpacked(graph, node, node.input[1], columns)


def _embedding(graph: Graph, *, columns: int) -> np.ndarray:
    for node in graph.nodes("GatherBlockQuantized"):
        reshape = next(other for other in graph.nodes("Reshape") if other.output[0] == node.input[0])
        return _unpacked(graph, node, reshape.input[0], columns)
    gather, transpose = embedding_nodes(graph)
    if transpose is None:
        return graph.array(gather.input[0])
    return graph.array(transpose.input[0]).T


def _unpacked(graph: Graph, node: onnx.NodeProto, table: str, columns: int) -> np.ndarray:
    """What the codes of a node stand for; its third input are scales, the fourth zero points if there are any."""
    bits = attributes(node)["bits"]
    assert isinstance(bits, int)
    zeros = graph.array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    return dequantize(graph.array(table), graph.array(node.input[2]), bits=bits, columns=columns, zeros=zeros)


def _fp32_name(name: str) -> str:
    """The name of a weight before it was packed."""
    return name.rsplit("_Q", 1)[0]
