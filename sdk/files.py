"""Writing files so that a crash leaves the old one, the new one, or nothing: never a part of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
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
    """Turn a full disk or quota into an error that says where, how much is free and what to do (EW-401)."""
    try:
        yield
    except Exception as error:
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
    """Also true for libraries (safetensors) that hide the errno in a message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return os.strerror(errno.ENOSPC) in str(error)
