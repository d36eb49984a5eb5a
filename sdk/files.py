"""Writing files so that a crash leaves the old one, the new one, or nothing: never a part of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgewright.errors import OutOfResources


def write_text(path: Path, text: str) -> None:
    """Atomic write: temporary name beside it, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_json(path: Path, value: object) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """fsync every file and folder below `directory`."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or quota (EW-401) and a place that cannot be written (EW-407) into errors that say where."""
    try:
        yield
    except Exception as error:
        if _is_closed(error, path):
            raise OutOfResources(
                "EW-407", "this place cannot be written", where=path, expected="a folder that this user may write to",
                found=str(error), fix="choose another place, or change its permissions",
            ) from error  # fmt: skip
        if not _disk_is_full(error):
            raise
        status = os.statvfs(path.parent if path.parent.exists() else Path.cwd())
        raise OutOfResources(
            "EW-401",
            "the disk is full",
            where=path,
            found=f"{status.f_bavail * status.f_frsize:,} bytes free",
            fix="free space and run the same command again: it goes on from the last good checkpoint",
        ) from error


def _disk_is_full(error: Exception) -> bool:
    """Also true for libraries (safetensors, numpy) that hide the errno in a message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return os.strerror(errno.ENOSPC) in text or re.fullmatch(r"\d+ requested and \d+ written", text) is not None


def _is_closed(error: Exception, path: Path) -> bool:
    """Whether this is about writing to `path` or beside it, where nobody or not this user may write."""
    if not isinstance(error, OSError) or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
        return False
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return any(name in (path, path.parent) or name.parent == path.parent for name in named)
