"""Read the weights of a GenAI folder back, for the gate: independent of the code that laid them out.

Ours is read as a plain ONNX folder. One of the vendor's builder has its weights under the builder's names, several of
the checkpoint's in one matrix, and is taken apart here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.export.genai.vendor_names import checkpoint_names
from edgewright.export.onnx import plain_reader
from edgewright.export.onnx.reader import attributes, dequantize
from edgewright.export.source import Source

_PRODUCTS = ("MatMul", "MatMulNBits")


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and float32 values of every weight of a folder, matrices `[out, in]`.

    A matrix that joins several linear layers is taken apart again. A head that shares the embedding's bytes is
    returned as the embedding, as in the checkpoint.
    """
    if not _is_vendors(path):
        yield from plain_reader.read_weights(path, source)
        return
    file = _VendorsFile(path)
    yield source.embedding, file.embedding(columns=source.shape(source.embedding)[1])
    for node in file.nodes:
        if node.op_type in _PRODUCTS:
            names = checkpoint_names(_fp32_name(node.input[1]), source)
            if names is not None and names != (source.embedding,):
                yield from _apart(file.linear(node), names, source)
    for initializer, tensor in file.initializers.items():
        names = checkpoint_names(initializer, source) if len(tensor.dims) == 1 else None
        if names is not None:
            yield from _apart(file.array(initializer), names, source)


def widths(path: Path) -> set[str]:
    """In which widths the matrices of a folder are stored, by the names of `to_genai.QUANTS`."""
    return plain_reader.widths(path)


def _is_vendors(path: Path) -> bool:
    """Whether the linear layers bear the builder's names."""
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    return any(".MatMul." in tensor.name for tensor in graph.initializer)


def _apart(values: np.ndarray, names: tuple[str, ...], source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of the checkpoint that an initializer joins by rows."""
    ends = np.cumsum([source.shape(name)[0] for name in names])
    for name, part in zip(names, np.split(values, ends[:-1]), strict=True):
        gemma = values.ndim == 1 and name.endswith("norm.weight") and source.config["model_type"].startswith("gemma")
        yield name, _without_one(part, source.tensor(name)) if gemma else part


def _without_one(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights of a norm that was stored plus 1, as Gemma's are.

    That sum was rounded, so several weights lead to one stored value; the checkpoint's is taken where it is one.
    """
    one = np.float32(1)
    return np.where(weights + one == values, weights, values - one) if weights.shape == values.shape else values - one


class _VendorsFile:
    """A graph of the vendor's builder, in memory."""

    def __init__(self, folder: Path) -> None:
        graph = onnx.load(folder / "model.onnx").graph
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in self.nodes for output in node.output}

    def array(self, name: str) -> np.ndarray:
        """The value of an initializer."""
        return numpy_helper.to_array(self.initializers[name])

    def linear(self, node: onnx.NodeProto) -> np.ndarray:
        """The weight that a node multiplies with, `[out, in]`."""
        if node.op_type == "MatMul":
            return self.array(node.input[1]).T
        columns = attributes(node)["K"]
        assert isinstance(columns, int)
        return self._unpacked(node, node.input[1], columns)

    def embedding(self, *, columns: int) -> np.ndarray:
        """The token embedding, which may be made of the head's weight."""
        lookup = next(node for node in self.nodes if node.input[1:2] == ["input_ids"])
        table, before = lookup.input[0], self._makers.get(lookup.input[0])
        if lookup.op_type == "GatherBlockQuantized":
            return self._unpacked(lookup, before.input[0] if before else table, columns)
        return self.array(before.input[0]).T if before else self.array(table)

    def _unpacked(self, node: onnx.NodeProto, table: str, columns: int) -> np.ndarray:
        """What the codes of a node stand for; its third input are scales, the fourth zero points if there are any."""
        bits = attributes(node)["bits"]
        assert isinstance(bits, int)
        zeros = self.array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        return dequantize(self.array(table), self.array(node.input[2]), bits=bits, columns=columns, zeros=zeros)


def _fp32_name(name: str) -> str:
    """The name of a weight before it was packed."""
    return name.rsplit("_Q", 1)[0]
