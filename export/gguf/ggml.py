"""ggml's own quantizers, from the library that llama-cpp-python brings: K-quants search for their codes."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.gguf.widths import SEARCHED, WIDTHS
from edgewright.machine import available_cores

LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
"""What the library is called on each system."""

_DEQUANTIZERS = {
    "q8_0": "dequantize_row_q8_0",
    "q4_0": "dequantize_row_q4_0",
    "q4_1": "dequantize_row_q4_1",
    "q5_0": "dequantize_row_q5_0",
    "q2_k": "dequantize_row_q2_K",
    "q3_k": "dequantize_row_q3_K",
    "q4_k": "dequantize_row_q4_K",
    "q5_k": "dequantize_row_q5_K",
    "q6_k": "dequantize_row_q6_K",
    "iq4_nl": "dequantize_row_iq4_nl",
}


def is_installed() -> bool:
    """Whether the library is there."""
    return _path() is not None


def makes(width: str) -> bool:
    """Whether the library makes blocks of this type from plain weights (ternary ones it would make by another rule)."""
    return width in _DEQUANTIZERS


def quantize(values: np.ndarray, width: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize a matrix as llama.cpp does.

    Args:
        values: float32 `[rows, columns]`, columns a multiple of the type's block.
        width: one that `makes` names.
        importance: mean square of each column's input, float32 `[columns]`; None weighs by the weights themselves.

    Returns:
        The blocks: uint8 `[rows, bytes per row]`.

    Raises:
        BadInput: EW-603, llama-cpp-python is not installed.
    """
    library = _library()
    rows, columns = values.shape
    values = np.ascontiguousarray(values, np.float32)
    blocks = np.empty((rows, WIDTHS[width].row_bytes(columns)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    assert weights is None or weights.shape == (columns,)

    def work(part: slice) -> None:
        source, target = values[part], blocks[part]
        library.ggml_quantize_chunk(
            WIDTHS[width].number,
            source.ctypes.data,
            target.ctypes.data,
            0,
            len(source),
            columns,
            None if weights is None else weights.ctypes.data,
        )

    if width in SEARCHED:
        _in_parts(work, rows)
    else:
        work(slice(None))  # done before threads would have started
    return blocks


def dequantize(blocks: np.ndarray, width: str, columns: int) -> np.ndarray:
    """The values of blocks that `quantize` made: float32 `[rows, columns]`."""
    function = getattr(_library(), _DEQUANTIZERS[width])
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.empty((len(blocks), columns), np.float32)
    function(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


def _in_parts(work: Callable[[slice], None], rows: int) -> None:
    """Run something over all rows, on all cores."""
    cores = min(available_cores(), rows)
    size = -(-rows // (4 * cores))
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(work, (slice(start, start + size) for start in range(0, rows, size))))


def _path() -> Path | None:
    package = importlib.util.find_spec("llama_cpp")
    folders = [Path(folder) / "lib" for folder in package.submodule_search_locations or []] if package else []
    return next((folder / name for folder in folders for name in LIBRARIES if (folder / name).exists()), None)


@cache
def _library() -> ctypes.CDLL:
    """Loaded once; Python's other threads go on while it works."""
    path = _path()
    if path is None:
        raise BadInput(
            "EW-603",
            "blocks of this type are made by ggml, and its library is not installed",
            expected=f"one of {', '.join(LIBRARIES)} in the package llama_cpp",
            found="no such package, or a package without it",
            fix="pip install 'edgewright[llamacpp]'",
        )
    library = ctypes.CDLL(str(path))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
