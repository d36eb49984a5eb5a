"""Bounded pre-checks of safetensors and GGUF headers that somebody else wrote.

The libraries that read these formats either do not name the file when it is broken, accept some broken files, or hang
on them. So nothing reaches them before the header has been walked here: every count and offset is compared with the
size of the file before it is believed. Only headers are read, never tensors.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from edgewright.errors import BadInput

MAX_HEADER_BYTES = 16 * 2**20
"""Longest safetensors header that is read; about 100,000 tensors."""
MAX_TENSORS = 100_000
MAX_STRINGS = 2_000_000
"""Most strings in the metadata of a GGUF file: several times the largest vocabulary with its merges."""

SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
"""Width of each element type of the format, in bits."""


class _Broken(Exception):
    """What is wrong with a header; `_refuse` adds the file."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found


def _refuse(code: str, kind: str, path: Path, broken: _Broken) -> BadInput:
    return BadInput(
        code,
        f"this {kind} file is damaged: {broken.what}",
        where=path.absolute(),
        expected=broken.expected,
        found=broken.found,
        fix="copy or write the file again, and compare its size and hash with the source",
    )


def open_regular(path: Path) -> int:
    """Size in bytes of a readable regular file.

    Raises:
        BadInput: EW-311, there is no such file; a pipe or a device is refused too, since reading it could wait forever.
    """
    if not path.is_file():
        what = "this is not a regular file" if path.exists() else "there is no such file"
        raise BadInput("EW-311", what, where=path.absolute(), expected="a regular file", fix="check the path")
    return path.stat().st_size


# --- safetensors ---------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """One tensor of a safetensors header, already compared with its type and shape."""

    begin: int
    end: int


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file whose header and size do not agree.

    Checked: header length against the file and a cap, JSON without duplicate keys, known element types, shapes times
    width equal to the bytes, and spans that cover the data part exactly, without holes and overlaps.

    Raises:
        BadInput: EW-317 names file, tensor, expected and found. EW-311 when there is no such file.
    """
    size = open_regular(path)
    try:
        with path.open("rb") as file:
            header = _read_header(file.read(8), size)
            raw = file.read(header)
        _check_spans(_parse_header(raw), size - 8 - header)
    except _Broken as broken:
        raise _refuse("EW-317", "safetensors", path, broken) from None


def _read_header(first: bytes, size: int) -> int:
    if size < 10:
        raise _Broken("it is too short for a header", "at least 10 bytes", f"{size} bytes")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise _Broken("the length of its header", f"at most {MAX_HEADER_BYTES} bytes", f"{length} bytes")
    if length > size - 8:
        raise _Broken("the header is longer than the file", f"at most {size - 8} bytes", f"{length} bytes")
    return length


def _parse_header(raw: bytes) -> dict[str, object]:
    if not raw.startswith(b"{"):
        raise _Broken("the header is not a JSON object", "{", ascii(raw[:16]))
    if raw.count(b'"dtype"') > MAX_TENSORS:
        raise _Broken("the number of tensors", f"at most {MAX_TENSORS}", raw.count(b'"dtype"'))
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Broken("the header is not valid JSON", "UTF-8 JSON", str(error)[:200]) from None
    return header


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of a JSON parser that refuses what most parsers drop in silence: a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} occurs {count} times")
    return result


def _no_constant(text: str) -> object:
    raise _Broken("a number in its header", "a finite number", text)


def _check_spans(header: dict[str, object], available: int) -> None:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken("__metadata__ in its header", "an object of strings", ascii(metadata)[:80])
    position = 0
    for name, span in sorted(((name, _span(name, entry)) for name, entry in header.items()), key=lambda item: item[1]):
        if span.begin != position:
            raise _Broken(f"tensor {name!r} leaves a hole or overlaps", f"begins at {position}", span.begin)
        if span.end > available:
            raise _Broken(f"tensor {name!r} ends outside the file", f"at most {available} bytes", span.end)
        position = span.end
    if position != available:
        raise _Broken("the tensors and the size of the file differ", f"{position} bytes of data", f"{available} bytes")


def _span(name: str, entry: object) -> _Span:
    """The span of one header entry, if its bytes equal shape times width."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Broken(f"the entry of tensor {name!r}", "dtype, shape and data_offsets", ascii(entry)[:80])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        raise _Broken(f"the type of tensor {name!r}", " ".join(SAFETENSORS_BITS), ascii(dtype)[:80])
    if not _is_sizes(shape) or len(shape) > 32:
        raise _Broken(f"the shape of tensor {name!r}", "a list of sizes", ascii(shape)[:80])
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Broken(f"the offsets of tensor {name!r}", "[begin, end] with begin <= end", ascii(offsets)[:80])
    bits = math.prod(shape) * SAFETENSORS_BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        expected = f"{bits / 8:g} bytes for {dtype} {shape}"
        raise _Broken(f"the bytes of tensor {name!r}", expected, f"{offsets[1] - offsets[0]} bytes")
    return _Span(offsets[0], offsets[1])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


