"""Huge pages under weights that a runtime holds in ordinary memory.

A decoder reads all its weights for every token. In pages of 4 KiB that costs a look into the page table every 64
cache lines; in pages of 2 MiB every 32,768. Linux gives them on request alone (`madvise`), and runtimes do not ask.
The standard library suffices, so that the runner of a bench pack can carry this file.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HUGE = 2 * 2**20
"""Bytes of a huge page on x86-64, and on ARM with pages of 4 KiB."""
MADV_COLLAPSE = 25
"""Linux 6.1: put what is there into huge pages now; it does not wait for the kernel's own search."""
LEAST = 4 * 2**20
"""Bytes of a mapping that is worth asking for: smaller ones fit into caches."""
RESIDENT = 0.95
"""Share of a mapping that must be in memory. Collapsing fills holes, and they would count as memory in use."""
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ 0\s*(\[heap\])?$")
"""Private, writable, of no file."""


def use_huge_pages() -> int:
    """Move the process's large anonymous memory into huge pages, where the system has them.

    It changes where bytes lie, never what they are, and costs one copy of them. Where the system cannot (not Linux,
    older than 6.1, forbidden, no free huge page) all stays as it is.

    Returns:
        Bytes of the mappings that are in huge pages now.
    """
    if sys.platform != "linux":
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for start, end in list(_large_mappings()):
        if advise(start, end - start, MADV_COLLAPSE) == 0:
            moved += end - start
    return moved


def _large_mappings() -> Iterator[tuple[int, int]]:
    """First and last address of the whole huge pages in mappings that are in memory."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    bounds: tuple[int, int] | None = None
    for line in lines:
        if match := _MAPPING.match(line):
            bounds = int(match[1], 16), int(match[2], 16)
        elif "-" in line.partition(" ")[0]:
            bounds = None
        elif bounds and line.startswith("Rss:"):
            start, end = -(-bounds[0] // HUGE) * HUGE, bounds[1] // HUGE * HUGE
            resident = 1024 * int(line.split()[1])
            if end - start >= LEAST and resident >= RESIDENT * (bounds[1] - bounds[0]):
                yield start, end
            bounds = None
