"""Huge pages: what is moved, what is left alone."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest

from edgewright.export.runtimes import huge_pages
from edgewright.export.runtimes.huge_pages import HUGE, use_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
SIZE = 8 * HUGE


def smaps(address: int, key: str) -> int:
    """Bytes of a figure over the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if bounds := re.match(r"^([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no such mapping")


def mapping() -> tuple[mmap.mmap, int]:
    block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return block, ctypes.addressof(ctypes.c_char.from_buffer(block))


def test_memory_that_is_there_moves_and_keeps_its_bytes() -> None:
    block, address = mapping()
    content = bytes(range(256)) * (SIZE // 256)
    block[:] = content
    moved = use_huge_pages()
    if not moved:
        pytest.skip("this system gives no huge pages")
    assert smaps(address, "AnonHugePages") >= SIZE // 2
    assert block[:] == content


def test_memory_that_is_not_there_is_not_filled() -> None:
    block, address = mapping()
    block[:HUGE] = b"x" * HUGE
    before = smaps(address, "Rss")
    use_huge_pages()
    assert smaps(address, "Rss") < before + SIZE // 4  # neighbours may have grown


def test_mappings_of_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * SIZE)
    with (tmp_path / "file").open("r+b") as handle, mmap.mmap(handle.fileno(), SIZE, flags=mmap.MAP_PRIVATE) as block:
        block[::4096] = b"y" * (SIZE // 4096)
        pointer = ctypes.c_char.from_buffer(block)
        address = ctypes.addressof(pointer)
        assert all(not start <= address < end for start, end in huge_pages._large_mappings())
        del pointer


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages() == 0
