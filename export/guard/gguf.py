"""The pre-check of GGUF files: every count, length and offset against the size of the file, before it is believed.

The libraries that read the format do not name a broken file, accept some, and hang or read out of bounds on others.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgewright.export.guard.files import Broken, Mapped, mapped, naming, open_regular, printable
from edgewright.export.guard.template import MAX_TEMPLATE_BYTES, check_template
from edgewright.export.guard.values import FloatSpan, check_finite

MAX_TENSORS = 65_536
MAX_PAIRS = 65_536
MAX_KEY_BYTES = 2**20
"""All keys of the metadata together."""
MAX_STRINGS = 2_000_000
"""Most strings in the metadata: several times the largest vocabulary with its merges."""

# Bytes of the fixed-size metadata types by number; 8 is a string, 9 an array.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT16, _UINT32, _INT32, _FLOAT32 = 8, 9, 2, 4, 5, 6

GGML_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip
"""Weights per block and bytes per block of each tensor type, by its number in the format."""

_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
_SCALES = {
    2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2), 14: (208,),
    20: (0,), 34: (52,), 35: (64,), 42: (0,),
}  # fmt: skip
"""Where the fp16 scales and minima lie in a block of each type."""

TEMPLATE = "tokenizer.chat_template"
TOKENS = "tokenizer.ggml.tokens"
_PER_TOKEN = {"tokenizer.ggml.scores": (_FLOAT32,), "tokenizer.ggml.token_type": (_UINT32, _INT32)}
"""Arrays that the runtime indexes by token without looking at their type and length, and the types it means."""


class _Array(NamedTuple):
    element: int
    length: int


class _Cursor:
    """Reads little-endian values of a mapped file and never past its end."""

    def __init__(self, file: Mapped) -> None:
        self.file, self.data, self.size, self.at = file, file.data, file.size, 0

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes and return where they begin."""
        if count > self.size - self.at:
            raise Broken(f"{what} at byte {self.at} ends outside the file", f"<= {self.size - self.at} bytes", count)
        begin = self.at
        self.at += count
        self.file.passed(begin)
        return begin

    def number(self, layout: str, what: str) -> int:
        begin = self.skip(struct.calcsize(layout), what)
        return int(struct.unpack_from(layout, self.data, begin)[0])

    def text(self, limit: int, what: str) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise Broken(f"the length of {what} at byte {self.at - 8}", f"at most {limit} bytes", length)
        begin = self.skip(length, what)
        try:
            return bytes(self.data[begin : self.at]).decode("utf-8")
        except UnicodeDecodeError:
            raise Broken(f"{what} at byte {begin}", "UTF-8", ascii(self.data[begin : self.at][:32])) from None

    def strings(self, count: int, what: str) -> None:
        """Skip `count` strings."""
        at, size, unpack, data = self.at, self.size, struct.Struct("<Q").unpack_from, self.data
        for index in range(count):
            if at + 8 > size:
                raise Broken(f"{what} ends outside the file", f"{count} strings", f"the file ends at {size}")
            at += 8 + unpack(data, at)[0]
            if not index & 63:
                self.file.passed(at)
        if at > size:
            raise Broken(f"{what} ends outside the file", f"at most {size} bytes", at)
        self.at = at


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose counts, lengths and offsets do not agree with its size, or whose numbers are not finite.

    Checked: magic, version, counts, keys and names (length, UTF-8, no duplicates), value types, lengths of strings and
    arrays, that scores and types of tokens are as many as the tokens, alignment, that it is no part of a split model,
    tensor types and shapes, offsets that follow each other and end inside the file, the chat templates, and the values
    of plain tensors and the scales of blocks (the smallest tensors first, up to `guard/values.BUDGET` bytes).

    Raises:
        BadInput: EW-318 names file, place, expected and found; EW-323, a weight or scale is NaN or infinite. EW-311
            when there is no such file.
        Unsafe: EW-339, a chat template does what no template needs.
    """
    size = open_regular(path)
    with naming("EW-318", "GGUF file", path):
        if size < 24:
            raise Broken("it is too short for a header", "at least 24 bytes", f"{size} bytes")
        with mapped(path) as file:
            spans = list(_check_gguf(_Cursor(file), path))
    check_finite(spans)


def _check_gguf(cursor: _Cursor, path: Path) -> Iterator[FloatSpan]:
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise Broken("its first bytes", b"GGUF", magic)
    cursor.skip(4, "magic")
    version = cursor.number("<I", "version")
    if version not in (2, 3):
        raise Broken("its version (byte 4)", "2 or 3, little endian", version)
    tensors, pairs = cursor.number("<Q", "tensor count"), cursor.number("<Q", "metadata count")
    room = cursor.size - cursor.at
    # A pair takes at least 13 bytes (key length, type, one byte), a tensor at least 33.
    for what, count, most in (
        ("tensors (byte 8)", tensors, min(MAX_TENSORS, room // 33)),
        ("metadata entries (byte 16)", pairs, min(MAX_PAIRS, room // 13)),
    ):
        if count > most:
            raise Broken(f"the number of {what}", f"at most {most}", count)
    alignment = _check_metadata(cursor, pairs, path)
    spans = _check_tensors(cursor, tensors, alignment, path)
    begin = -(-cursor.at // alignment) * alignment
    end = max((span.end for span in spans), default=0)
    if spans and begin + end > cursor.size:
        raise Broken("the data of its tensors end outside the file", f"{begin + end} bytes", f"{cursor.size} bytes")
    return (span._replace(begin=begin + span.begin, end=begin + span.end) for span in spans)


def _check_metadata(cursor: _Cursor, pairs: int, path: Path) -> int:
    """Walk the metadata; the alignment of the data part in bytes."""
    seen: set[str] = set()
    arrays: dict[str, _Array] = {}
    alignment, strings, keys = 32, 0, 0
    for _ in range(pairs):
        begin = cursor.at
        key = cursor.text(65_535, "a metadata key")
        keys += len(key)
        if key in seen or not key or keys > MAX_KEY_BYTES:
            raise Broken(f"a metadata key at byte {begin}", "every key once, short, not empty", printable(key))
        seen.add(key)
        kind = cursor.number("<I", f"the type of {printable(key)}")
        value = cursor.at
        if key == "general.alignment":
            alignment = _alignment(cursor, kind)
            continue
        array = _skip_value(cursor, kind, key)
        strings += array.length if array.element == _STRING else 0
        if strings > MAX_STRINGS:
            raise Broken("the number of strings in its metadata", f"at most {MAX_STRINGS}", strings)
        if kind == _ARRAY and (key in _PER_TOKEN or key == TOKENS):
            arrays[key] = array
        if key == "split.count" and int.from_bytes(cursor.data[value : cursor.at], "little") > 1:
            fix = "a file that holds the whole model: llama-gguf-split --merge"
            raise Broken("it is a part of a split model, whose other parts no check has seen", fix, "split.count > 1")
        if kind == _STRING and (key == TEMPLATE or key.startswith(TEMPLATE + ".")):
            text = cursor.data[value + 8 : min(cursor.at, value + 9 + MAX_TEMPLATE_BYTES)]
            check_template(path, f"the metadata {printable(key)}", text)
    _check_tokens(arrays)
    return alignment


def _alignment(cursor: _Cursor, kind: int) -> int:
    if kind != _UINT32:
        raise Broken("the type of general.alignment", _UINT32, kind)
    begin = cursor.at
    alignment = cursor.number("<I", "general.alignment")
    if not 1 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise Broken(f"general.alignment at byte {begin}", "a power of two up to 65536", alignment)
    return alignment


def _check_tokens(arrays: dict[str, _Array]) -> None:
    for key, types in _PER_TOKEN.items():
        if key not in arrays:
            continue
        found, tokens = arrays[key], arrays.get(TOKENS, _Array(_STRING, 0))
        if found.element not in types or found.length != tokens.length:
            expected = f"{tokens.length} values of type {types[0]}, one for each of {TOKENS}"
            raise Broken(f"the array {key}", expected, f"{found.length} values of type {found.element}")


def _skip_value(cursor: _Cursor, kind: int, key: str) -> _Array:
    """Walk one value; its element type and count."""
    name = printable(key)
    if kind in SCALARS:
        cursor.skip(SCALARS[kind], f"the value of {name}")
        return _Array(kind, 1)
    if kind == _STRING:
        cursor.strings(1, f"the value of {name}")
        return _Array(_STRING, 1)
    if kind != _ARRAY:
        raise Broken(f"the type of {name} at byte {cursor.at - 4}", "a number from 0 to 12", kind)
    element, count = cursor.number("<I", f"the type of {name}"), cursor.number("<Q", f"the length of {name}")
    if element in SCALARS:
        cursor.skip(SCALARS[element] * count, f"the array {name}")
        return _Array(element, count)
    if element != _STRING:
        raise Broken(f"the element type of the array {name}", "a scalar or a string", element)
    room = min(MAX_STRINGS, (cursor.size - cursor.at) // 8)
    if count > room:
        raise Broken(f"the length of the array {name} at byte {cursor.at - 8}", f"at most {room} strings", count)
    cursor.strings(count, f"the array {name}")
    return _Array(_STRING, count)


def _check_tensors(cursor: _Cursor, tensors: int, alignment: int, path: Path) -> list[FloatSpan]:
    """Walk the tensor table; where each tensor lies in the data part."""
    seen: set[str] = set()
    spans = []
    position = 0
    for _ in range(tensors):
        begin = cursor.at
        name = cursor.text(63, "a tensor name")
        if name in seen or not name:
            raise Broken(f"a tensor name at byte {begin}", "every name once, and not empty", printable(name))
        seen.add(name)
        dimensions = cursor.number("<I", f"the dimensions of {name!r}")
        if not 1 <= dimensions <= 4:
            raise Broken(f"the dimensions of tensor {name!r} at byte {cursor.at - 4}", "1 to 4", dimensions)
        shape = struct.unpack_from(f"<{dimensions}Q", cursor.data, cursor.skip(8 * dimensions, f"shape of {name!r}"))
        kind, offset = cursor.number("<I", f"the type of {name!r}"), cursor.number("<Q", f"the offset of {name!r}")
        size = _tensor_bytes(name, shape, kind)
        if offset != position:
            raise Broken(f"the offset of tensor {name!r} at byte {cursor.at - 8}", position, offset)
        if size > cursor.size:
            raise Broken(f"tensor {name!r} is larger than the file", f"<= {cursor.size} bytes", f"{size} bytes")
        spans.append(_float_span(path, name, kind, position, position + size))
        position = -(-(position + size) // alignment) * alignment
    return spans


def _float_span(path: Path, name: str, kind: int, begin: int, end: int) -> FloatSpan:
    if kind in _SCALES:
        return FloatSpan(path, name, begin, end, "F16", block=GGML_BLOCKS[kind][1], places=_SCALES[kind])
    return FloatSpan(path, name, begin, end, _PLAIN.get(kind, ""))


def _tensor_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind not in GGML_BLOCKS:
        raise Broken(f"the type of tensor {name!r}", "a type that this version knows", kind)
    if not all(0 < size < 2**40 for size in shape):
        raise Broken(f"the shape of tensor {name!r}", "sizes of at least 1", list(shape))
    block, width = GGML_BLOCKS[kind]
    if shape[0] % block:
        raise Broken(f"the rows of tensor {name!r}", f"a multiple of {block}", shape[0])
    return math.prod(shape) // block * width
