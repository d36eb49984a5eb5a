"""Read a GGUF file back and compare it with its checkpoint: the gate's view, independent of the code that wrote it.

Blocks are taken apart by the package `gguf`, names come from its own table, and the order of rows is undone here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgewright.export.guard import check_gguf
from edgewright.export.source import HEAD, Source
from edgewright.export.to_gguf import expected_values


def differences(path: Path, source: Source) -> list[str]:
    """Where a file is not what the lattice of its checkpoint says, in words; empty when it is, bit for bit.

    Every tensor of the checkpoint must be there, and must dequantize to codes * scale (in float types: to the weight,
    rounded to that type).
    """
    check_gguf(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = []
    for name, target in _names(source):
        tensor = tensors.get(target)
        if tensor is None:
            found.append(f"{name} is not in the file")
            continue
        expected = expected_values(source, name, tensor.tensor_type.name.lower())
        values = _in_checkpoint_order(_values(tensor), name, source.config)
        if values.shape != expected.shape:
            found.append(f"{name} has the shape {values.shape}, not {expected.shape}")
        elif not np.array_equal(values, expected):
            found.append(f"{name} differs in {np.count_nonzero(values != expected)} of {values.size} values")
    compared = {name for name, _ in _names(source)}
    return found + [f"{name} has a lattice but no place in the file" for name in source.lattice if name not in compared]


def matrix_types(path: Path) -> set[str]:
    """The types in which a file stores its matrices, by ggml's lower-case names."""
    check_gguf(path)
    return {tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}


def _names(source: Source) -> Iterator[tuple[str, str]]:
    """Checkpoint name and file name of every tensor."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config["num_hidden_layers"])
    for name in source.names:
        target = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is not None and not (name == HEAD and source.tied):
            yield name, target


def _values(tensor: Any) -> np.ndarray:
    """float32 in the file's order of rows."""
    values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    return values.reshape([int(size) for size in reversed(tensor.shape)])


def _in_checkpoint_order(values: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """Undo the pairing of neighbours that llama.cpp's rotary positions want."""
    queries = config["num_attention_heads"]
    heads = {"q_proj": queries, "k_proj": config.get("num_key_value_heads") or queries}.get(name.split(".")[-2])
    if heads is None:
        return values
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
