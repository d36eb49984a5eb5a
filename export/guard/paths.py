"""File names inside model files: only names of real files in the same folder are followed."""

from __future__ import annotations

import re
from pathlib import Path

from edgewright.errors import BadInput, Unsafe
from edgewright.export.guard.files import printable

_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:*?\"<>|\ud800-\udfff]")
"""What no file name in a model needs: control characters, bytes that are no UTF-8, drives and wildcards of Windows."""


def is_plain(name: str) -> bool:
    """Whether a name is relative, stays below its folder, and holds nothing that a system could read otherwise."""
    parts = name.split("/")
    return bool(name) and len(name) < 512 and not _UNSAFE.search(name) and not {"", ".", ".."} & set(parts)


def inside(path: Path, folder: Path, name: str, what: str) -> Path:
    """The file in `folder` that a model file names, if it is there, is itself and is nobody else's.

    Args:
        path: the model file, for the message.
        folder: where the names begin.
        name: relative, as the model file has it.
        what: says what the name is for: "the tensor 'w' at byte 3 has its data".

    Raises:
        Unsafe: EW-331, the name is absolute, climbs out of the folder, or is a link of either kind.
        BadInput: EW-311, there is no such file.
    """
    if not is_plain(name):
        raise _elsewhere(path, what, name, "the name of a file in this folder")
    target = folder
    for part in name.split("/"):
        target = target / part
        if target.is_symlink():
            raise _elsewhere(path, what, f"{name}, a link to {printable(str(target.readlink()))}", "a file, not a link")
    if not target.is_file():
        raise BadInput(
            "EW-311",
            f"{what} in a file that is not there",
            where=path.absolute(),
            expected=f"a regular file {name}",
            found="something else" if target.exists() else "no such file",
            fix="copy the whole folder",
        )
    if is_shared(target, folder):
        raise _elsewhere(path, what, f"{name}, a hard link to a file outside", "a file of this folder alone")
    return target


def is_shared(target: Path, folder: Path) -> bool:
    """Whether a file has a further name that is not in the folder: its bytes may be anybody's."""
    status = target.stat()
    if status.st_nlink < 2:
        return False
    beside = (entry.stat(follow_symlinks=False) for entry in target.parent.iterdir())
    names = sum(other.st_ino == status.st_ino and other.st_dev == status.st_dev for other in beside)
    return names < status.st_nlink


def _elsewhere(path: Path, what: str, found: str, expected: str) -> Unsafe:
    return Unsafe(
        "EW-331",
        f"{what} in a place that is not its own",
        where=path.absolute(),
        expected=expected,
        found=found if found.isprintable() else printable(found),
        fix="do not use this model; if it is your own, copy the folder with its links resolved: cp -rL FOLDER COPY",
    )
