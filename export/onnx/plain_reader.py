"""Read the weights of an ONNX folder back, for the gate: independent of the code that laid them out.

Which matrix is which is told by the initializers' names and by what reads them; what a node computes with is taken
apart from the operators' documentation alone (`onnx/reader.dequantize`). An initializer may join several weights by
rows: their names are then in its name, with a plus sign between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from edgewright.export.onnx.reader import attributes, dequantize
from edgewright.export.source import Source

_PACKED = re.compile(r"(.*)_Q[248](_rows)?")
_PACKED_NODES = ("MatMulNBits", "GatherBlockQuantized")
_BITS: dict[object, str] = {2: "ternary", 4: "int4", 8: "int8"}
_TYPES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and float32 values of every weight of a folder, once for each node that reads it."""
    file = _File(path)
    for node in file.nodes:
        if node.op_type in _PACKED_NODES:
            yield from file.packed(node, source)
        for name, turned in file.plain(node):
            if _known(name, source) and len(file.initializers[name].dims) == 2:
                value = file.array(name).astype(np.float32)
                yield from _apart(name, value.T if turned else value, source)
    for name, tensor in file.initializers.items():
        if _known(name, source) and len(tensor.dims) != 2:
            yield from _apart(name, file.array(name).astype(np.float32), source)


def widths(path: Path) -> set[str]:
    """In which widths the matrices of a folder are stored, by the names of `to_onnx.QUANTS`."""
    file = _File(path)
    packed = {_BITS[attributes(node)["bits"]] for node in file.nodes if node.op_type in _PACKED_NODES}
    plain = {name for node in file.nodes for name, _ in file.plain(node)}
    kinds = [tensor.data_type for name, tensor in file.initializers.items() if name in plain and len(tensor.dims) == 2]
    return packed | {_TYPES[kind] for kind in kinds if kind in _TYPES}


def _known(name: str, source: Source) -> bool:
    """Whether all the weights that an initializer joins are of the checkpoint."""
    return source.files.keys() >= set(name.split("+"))


def _apart(name: str, values: np.ndarray, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """The weights that an initializer joins by rows, from its values `[out, in]` or `[out]`."""
    names = name.split("+")
    ends = np.cumsum([source.matrix_shape(each)[0] for each in names])
    if ends[-1] != len(values):
        return  # not found, which is what the reader says of it then
    for each, part in zip(names, np.split(values, ends[:-1]), strict=True):
        yield each, np.ascontiguousarray(part)


class _File:
    """A graph whose tensors stay on the disk until they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in self.nodes for output in node.output}

    def array(self, name: str) -> np.ndarray:
        """The value of an initializer."""
        tensor = TensorProto()
        tensor.CopyFrom(self.initializers[name])
        if tensor.data_location == TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(self._folder))
        return numpy_helper.to_array(tensor)

    def plain(self, node: onnx.NodeProto) -> Iterator[tuple[str, bool]]:
        """The initializer that a node multiplies with or looks up in, and whether that is the transposed weight."""
        if node.op_type in ("MatMul", "Gemm"):
            name, turned = self._behind(node.input[1])
            turned ^= bool(attributes(node).get("transB", 0))
            if name in self.initializers:
                yield name, not turned
        elif node.op_type == "Gather" and node.input[0] in self.initializers:
            yield node.input[0], False

    def _behind(self, name: str) -> tuple[str, bool]:
        """Where a value comes from, behind casts and transpositions, and whether the latter turn it round."""
        turned = False
        while name in self._makers and self._makers[name].op_type in ("Cast", "Transpose"):
            turned ^= self._makers[name].op_type == "Transpose"
            name = self._makers[name].input[0]
        return name, turned

    def packed(self, node: onnx.NodeProto, source: Source) -> Iterator[tuple[str, np.ndarray]]:
        """The weight of a node that computes with packed codes."""
        is_table = node.op_type == "GatherBlockQuantized"
        table, scales = node.input[0 if is_table else 1], node.input[2]
        match = _PACKED.fullmatch(table)
        if match is None or not _known(match[1], source):
            return
        zeros = node.input[3] if len(node.input) > 3 and node.input[3] else None
        bits = attributes(node)["bits"]
        assert isinstance(bits, int)
        values = dequantize(
            self.array(table),
            self.array(scales),
            bits=bits,
            columns=source.matrix_shape(match[1].split("+")[0])[1],
            zeros=None if zeros is None else self.array(zeros),
        )
        yield from _apart(match[1], values, source)
