"""What every pre-check shares: refusing by name, files that are files, bounded JSON, files walked in a window."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgewright.errors import BadInput

MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 16 * 2**20
MAX_CONTAINERS = 100_000
MAX_COMMAS = 150_000
"""Lists and objects, and items, in a JSON file: each takes 30 times its bytes in memory once it is parsed."""
WINDOW = 8 * 2**20
"""Bytes of a mapped file that may be resident before they are given back."""


class Broken(Exception):
    """What is wrong inside a file; `naming` adds the file."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found


@contextmanager
def naming(code: str, kind: str, path: Path) -> Iterator[None]:
    """Turn `Broken` into the error with this code that names the file.

    Raises:
        BadInput: `code`.
    """
    try:
        yield
    except Broken as broken:
        raise BadInput(
            code,
            f"this {kind} is damaged: {broken.what}",
            where=path.absolute(),
            expected=broken.expected,
            found=broken.found,
            fix="copy or write the file again, and compare its size and hash with the source",
        ) from None


def open_regular(path: Path) -> int:
    """Size in bytes of a readable regular file.

    Raises:
        BadInput: EW-311, there is no such file; a pipe or a device is refused too, since reading it could wait forever.
    """
    if not path.is_file():
        what = "this is not a regular file" if path.exists() else "there is no such file"
        raise BadInput("EW-311", what, where=path.absolute(), expected="a regular file", fix="check the path")
    return path.stat().st_size


def read_json(path: Path, *, limit: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """A JSON object from a file of bounded size, without duplicate keys.

    Raises:
        BadInput: EW-312, not such a file; EW-311, there is none.
    """
    size = open_regular(path)
    if size > limit:
        raise _bad_json(path, f"at most {limit} bytes", f"{size} bytes")
    raw = path.read_bytes()
    if limit <= MAX_INDEX_BYTES and (
        raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_COMMAS
    ):
        raise _bad_json(path, f"at most {MAX_CONTAINERS} lists and objects and {MAX_COMMAS} items", "more")
    try:
        text = raw.decode("utf-8")
        del raw
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, "valid JSON in UTF-8", str(error)[:200] or "nested too deeply") from None
    if not isinstance(value, dict):
        raise _bad_json(path, "an object", type(value).__name__)
    return value


def _bad_json(path: Path, expected: str, found: str) -> BadInput:
    fix = "copy or write the file again"
    return BadInput(
        "EW-312", "this JSON file cannot be used", where=path.absolute(), expected=expected, found=found, fix=fix
    )


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of a JSON parser that refuses what most parsers drop in silence: a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} occurs {count} times")
    return result


class Mapped:
    """A file mapped for reading, for a walker that moves forward: the pages behind it are given back."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self._kept = data, size, 0

    def passed(self, at: int) -> None:
        """Say how far the walk is, so that a file of any size takes no more than a window of memory."""
        if at - self._kept > WINDOW:
            self.data.madvise(mmap.MADV_DONTNEED)
            self._kept = at


@contextmanager
def mapped(path: Path) -> Iterator[Mapped]:
    """Map a regular file that is not empty."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        data.madvise(mmap.MADV_RANDOM)  # a walk that jumps over gigabytes must not read what it jumps over
        yield Mapped(data, path.stat().st_size)


def printable(value: bytes | str, limit: int = 80) -> str:
    """A name from a file as ASCII and short enough for a message, whatever bytes it holds."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
    return ascii(text[:limit]) + ("..." if len(text) > limit else "")
