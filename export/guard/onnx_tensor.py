"""Tensors in an ONNX file: shape times type against the bytes, and external data against the files beside it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgewright.export.guard.files import Broken, open_regular, printable
from edgewright.export.guard.paths import inside
from edgewright.export.guard.protobuf import BYTES, VARINT, Field, Wire, require, signed
from edgewright.export.guard.values import FloatSpan

BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Width of each element type of the format in bits, by its number; strings (8) have none."""
STRING = 8
FLOATS = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}

_FLOAT_DATA, _INT32_DATA, _STRING_DATA, _INT64_DATA, _DOUBLE_DATA, _UINT64_DATA = 4, 5, 6, 7, 10, 11
_TYPED = {1: _FLOAT_DATA, 14: _FLOAT_DATA, 7: _INT64_DATA, 8: _STRING_DATA, 11: _DOUBLE_DATA, 15: _DOUBLE_DATA,
          12: _UINT64_DATA, 13: _UINT64_DATA}  # fmt: skip
"""The field that holds the values of a type when they are not raw bytes; every other type uses int32_data."""
_WIDTHS = {_FLOAT_DATA: 4, _DOUBLE_DATA: 8}
_DIMS, _TYPE, _SEGMENT, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 3, 8, 9, 13, 14
_ONCE = {_TYPE: "data_type", _NAME: "name", _RAW: "raw_data", _LOCATION: "data_location"}

MAX_NAME = 4096
MAX_RANK = 32
MAX_NUMBER_BYTES = 256 * 2**20
"""Bytes of numbers in typed fields, which have to be counted one by one."""
_EXTERNAL_KEYS = {b"location", b"offset", b"length", b"checksum"}
_ALIASES = 4
"""So many times the size of a data file may its tensors take together (tied weights share their bytes)."""


class Tensor(NamedTuple):
    """A tensor whose shape, type and bytes agree."""

    name: bytes
    span: FloatSpan | None
    """Its bytes, when they are raw or external and of a floating-point type."""


class _External(NamedTuple):
    location: str
    offset: int
    length: int
    name: str


