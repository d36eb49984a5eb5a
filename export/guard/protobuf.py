"""The wire format of protocol buffers, walked with bounds and without building a message.

A parser believes lengths and builds every message; this walk compares each length with the message around it, and
skips what nobody asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from edgewright.export.guard.files import Broken, Mapped

MAX_FIELDS = 400_000
"""Fields that are visited in one file: a model of 16,000 nodes has as many."""

MAX_TEXT_BYTES = 8 * 2**20
"""All names that are read in one file."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    """One field of a message."""

    number: int
    kind: int
    value: int
    """Of a VARINT its value, unsigned; else where its bytes begin."""
    end: int
    """Where the field ends."""


class Wire:
    """The fields of messages in a mapped file, visited in the order of the file."""

    def __init__(self, file: Mapped) -> None:
        self._file, self.data, self._visited, self._text = file, file.data, 0, 0

    def fields(self, begin: int, end: int, what: str) -> Iterator[Field]:
        """The fields of the message that lies from `begin` to `end`.

        Raises:
            Broken: a field ends outside the message, is of no known kind, or the file has too many.
        """
        data, at = self.data, begin
        while at < end:
            place = at
            self._visited += 1
            if not self._visited & 15:
                self._file.passed(place)
                if self._visited > MAX_FIELDS:
                    raise Broken("the number of its fields", f"at most {MAX_FIELDS}", f"more, at byte {place}")
            key = data[at]
            at += 1
            if key & 0x80:
                key, at = self.varint(place, end, what)
            number, kind = key >> 3, key & 7
            if kind == BYTES:
                length = data[at] if at < end else 0x80
                at += 1
                if length & 0x80:
                    length, at = self.varint(at - 1, end, what)
                value, at = at, at + length
            elif kind == VARINT:
                value, at = self.varint(at, end, what)
            elif kind in _FIXED:
                value, at = at, at + _FIXED[kind]
            else:
                raise Broken(f"{what} at byte {place}", "a field of a known kind", f"kind {kind}")
            if at > end or not number:
                raise Broken(f"field {number} of {what} at byte {place}", f"to end at byte {end} or before", at)
            yield Field(number, kind, value, at)

    def varint(self, at: int, end: int, what: str) -> tuple[int, int]:
        """An unsigned number of up to 64 bits and where it ends."""
        value = shift = 0
        for place in range(at, min(end, at + 10)):
            byte = self.data[place]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value & (2**64 - 1), place + 1
        raise Broken(f"a number in {what} at byte {at}", "at most 10 bytes, before the message ends", "more")

    def varints(self, field: Field, what: str, limit: int) -> list[int]:
        """The numbers of a repeated field, packed or not, at most `limit`."""
        if field.kind == VARINT:
            return [field.value]
        require(field, BYTES, what)
        values, at = [], field.value
        while at < field.end:
            value, at = self.varint(at, field.end, what)
            values.append(value)
            if len(values) > limit:
                raise Broken(f"{what} at byte {field.value}", f"at most {limit} numbers", "more")
        return values

    def bytes(self, field: Field, what: str, limit: int) -> bytes:
        """The bytes of a string, at most `limit`."""
        require(field, BYTES, what)
        size = field.end - field.value
        self._text += size
        if size > limit or self._text > MAX_TEXT_BYTES:
            limits = f"at most {limit} bytes, and {MAX_TEXT_BYTES} in all names"
            raise Broken(f"{what} at byte {field.value}", limits, f"{size} and {self._text} bytes")
        return bytes(self.data[field.value : field.end])


def require(field: Field, kind: int, what: str) -> None:
    """Refuse a field of another kind than the format says: parsers differ in what they make of it."""
    if field.kind != kind:
        raise Broken(f"{what} at byte {field.value}", f"a field of kind {kind}", f"kind {field.kind}")


def signed(value: int) -> int:
    """A 64-bit number as the format stores an int64."""
    return value - 2**64 if value >= 2**63 else value
