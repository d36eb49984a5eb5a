"""The pre-check of safetensors files: the header against the size of the file, before any library reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard

from edgewright.export.guard.files import Broken, naming, open_regular, unique_keys
from edgewright.export.guard.values import BUDGET, FloatSpan, check_finite

MAX_HEADER_BYTES = 8 * 2**20
"""Longest header that is read; about 50,000 tensors."""
MAX_TENSORS = 50_000
_METADATA = 100_000
"""Colons, brackets and commas that the texts in the metadata may hold."""

SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
"""Width of each element type of the format, in bits."""
WEIGHTS = (".weight", ".bias")
"""The ends of the names whose values must be finite; a buffer, say a mask, may hold infinities."""


class _Entry(NamedTuple):
    """One entry of a header. A tuple from the moment it is parsed: dictionaries would take five times the memory."""

    dtype: object
    shape: object
    offsets: object


class Span(NamedTuple):
    """Where the bytes of a tensor lie in the data part, and their type."""

    begin: int
    end: int
    dtype: str


def check_safetensors(path: Path, *, budget: int = BUDGET) -> dict[str, Span]:
    """Refuse a safetensors file whose header and size do not agree, or whose weights are not finite.

    Checked: header length against the file and a cap, JSON without duplicate keys, known element types, shapes times
    width equal to the bytes, spans that cover the data part exactly, without holes and overlaps, and the values of
    the floating-point weights (the smallest tensors first, up to `budget` bytes).

    Returns:
        The span of every tensor by name.

    Raises:
        BadInput: EW-317 names file, tensor, expected and found; EW-323, a weight holds NaN or infinite values.
            EW-311 when there is no such file.
    """
    size = open_regular(path)
    with naming("EW-317", "safetensors file", path):
        with path.open("rb") as file:
            header = _read_header(file.read(8), size)
            raw = file.read(header)
        spans = _check_spans(_parse_header(raw), size - 8 - header)
    begin = 8 + header
    floats = (
        FloatSpan(path, name, begin + span.begin, begin + span.end, span.dtype)
        for name, span in spans.items()
        if name.endswith(WEIGHTS)
    )
    check_finite(floats, budget)
    return spans


def _read_header(first: bytes, size: int) -> int:
    if size < 10:
        raise Broken("it is too short for a header", "at least 10 bytes", f"{size} bytes")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise Broken("the length of its header (byte 0)", f"at most {MAX_HEADER_BYTES} bytes", f"{length} bytes")
    if length > size - 8:
        raise Broken("the header is longer than the file", f"at most {size - 8} bytes", f"{length} bytes")
    return length


def _parse_header(raw: bytes) -> Mapping[str, object]:
    if not raw.startswith(b"{"):
        raise Broken("the header (byte 8) is not a JSON object", "{", ascii(raw[:16]))
    tensors = raw.count(b'"dtype"')
    if tensors > MAX_TENSORS:
        raise Broken("the number of tensors", f"at most {MAX_TENSORS}", tensors)
    # Parsed, each of these takes 30 times its bytes: as many as the tensors need, and some for the metadata.
    for mark, each in ((b":", 4), (b"{", 1), (b"[", 2), (b",", 12)):
        if raw.count(mark) > tensors * each + _METADATA:
            raise Broken("the number of entries in its header", f"{tensors} tensors and a little metadata", "more")
    try:
        header = json.loads(raw, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Broken("the header is not valid JSON", "UTF-8 JSON", str(error)[:200]) from None
    if not isinstance(header, dict):
        raise Broken("the header (byte 8) is not an object of tensors", "names of tensors", "an entry of one")
    return header


def _object(pairs: list[tuple[str, object]]) -> object:
    value = unique_keys(pairs)
    if value.keys() == {"dtype", "shape", "data_offsets"}:
        return _Entry(value["dtype"], value["shape"], value["data_offsets"])
    return value


def _no_constant(text: str) -> object:
    raise Broken("a number in its header", "a finite number", text)


def _check_spans(header: Mapping[str, object], available: int) -> dict[str, Span]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Broken("__metadata__ in its header", "an object of strings", ascii(metadata)[:80])
    spans = {name: _span(name, entry) for name, entry in header.items() if name != "__metadata__"}
    position = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1][:2]):
        if span.begin != position:
            raise Broken(f"tensor {name!r} leaves a hole or overlaps", f"begins at {position}", span.begin)
        if span.end > available:
            raise Broken(f"tensor {name!r} ends outside the file", f"at most {available} bytes", span.end)
        position = span.end
    if position != available:
        raise Broken("the tensors and the size of the file differ", f"{position} bytes of data", f"{available} bytes")
    return spans


def _span(name: str, entry: object) -> Span:
    """The span of one header entry, if its bytes equal shape times width."""
    if not isinstance(entry, _Entry):
        raise Broken(f"the entry of tensor {name!r}", "dtype, shape and data_offsets", ascii(entry)[:80])
    dtype, shape, offsets = entry
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        raise Broken(f"the type of tensor {name!r}", " ".join(SAFETENSORS_BITS), ascii(dtype)[:80])
    if not _is_sizes(shape) or len(shape) > 32:
        raise Broken(f"the shape of tensor {name!r}", "a list of sizes", ascii(shape)[:80])
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Broken(f"the offsets of tensor {name!r}", "[begin, end] with begin <= end", ascii(offsets)[:80])
    bits = math.prod(shape) * SAFETENSORS_BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        expected = f"{bits / 8:g} bytes for {dtype} {shape}"
        raise Broken(f"the bytes of tensor {name!r}", expected, f"{offsets[1] - offsets[0]} bytes")
    return Span(offsets[0], offsets[1], dtype)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
