"""A graph that is being written down: nodes in order, weights by their names in the checkpoint, constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.export.source import Source

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
"""The first with Attention, RotaryEmbedding and RMSNormalization; at 24 torch's exporter takes the last two apart."""
IR_VERSION = 10

ROWS_AT_ONCE = 16
"""Of a matrix that is transposed: as many float32 as fill a line of the cache."""

Dims = Sequence[int | str]
"""A shape; what changes from call to call has a name."""


def lazy_weight(source: Source, name: str, *, turned: bool) -> ir.LazyTensor:
    """A tensor of the checkpoint, float32, read whenever it is asked for its bytes; transposed if `turned`."""
    import onnx_ir as ir

    def read() -> ir.Tensor:
        tensor = source.tensor(name)
        return ir.Tensor(transposed(tensor) if turned else tensor, name=name)

    shape = source.shape(name)
    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(shape[::-1] if turned else shape), name=name)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A copy `[columns, rows]`; some rows at a time, which a cache holds: six times as fast as numpy's own."""
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, len(matrix), ROWS_AT_ONCE):
        rows = slice(row, row + ROWS_AT_ONCE)
        turned[:, rows] = matrix[rows].T
    return turned


class Nodes:
    """The nodes, initializers, inputs and outputs of a graph, as they are added.

    Args:
        source: where the weights are.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return name in self._source.files

    def input(self, name: str, kind: str, dims: Dims) -> ir.Value:
        """An input of the graph; `kind` is a name of `onnx_ir.DataType`."""
        value = _described(name, kind, dims)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, kind: str, dims: Dims) -> None:
        """Make an output of a value."""
        described = _described(name, kind, dims)
        value.name, value.shape, value.type = name, described.shape, described.type
        self._outputs.append(value)

    def weight(self, name: str, *, turned: bool = False) -> ir.Value:
        """A tensor of the checkpoint under its own name, read when the file is written; transposed if `turned`."""
        if name not in self._initializers:
            self._add(name, lazy_weight(self._source, name, turned=turned))
        return self._initializers[name]

    def constant(self, value: np.ndarray, name: str | None = None) -> ir.Value:
        """A constant; those without a name are stored once for each value."""
        import onnx_ir as ir

        name = name or f"{value.dtype}{value.tolist()}"
        if name not in self._initializers:
            self._add(name, ir.Tensor(value, name=name))
        return self._initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """Constant int64 `[len(values)]`."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> ir.Value:
        """Constant float32 `[]`."""
        return self.constant(np.array(value, np.float32))

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        dims: Dims | None = None,
    ) -> ir.Value:
        """The result of a node with one output, a float32 of the shape `dims` where that is given."""
        (result,) = self.ops(kind, *inputs, attributes=attributes, domain=domain, count=1)
        if dims is not None:
            described = _described(None, "FLOAT", dims)
            result.shape, result.type = described.shape, described.type
        return result

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        count: int,
    ) -> Sequence[ir.Value]:
        """The results of a node with several outputs."""
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes or {}, domain=domain, num_outputs=count)
        self._nodes.append(node)
        return node.outputs

    def finish(self) -> ir.Model:
        """The model."""
        import onnx_ir as ir

        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET} | dict.fromkeys({node.domain for node in self._nodes if node.domain}, 1),
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgewright")

    def _add(self, name: str, tensor: ir.TensorProtocol) -> None:
        import onnx_ir as ir

        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self._initializers[name] = value


def _described(name: str | None, kind: str, dims: Dims) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType[kind]))
