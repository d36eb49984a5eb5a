"""Read the weights of an OpenVINO folder back, for the gate: OpenVINO itself computes what its constants amount to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.export.openvino.package import load
from edgewright.export.source import Source

_WIDTHS = {"u2": "ternary", "i4": "int4", "u4": "int4", "i8": "int8", "u8": "int8", "f16": "fp16", "f32": "fp32"}
"""The width of a matrix by the type in which it is stored."""


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and float32 values of every weight of a folder, by OpenVINO's own reference arithmetic.

    The nodes bear the checkpoint's names; one that several parts of the graph read is yielded once.
    """
    ov = load()
    model = _model(path)
    known = set(source.names)
    for node in model.get_ops():
        name = node.get_friendly_name()
        if name in known:
            known.remove(name)
            yield name, _value(ov, node)


def widths(path: Path) -> set[str]:
    """In which widths the matrices of a folder are stored."""
    found = set()
    for node in _model(path).get_ops():
        operand = {"MatMul": 1, "Gather": 0}.get(node.get_type_name())
        if operand is not None:
            stored = _constant_under(node.input_value(operand).get_node())
            if stored is not None and len(stored.get_output_shape(0)) > 1:
                found.add(_WIDTHS[stored.get_output_element_type(0).get_type_name()])
    return found


def _model(path: Path) -> Any:
    return load().Core().read_model(path / "openvino_model.xml")


def _value(ov: Any, node: Any) -> np.ndarray:
    """What a node without inputs from outside evaluates to."""
    part = ov.Model([ov.opset13.result(node.output(0))], [], "weight")
    value = ov.Tensor(ov.Type.f32, node.get_output_shape(0))
    if not part.evaluate([value], []):
        raise ValueError(f"OpenVINO cannot evaluate {node.get_friendly_name()}")
    return np.array(value.data, np.float32)


def _constant_under(node: Any) -> Any:
    """The constant that a chain of conversions, products and reshapes begins with; None when it begins elsewhere."""
    while node.get_type_name() in ("Reshape", "Multiply", "Subtract", "Convert"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None
