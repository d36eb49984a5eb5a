"""Read a GGUF file back: the gate's view, independent of the code that wrote it.

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


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and values (float32, in the checkpoint's order of rows) of every tensor that a file holds."""
    check_gguf(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, target in _names(source):
        if target in tensors:
            yield name, _in_checkpoint_order(_values(tensors[target]), name, source.config)


def widths(path: Path) -> set[str]:
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
