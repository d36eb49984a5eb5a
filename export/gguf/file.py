"""A GGUF file, opened: its settings, and its tensors as the blocks that they are stored in.

The package gguf reads such files too, but refuses a file for one tensor type that it does not know, and takes seconds
for a large vocabulary. This reader knows nothing of the code that writes.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from edgewright.export.guard import check_gguf

Q2_0 = 42
"""Ternary (and twice the scale) in blocks of 64, which the package does not know: fp16 scale, then 16 bytes of codes
in two bits, low bits first, stored as code + 1."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
"""The keys of the vocabulary's texts and of their types."""

Setting = bool | int | float | str | tuple[bool | int | float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a file."""

    shape: tuple[int, ...]
    """Rows first: `[out, in]` of a matrix."""
    number: int
    """ggml's number of its type."""
    data: np.ndarray
    """uint8 `[rows, bytes per row]`, mapped from the file."""

    @property
    def kind(self) -> str:
        """ggml's name of its type, in lower case."""
        return "q2_0" if self.number == Q2_0 else gguf.GGMLQuantizationType(self.number).name.lower()

    def values(self) -> np.ndarray:
        """float32 of the tensor's shape."""
        if self.number == Q2_0:
            return _q2_0_values(self.data).reshape(self.shape)
        kind = gguf.GGMLQuantizationType(self.number)
        plain = {kind.F32: np.float32, kind.F16: np.float16}.get(kind)
        data = self.data if plain is None else self.data.view(plain)
        values: np.ndarray = gguf.quants.dequantize(data, kind)
        return values.astype(np.float32, copy=False).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """What a file says and holds."""

    settings: dict[str, Setting]
    """The metadata by its keys; lists of texts (the vocabulary) are left out."""
    tensors: dict[str, StoredTensor]


def open_gguf(path: Path) -> GgufFile:
    """Open a file, after the guard has passed it.

    Raises:
        Unsafe, BadInput: what `check_gguf` refuses.
    """
    check_gguf(path)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(data)
    _, _, tensors, settings = reader.numbers("<IIQQ")
    found = dict(reader.setting() for _ in range(settings))
    infos = [reader.info() for _ in range(tensors)]
    alignment = found.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)
    start = -(-reader.at // alignment) * alignment
    return GgufFile(
        settings={key: value for key, value in found.items() if value is not None},
        tensors={name: _stored(data, start + offset, shape, number) for name, shape, number, offset in infos},
    )


def token_texts(path: Path) -> list[str | None]:
    """The texts of a file's vocabulary by id, as it spells them; None for ids that only fill it up.

    Raises:
        Unsafe, BadInput: what `check_gguf` refuses.
    """
    check_gguf(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, texts_of=TOKENS)
        *_, settings = reader.numbers("<IIQQ")
        found = dict(reader.setting() for _ in range(settings))
    kinds = found.get(TOKEN_TYPES)
    assert kinds is None or isinstance(kinds, tuple)
    unused = {index for index, kind in enumerate(kinds or ()) if kind == gguf.TokenType.UNUSED}
    return [None if index in unused else text for index, text in enumerate(reader.texts)]


def _stored(data: mmap.mmap, offset: int, shape: tuple[int, ...], number: int) -> StoredTensor:
    block, size = (64, 18) if number == Q2_0 else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    rows, width = math.prod(shape[:-1]), shape[-1] // block * size
    blocks = np.frombuffer(data, np.uint8, rows * width, offset).reshape(rows, width)
    return StoredTensor(shape=shape, number=number, data=blocks)


def _q2_0_values(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    codes = np.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(blocks), 64)
    return (codes.astype(np.float32) - np.float32(1)) * scales


class _Reader:
    """Little-endian values one after the other; the guard has checked that they are all there."""

    def __init__(self, data: mmap.mmap, *, texts_of: str | None = None) -> None:
        self.data, self.at = data, 0
        self.texts_of = texts_of
        self.texts: list[str] = []
        """The list of texts under the key `texts_of`, once it was read; other lists of texts are skipped."""

    def numbers(self, layout: str) -> tuple[int, ...]:
        found = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return found

    def text(self) -> str:
        (length,) = self.numbers("<Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def setting(self) -> tuple[str, Setting | None]:
        key = self.text()
        (kind,) = self.numbers("<I")
        if kind == _STRING:
            return key, self.text()
        if kind != _ARRAY:
            return key, self.numbers(f"<{_SCALARS[kind]}")[0]
        kind, count = self.numbers("<IQ")
        if kind == _STRING and key == self.texts_of:
            self.texts = [self.text() for _ in range(count)]
            return key, None
        if kind == _STRING:
            for _ in range(count):
                self.at += 8 + int.from_bytes(self.data[self.at : self.at + 8], "little")
            return key, None
        return key, self.numbers(f"<{count}{_SCALARS[kind]}")

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with rows first, type and offset of a tensor."""
        name = self.text()
        (dimensions,) = self.numbers("<I")
        shape = self.numbers(f"<{dimensions}Q")[::-1]
        number, offset = self.numbers("<IQ")
        return name, shape, number, offset
