"""Text of your own: files found by patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgewright.data.reading import TextFormat, file_kind, read_file, text_bytes
from edgewright.data.source import Source
from edgewright.data.text import RawDocument
from edgewright.errors import BadInput
from edgewright.paths import RelativeToRecipe

Pattern = Annotated[str, RelativeToRecipe()]


class FilesData(Source):
    """Files that match patterns: .txt, .md, .py, .jsonl, each also as .gz, .xz or .zst."""

    key: ClassVar[str] = "data.files"
    """Of the recipe, for messages."""

    type: Literal["files"] = "files"
    files: Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1)]
    """One glob pattern or several; `**` goes through folders. A plain path is a pattern as well."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file."""
    separator: str = Field(default="<|endoftext|>", min_length=1)
    """What stands between two documents of a .txt file."""

    @property
    def _patterns(self) -> tuple[str, ...]:
        return (self.files,) if isinstance(self.files, str) else self.files

    def fingerprint(self) -> list[object]:
        entries: list[object] = []
        for name, path in find(self._patterns, self.key):
            status = path.stat()
            entries.append([name, status.st_size, status.st_mtime_ns])
        return entries

    def text_bytes(self) -> int:
        return text_bytes([path for _, path in find(self._patterns, self.key)])

    def documents(self) -> Iterator[RawDocument]:
        form = TextFormat(text_key=self.text_key, separator=self.separator)
        for name, path in find(self._patterns, self.key):
            yield from read_file(path, name, form)


def find(patterns: tuple[str, ...], key: str = "data.files") -> list[tuple[str, Path]]:
    """The files that match, each once, with names that do not depend on where the folder lies; sorted.

    A file's name is its path below the part of the pattern that has no wildcard.

    Args:
        key: of the recipe, for messages.

    Raises:
        BadInput: EW-203 when a pattern matches no file, EW-204 when a file is of no kind that can be read.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for pattern in map(os.path.expanduser, patterns):
        literal = Path(pattern).is_file()  # a name may hold a bracket
        root = Path(pattern).parent if literal else _fixed_part(pattern)
        matches = [Path(pattern)] if literal else [Path(path) for path in glob.glob(pattern, recursive=True)]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise _nothing(pattern, matches, key)
        for path in files:
            file_kind(path)
            found.setdefault(path.resolve(), (path.relative_to(root).as_posix(), path))
    return sorted(found.values())


def _fixed_part(pattern: str) -> Path:
    """The folder above the first part with a wildcard."""
    parts = Path(pattern).parts
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def _nothing(pattern: str, matches: list[Path], key: str) -> BadInput:
    folders = [path for path in matches if path.is_dir()]
    if folders:
        found, fix = f"a folder, {folders[0]}", f"name its files: {folders[0]}/**/*.txt"
    else:
        found, fix = "no file of that name", f"check {key}; relative paths start at {Path.cwd()}"
    return BadInput("EW-203", f"no file matches {key}", where=pattern, found=found, fix=fix)
