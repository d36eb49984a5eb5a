"""The pre-check of bundles: the folder around a target and its draft. Each of these is checked as what it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgewright.errors import BadInput, Unsafe
from edgewright.export.guard.files import printable
from edgewright.export.guard.folder import check_entries
from edgewright.export.guard.paths import inside, is_plain

SCRIPTS = frozenset({"launch.py"})
"""Scripts that lie in a bundle for its user; no library opens the folder that holds them, and nothing runs them."""


def check_pair_folder(directory: Path, parts: Sequence[str]) -> None:
    """Refuse a bundle whose entries are unsafe, or whose parts lie elsewhere.

    Args:
        directory: the bundle.
        parts: the names of its parts, as its manifest has them: files or folders.

    Raises:
        Unsafe: EW-331, a part outside the bundle, or a link; what `check_entries` refuses.
        BadInput: EW-311, a part is missing.
    """
    check_entries(directory, scripts=SCRIPTS)
    for name in parts:
        place = directory / name
        if is_plain(name) and "/" not in name and place.is_dir() and not place.is_symlink():
            continue
        if is_plain(name) and place.is_dir():
            raise Unsafe(
                "EW-331",
                "a part of this pair is a link",
                where=place.absolute(),
                expected="a folder of the bundle",
                found=printable(name),
                fix="copy the bundle with its links resolved: cp -rL FOLDER COPY",
            )
        if is_plain(name) and not place.exists():
            raise BadInput(
                "EW-311",
                f"this pair lacks its part {printable(name)}",
                where=directory.absolute(),
                expected=name,
                found=", ".join(sorted(path.name for path in directory.iterdir())[:8]),
                fix="copy the whole folder",
            )
        inside(directory, directory, name, "the manifest has a part")