class Tensors:
    """Reads tensor messages of one model and remembers what lies in which data file."""

    def __init__(self, wire: Wire, path: Path) -> None:
        self._wire, self._path, self._counted = wire, path, 0
        self._sizes: dict[str, int] = {}
        self._external: list[_External] = []

    def read(self, begin: int, end: int) -> Tensor:
        """Check the tensor message that lies there.

        Raises:
            Broken: shape, type and bytes do not agree.
            Unsafe: EW-331, its data file lies elsewhere. BadInput: EW-311, there is no such data file.
        """
        what = f"the tensor at byte {begin}"
        dims: list[int] = []
        once: dict[int, Field] = {}
        typed: dict[int, int] = {}
        external: dict[bytes, bytes] = {}
        for field in self._wire.fields(begin, end, what):
            if field.number == _DIMS:
                dims += [signed(value) for value in self._wire.varints(field, what, MAX_RANK)]
                if len(dims) > MAX_RANK:
                    raise Broken(f"the shape of {what}", f"at most {MAX_RANK} dimensions", "more")
            elif field.number in _ONCE:
                if field.number in once:
                    raise Broken(f"{_ONCE[field.number]} of {what}", "once", "twice")
                require(field, VARINT if field.number in (_TYPE, _LOCATION) else BYTES, what)
                once[field.number] = field
            elif field.number in (*_TYPED.values(), _INT32_DATA):
                typed[field.number] = typed.get(field.number, 0) + self._count(field, what)
            elif field.number == _EXTERNAL:
                self._entry(field, external, what)
            elif field.number == _SEGMENT:
                raise Broken(what, "a whole tensor", "a segment of one")
        name = self._wire.bytes(once[_NAME], f"the name of {what}", MAX_NAME) if _NAME in once else b""
        what = f"the tensor {printable(name)} at byte {begin}" if name else what
        kind = once[_TYPE].value if _TYPE in once else 0
        count = _elements(dims, what)
        if kind not in BITS and kind != STRING:
            raise Broken(f"the type of {what}", "a type that ONNX knows", kind)
        if external or (_LOCATION in once and once[_LOCATION].value == 1):
            if any(typed.values()) or _length(once.get(_RAW)) or kind == STRING:
                raise Broken(what, "external data alone", "external data and values of its own")
            return Tensor(name, self._outside(external, kind, count, name, what))
        return Tensor(name, self._within(once.get(_RAW), typed, kind, count, name, what))

    def finish(self) -> None:
        """Refuse data files whose tensors overlap, or together take many times the file.

        Raises:
            Broken: names both tensors.
        """
        of_file = defaultdict(list)
        for entry in self._external:
            of_file[entry.location].append(entry)
        for location, entries in of_file.items():
            total = sum(entry.length for entry in entries)
            most = _ALIASES * self._sizes[location] + 2**20
            if total > most:
                raise Broken(f"the tensors in {location!r}", f"at most {most} bytes together", total)
            entries.sort(key=lambda entry: (entry.offset, entry.length))
            for one, two in zip(entries, entries[1:], strict=False):
                same = one[1:3] == two[1:3]
                if not same and one.length and two.length and two.offset < one.offset + one.length:
                    raise Broken(f"the data of {two.name} in {location!r}", f"apart from that of {one.name}", "overlap")

    def _count(self, field: Field, what: str) -> int:
        """How many values a field of typed data holds."""
        if field.kind != BYTES or field.number == _STRING_DATA:
            return 1
        size = field.end - field.value
        if field.number in _WIDTHS:
            width = _WIDTHS[field.number]
            if size % width:
                raise Broken(f"the values of {what}", f"a multiple of {width} bytes", size)
            return size // width
        self._counted += size
        if self._counted > MAX_NUMBER_BYTES:
            raise Broken(f"the values of {what}", f"raw_data: more than {MAX_NUMBER_BYTES} bytes", size)
        return sum(
            int(np.count_nonzero(np.frombuffer(self._wire.data[at : min(at + 2**20, field.end)], np.uint8) < 0x80))
            for at in range(field.value, field.end, 2**20)
        )

    def _entry(self, field: Field, external: dict[bytes, bytes], what: str) -> None:
        """One key and value of external data."""
        require(field, BYTES, what)
        pair = {1: b"", 2: b""}
        for part in self._wire.fields(field.value, field.end, f"the external data of {what}"):
            if part.number in pair:
                pair[part.number] = self._wire.bytes(part, f"the external data of {what}", MAX_NAME)
        key, value = pair[1], pair[2]
        if key not in _EXTERNAL_KEYS or key in external:
            expected = "each of " + ", ".join(sorted(name.decode() for name in _EXTERNAL_KEYS)) + " at most once"
            raise Broken(f"the external data of {what} (byte {field.value})", expected, printable(key))
        external[key] = value

    def _outside(self, external: dict[bytes, bytes], kind: int, count: int, name: bytes, what: str) -> FloatSpan | None:
        location = external.get(b"location", b"").decode("utf-8", "surrogateescape")
        size = -(-count * BITS[kind] // 8)
        offset = _number(external.get(b"offset", b"0"), f"the offset of {what}")
        length = _number(external.get(b"length", str(size).encode()), f"the length of {what}")
        if length != size:
            raise Broken(f"the length of {what} in its data file", f"{size} bytes", length)
        if location not in self._sizes:
            beside = inside(self._path, self._path.parent, location, f"{what} has its data")
            self._sizes[location] = open_regular(beside)
        if offset + length > self._sizes[location]:
            most = f"at most byte {self._sizes[location]} of {location!r}"
            raise Broken(f"the end of {what}", most, offset + length)
        self._external.append(_External(location, offset, length, printable(name)))
        return _float_span(self._path.parent / location, name, offset, length, kind)

    def _within(
        self, raw: Field | None, typed: dict[int, int], kind: int, count: int, name: bytes, what: str
    ) -> FloatSpan | None:
        """Values in the message itself: raw bytes, or the one typed field that belongs to the type."""
        filled = {number: values for number, values in typed.items() if values}
        if _length(raw):
            assert raw is not None
            size = -(-count * BITS[kind] // 8) if kind != STRING else -1
            if _length(raw) != size or filled:
                raise Broken(f"the bytes of {what}", f"{size} bytes, and no other values", f"{_length(raw)} bytes")
            return _float_span(self._path, name, raw.value, size, kind)
        field = _TYPED.get(kind, _INT32_DATA)
        values = {14: 2 * count, 15: 2 * count, 21: -(-count // 2), 22: -(-count // 2), 23: -(-count // 2),
                  25: -(-count // 4), 26: -(-count // 4)}.get(kind, count)  # fmt: skip
        if filled != ({field: values} if values else {}):
            found = ", ".join(f"{number} in field {at}" for at, number in filled.items()) or "none"
            raise Broken(f"the values of {what}", f"{values} in field {field}", found)
        return None


def spread(tensors: Iterator[Tensor], finite: set[bytes]) -> Iterator[FloatSpan]:
    """The spans to look at: weights must be finite; other constants, say a mask, may hold infinities but no NaN."""
    for tensor in tensors:
        if tensor.span is not None:
            yield tensor.span._replace(infinite=tensor.name not in finite)


def _float_span(path: Path, name: bytes, begin: int, size: int, kind: int) -> FloatSpan | None:
    if kind not in FLOATS:
        return None
    return FloatSpan(path, name.decode("utf-8", "backslashreplace"), begin, begin + size, FLOATS[kind])


def _elements(dims: list[int], what: str) -> int:
    if not all(0 <= size < 2**40 for size in dims) or math.prod(dims) >= 2**48:
        raise Broken(f"the shape of {what}", "sizes of at least 0, in all less than 2^48", printable(str(dims)))
    return math.prod(dims)


def _length(raw: Field | None) -> int:
    return raw.end - raw.value if raw is not None else 0


def _number(text: bytes, what: str) -> int:
    if not (text.isdigit() and len(text) < 20):
        raise Broken(what, "a number that is not negative", printable(text))
    return int(text)