# --- GGUF ----------------------------------------------------------------------------------------------------------

# Bytes of the fixed-size metadata types by number; 8 is a string, 9 an array.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4

GGML_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Weights per block and bytes per block of each tensor type, by its number in the format."""


class _Cursor:
    """Reads little-endian values of a mapped file and never past its end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes and return where they begin."""
        if count > self.size - self.at:
            raise _Broken(f"{what} at byte {self.at} ends outside the file", f"<= {self.size - self.at} bytes", count)
        begin = self.at
        self.at += count
        return begin

    def number(self, layout: str, what: str) -> int:
        begin = self.skip(struct.calcsize(layout), what)
        return int(struct.unpack_from(layout, self.data, begin)[0])

    def text(self, limit: int, what: str) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise _Broken(f"the length of {what} at byte {self.at}", f"at most {limit} bytes", length)
        begin = self.skip(length, what)
        try:
            return bytes(self.data[begin : self.at]).decode("utf-8")
        except UnicodeDecodeError:
            raise _Broken(f"{what} at byte {begin}", "UTF-8", ascii(self.data[begin : self.at][:32])) from None

    def strings(self, count: int, what: str) -> None:
        """Skip `count` strings."""
        at, size, unpack, data = self.at, self.size, struct.Struct("<Q").unpack_from, self.data
        for _ in range(count):
            if at + 8 > size:
                raise _Broken(f"{what} ends outside the file", f"{count} strings", f"the file ends at {size}")
            at += 8 + unpack(data, at)[0]
        if at > size:
            raise _Broken(f"{what} ends outside the file", f"at most {size} bytes", at)
        self.at = at


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose counts, lengths and offsets do not agree with its size.

    Checked: magic, version, counts, keys and names (length, UTF-8, no duplicates), value types, lengths of strings and
    arrays, alignment, tensor types and shapes, and offsets that follow each other and end inside the file.

    Raises:
        BadInput: EW-318 names file, place, expected and found. EW-311 when there is no such file.
    """
    size = open_regular(path)
    try:
        if size < 24:
            raise _Broken("it is too short for a header", "at least 24 bytes", f"{size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_gguf(_Cursor(data, size))
    except _Broken as broken:
        raise _refuse("EW-318", "GGUF", path, broken) from None


def _check_gguf(cursor: _Cursor) -> None:
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise _Broken("its first bytes", b"GGUF", magic)
    cursor.skip(4, "magic")
    version = cursor.number("<I", "version")
    if version not in (2, 3):
        raise _Broken("its version", "2 or 3, little endian", version)
    tensors, pairs = cursor.number("<Q", "tensor count"), cursor.number("<Q", "metadata count")
    room = cursor.size - cursor.at
    # A pair takes at least 13 bytes (key length, type, one byte), a tensor at least 33.
    for what, count, smallest in (("tensors", tensors, 33), ("metadata entries", pairs, 13)):
        if count > min(MAX_TENSORS, room // smallest):
            raise _Broken(f"the number of {what}", f"at most {min(MAX_TENSORS, room // smallest)}", count)
    alignment = _check_metadata(cursor, pairs)
    spans = _check_tensors(cursor, tensors, alignment)
    begin = -(-cursor.at // alignment) * alignment
    if spans and begin + spans > cursor.size:
        raise _Broken("the data of its tensors end outside the file", f"{begin + spans} bytes", f"{cursor.size} bytes")


def _check_metadata(cursor: _Cursor, pairs: int) -> int:
    """Walk the metadata; the alignment of the data part in bytes."""
    seen: set[str] = set()
    alignment, strings = 32, 0
    for _ in range(pairs):
        key = cursor.text(65_535, "a metadata key")
        if key in seen or not key:
            raise _Broken("a metadata key", "every key once, and not empty", ascii(key))
        seen.add(key)
        kind = cursor.number("<I", f"the type of {key!r}")
        if key == "general.alignment":
            if kind != _UINT32:
                raise _Broken("the type of general.alignment", _UINT32, kind)
            alignment = cursor.number("<I", key)
            if not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
                raise _Broken("general.alignment", "a power of two from 8 to 65536", alignment)
            continue
        strings += _skip_value(cursor, kind, key)
        if strings > MAX_STRINGS:
            raise _Broken("the number of strings in its metadata", f"at most {MAX_STRINGS}", strings)
    return alignment


def _skip_value(cursor: _Cursor, kind: int, key: str) -> int:
    """Walk one value; the number of strings in it."""
    if kind in _SCALARS:
        cursor.skip(_SCALARS[kind], f"the value of {key!r}")
        return 0
    if kind == _STRING:
        cursor.strings(1, f"the value of {key!r}")
        return 1
    if kind != _ARRAY:
        raise _Broken(f"the type of {key!r}", "a number from 0 to 12", kind)
    element, count = cursor.number("<I", f"the type of {key!r}"), cursor.number("<Q", f"the length of {key!r}")
    if element in _SCALARS:
        cursor.skip(_SCALARS[element] * count, f"the array {key!r}")
        return 0
    if element != _STRING:
        raise _Broken(f"the element type of the array {key!r}", "a scalar or a string", element)
    if count > min(MAX_STRINGS, (cursor.size - cursor.at) // 8):
        room = min(MAX_STRINGS, (cursor.size - cursor.at) // 8)
        raise _Broken(f"the length of the array {key!r}", f"at most {room} strings", count)
    cursor.strings(count, f"the array {key!r}")
    return count


def _check_tensors(cursor: _Cursor, tensors: int, alignment: int) -> int:
    """Walk the tensor table; bytes of the data part from its begin to the end of the last tensor."""
    seen: set[str] = set()
    position = end = 0
    for _ in range(tensors):
        name = cursor.text(63, "a tensor name")
        if name in seen or not name:
            raise _Broken("a tensor name", "every name once, and not empty", ascii(name))
        seen.add(name)
        dimensions = cursor.number("<I", f"the dimensions of {name!r}")
        if not 1 <= dimensions <= 4:
            raise _Broken(f"the dimensions of tensor {name!r}", "1 to 4", dimensions)
        shape = [cursor.number("<Q", f"the shape of {name!r}") for _ in range(dimensions)]
        kind, offset = cursor.number("<I", f"the type of {name!r}"), cursor.number("<Q", f"the offset of {name!r}")
        size = _tensor_bytes(name, shape, kind)
        if offset != position:
            raise _Broken(f"the offset of tensor {name!r}", position, offset)
        if size > cursor.size:
            raise _Broken(f"tensor {name!r} is larger than the file", f"<= {cursor.size} bytes", f"{size} bytes")
        end = position + size
        position = -(-end // alignment) * alignment
    return end


def _tensor_bytes(name: str, shape: Iterable[int], kind: int) -> int:
    if kind not in GGML_BLOCKS:
        raise _Broken(f"the type of tensor {name!r}", "a type that this version knows", kind)
    shape = list(shape)
    if not all(0 < size < 2**40 for size in shape):
        raise _Broken(f"the shape of tensor {name!r}", "sizes of at least 1", shape)
    block, width = GGML_BLOCKS[kind]
    if shape[0] % block:
        raise _Broken(f"the rows of tensor {name!r}", f"a multiple of {block}", shape[0])
    return math.prod(shape) // block * width
