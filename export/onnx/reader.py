"""What the nodes of an ONNX graph compute with, for the gate: independent of the code that packed it.

Nothing is shared with `layout.py`: the nibbles are taken apart here from the operators' documentation alone, so that
one mistake cannot hide in both directions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """The attributes of a node as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def quantizes_activations(folder: Path) -> bool:
    """Whether a matrix product of this folder rounds its activations (`MatMulNBits` at accuracy level 4)."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    levels = [attributes(node).get("accuracy_level", 0) for node in model.graph.node if node.op_type == "MatMulNBits"]
    return 4 in levels


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
