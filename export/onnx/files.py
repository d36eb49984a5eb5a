"""Write an ONNX graph: `model.onnx` beside `model.onnx.data`, a few tensors in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from edgewright.export.artifact import sync
from edgewright.export.in_order import in_order

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH = "model.onnx"
DATA = "model.onnx.data"

INLINE_BYTES = 1024
"""Constants up to this size stay in the graph; the weights lie in the data file, so that 2 GB are no limit."""

PAGE = 4096
"""Where a tensor of at least one page begins, so that a runtime can map it."""


def save_graph(model: ir.Model, directory: Path, *, aliases: Mapping[str, str] | None = None) -> Path:
    """Write a graph and its data, and check it.

    Args:
        model: its initializers may be lazy: each is asked for its bytes once, and forgotten when they are written.
        directory: made if it is not there.
        aliases: initializers that are the bytes of another one, in another shape: its name by theirs.

    Returns:
        The path of the graph.
    """
    import onnx
    import onnx_ir as ir

    directory.mkdir(parents=True, exist_ok=True)
    path, data, aliases = directory / GRAPH, directory / DATA, aliases or {}
    places: dict[str, tuple[int, int]] = {}
    tensors = {str(value.name): value.const_value for value in model.graph.initializers.values() if value.const_value}
    outside = {name: tensor for name, tensor in tensors.items() if tensor.nbytes > INLINE_BYTES}
    stored = [name for name in outside if name not in aliases]
    with data.open("wb") as file:
        for name, content in zip(stored, in_order(lambda name: _content(outside[name]), stored), strict=True):
            places[name] = _append(file, content)
    for name, tensor in outside.items():
        offset, length = places[aliases.get(name, name)]
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            DATA, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=directory
        )
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    for written in (path, data):
        sync(written)
    return path


def _content(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes of a tensor, without a copy of what is in order already."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def _append(file: BinaryIO, content: memoryview) -> tuple[int, int]:
    """Write the bytes of a tensor; where they begin, and how many they are."""
    file.write(bytes(-file.tell() % (PAGE if len(content) >= PAGE else 64)))
    offset = file.tell()
    file.write(content)
    return offset, len(content)
