"""Text of your own: files found by patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from edgewright.data.reading import TextFormat, read_file
from edgewright.data.source import Source
from edgewright.data.text import RawDocument
from edgewright.errors import BadInput
from pydantic import BeforeValidator, Field


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class FilesData(Source):
    """Files that match patterns: .txt, .md, .py, .jsonl, each also as .gz, .xz or .zst."""

    type: Literal["files"] = "files"
    files: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """One glob pattern or several; `**` goes through folders. A plain path is a pattern as well."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file."""
    separator: str = Field(default="<|endoftext|>", min_length=1)
    """What stands between two documents of a .txt file."""

    def fingerprint(self) -> list[object]:
        entries = []
        for name, path in find(self.files):
            status = path.stat()
            entries.append([name, status.st_size, status.st_mtime_ns])
        return [*entries]

    def documents(self) -> Iterator[RawDocument]:
        form = TextFormat(text_key=self.text_key, separator=self.separator)
        for name, path in find(self.files):
            yield from read_file(path, name, form)


def find(patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The files that match, each once, with names that do not depend on where the folder lies; sorted.

    A file's name is its path below the part of the pattern that has no wildcard.

    Raises:
        BadInput: EW-203 when a pattern matches no file.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        root = _fixed_part(pattern)
        paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
        files = [path for path in paths if path.is_file()]
        if not files:
            raise _nothing(pattern, paths)
        for path in files:
            found.setdefault(path.resolve(), path.relative_to(root).as_posix())
    return sorted((name, path) for path, name in found.items())


def _fixed_part(pattern: str) -> Path:
    """The folder above the first part with a wildcard, or the folder of a plain path."""
    parts = Path(pattern).parts
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def _nothing(pattern: str, matches: list[Path]) -> BadInput:
    folders = [path for path in matches if path.is_dir()]
    if folders:
        found, fix = f"a folder, {folders[0]}", f"name its files: {folders[0]}/**/*.txt"
    else:
        found, fix = "no file of that name", f"check data.files; relative paths start at {Path.cwd()}"
    return BadInput("EW-203", "no file matches data.files", where=pattern, found=found, fix=fix)
