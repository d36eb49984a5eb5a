"""A real corpus that every machine has: the source of the running interpreter's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from edgewright.data.reading import TextFormat, read_file
from edgewright.data.source import Source
from edgewright.data.text import BadTextPolicy, RawDocument
from edgewright.errors import BadInput

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

GENERATED = ("_sysconfigdata", "config-")
"""Written when this interpreter was built: they differ from machine to machine and hold its paths."""


class StdlibData(Source):
    """The `.py` files of the standard library, tests and installed packages left out, sorted by path."""

    type: Literal["stdlib"] = "stdlib"
    on_bad_text: BadTextPolicy = "skip"
    """A distribution may ship a module in another encoding; it is dropped and counted."""

    def fingerprint(self) -> list[object]:
        root = _root()
        statuses = [(name, (root / name).stat()) for name in _names(root)]
        return [[name, status.st_size, status.st_mtime_ns] for name, status in statuses]

    def documents(self) -> Iterator[RawDocument]:
        root = _root()
        for name in _names(root):
            yield from read_file(root / name, name, TextFormat())


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _names(root: Path) -> list[str]:
    """Paths relative to the library, `/` between the parts, in a fixed order."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(GENERATED)]
        sources = [name for name in files if name.endswith(".py") and not name.startswith(GENERATED)]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in sources]
    if not names:
        raise BadInput(
            "EW-203",
            "this Python has no source files of its standard library",
            where=root,
            fix="use data.type `files` with text of your own, or a Python that is not stripped",
        )
    return sorted(names)
