"""How a teacher's targets lie on disk: pieces of whole sequences, each a file that is complete or is not there.

    magic "EWCACHE1" | uint32 length of the header | header (JSON) | payload

The header says which sequences these are, of which cache, how long the payload is and what its SHA-256 is. All numbers
are little-endian. With T tokens in a piece the payload is

* sampled: the N draws of a token are sorted by id. `first`, for each sequence N - 1 bits a token: whether the second,
  third, ... of its draws is another token than the one before it. `ids`, for each sequence `id_bits` for each different
  token, rising. Bits fill bytes from the lowest on, and every sequence begins with a byte of its own; `starts` uint64
  [sequences + 1], bytes of `ids` before each.  A token with u different draws takes (N - 1 + u id_bits) / 8 bytes.
* top_k: `ids` [T, k] of `id_bytes` each; `probabilities` float16 [T, k]; `tail` float16 [T], the mass of all others.

float16 holds a probability to 2^-11 of itself, or to 3e-8 where it is below 6e-5. The tail is kept and not worked out,
since 1 - sum would be rounding alone where it is small.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from edgewright.errors import BadInput
from edgewright.files import disk_errors, sync_directory

MAGIC = b"EWCACHE1"
FORMATS = {"sampled": 2, "top_k": 1}
"""The version of each kind's payload. Sampled 1 had whole bytes for every entry, a third more."""
MOST_HEADER = 1 << 16
PIECE_TOKENS = 1 << 18
"""Tokens of a piece, about: what is done again after a kill, and read again to be verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What decides the bytes of an entry."""

    kind: str
    """sampled or top_k."""
    most: int
    """Draws, or k."""
    vocab_size: int
    """Of the teacher."""

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def id_bytes(self) -> int:
        return -(-self.id_bits // 8)

    def first_bytes(self, tokens: int) -> int:
        """Of the bits that tell draws of a sequence's tokens apart."""
        return -(-tokens * (self.most - 1) // 8)

    def bytes_per_token(self, entries: float, sequence_length: int) -> float:
        """Of the payload, for so many different tokens drawn on average."""
        if self.kind == "top_k":
            return self.most * (self.id_bytes + 2) + 2
        filled = self.first_bytes(sequence_length) + 8 + 0.5  # of the last byte of ids half is empty, on average
        return entries * self.id_bits / 8 + filled / sequence_length


def to_bytes(values: np.ndarray, width: int) -> np.ndarray:
    """Unsigned integers as `width` bytes each: uint8 [..., width]."""
    wide = np.ascontiguousarray(values.astype("<u8"))
    return wide.view(np.uint8).reshape(*values.shape, 8)[..., :width]


def from_bytes(raw: np.ndarray, width: int) -> np.ndarray:
    """The other way round: int64 [n] of n * width bytes."""
    columns = raw.reshape(-1, width).astype(np.int64)
    return (columns << (8 * np.arange(width))).sum(-1)


def to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Unsigned integers below 2^32 as `width` bits each, one after the other: uint8 [ceil(n * width / 8)]."""
    raw = np.ascontiguousarray(values.astype("<u4")).view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(raw, axis=-1, bitorder="little")[:, :width].reshape(-1), bitorder="little")


def from_bits(raw: np.ndarray, count: int, width: int) -> np.ndarray:
    """The other way round: uint32 [count]."""
    bits = np.zeros((count, 32), np.uint8)
    bits[:, :width] = np.unpackbits(raw, count=count * width, bitorder="little").reshape(count, width)
    return np.packbits(bits, axis=-1, bitorder="little").view("<u4").reshape(count)


def piece_path(folder: Path, number: int) -> Path:
    """The file of a piece."""
    return folder / f"{number:05d}.targets"


def write_piece(path: Path, header: dict[str, Any], payload: bytes) -> str:
    """Write a piece so that it is there as a whole or not at all; the SHA-256 of its payload."""
    digest = hashlib.sha256(payload).hexdigest()
    text = json.dumps({**header, "bytes": len(payload), "sha256": digest}).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path), temporary.open("wb") as file:
        file.write(MAGIC + np.uint32(len(text)).astype("<u4").tobytes() + text)
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
    return digest


class _Header(BaseModel):
    """What a piece says of itself. No digest is over it, so that it has to hold together."""

    model_config = ConfigDict(frozen=True, strict=True)
    fingerprint: str
    first: int
    bytes: int
    sha256: str
    sections: dict[str, tuple[int, int]]

    @model_validator(mode="after")
    def _fill(self) -> _Header:
        """Sections lie one after the other and fill the payload."""
        end = 0
        for begin, size in self.sections.values():
            if begin != end or size < 0:
                raise ValueError("sections do not lie one after the other")
            end += size
        if end != self.bytes:
            raise ValueError("sections do not fill the payload")
        return self


class Piece:
    """A piece that was opened: its header holds together, its size is right; `payload` verifies the content once.

    Args:
        path: of the file.
        fingerprint: of the cache.
        first: number of the sequence that it begins with.

    Raises:
        BadInput: EW-791, the file is missing, cut off, not of this cache or this place in it, or damaged.
    """

    def __init__(self, path: Path, fingerprint: str, first: int) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(len(MAGIC) + 4)
                length = int.from_bytes(start[len(MAGIC) :], "little")
                if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 4 or length > MOST_HEADER:
                    raise self._bad("no piece of a cache")
                self.header = _Header.model_validate_json(file.read(length))
        except OSError as error:
            raise self._bad(error.strerror or str(error)) from None
        except ValueError:
            raise self._bad("a damaged header") from None
        self._begin = len(MAGIC) + 4 + length
        if self.header.fingerprint != fingerprint:
            raise self._bad("a piece of another cache")
        if self.header.first != first:
            raise self._bad(f"the piece that begins with sequence {self.header.first:,} instead of {first:,}")
        expected = self._begin + self.header.bytes
        if size != expected:
            raise self._bad(f"{size:,} bytes instead of {expected:,}")

    @cached_property
    def payload(self) -> np.ndarray:
        """uint8, memory-mapped."""
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r", offset=self._begin)
        if hashlib.sha256(mapped.data).hexdigest() != self.header.sha256:
            raise self._bad("content that does not fit its SHA-256")
        return mapped

    def section(self, name: str) -> np.ndarray:
        """A part of the payload, uint8."""
        if name not in self.header.sections:
            raise self._bad("a damaged header")
        begin, size = self.header.sections[name]
        return self.payload[begin : begin + size]

    def _bad(self, found: str) -> BadInput:
        return BadInput(
            "EW-791",
            "a piece of the cache cannot be used",
            where=self.path.absolute(),
            expected="the piece that the cache stage wrote",
            found=found,
            fix="delete that file and run the recipe with the cache stage again: it makes the missing pieces alone",
        )


def joined(sections: dict[str, np.ndarray]) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Sections one after the other: where each lies, and all bytes."""
    places, parts, begin = {}, [], 0
    for name, values in sections.items():
        raw = values.tobytes()
        places[name] = (begin, len(raw))
        parts.append(raw)
        begin += len(raw)
    return places, b"".join(parts)
