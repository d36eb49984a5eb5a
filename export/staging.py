"""An artifact appears whole or not at all: temporary names beside the final one, and the swap."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgewright.export.artifact import sync


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Make a folder; where it and those above it were made for nothing, they vanish at the end."""
    new = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in new:
            if any(each.iterdir()):
                break
            each.rmdir()


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A temporary name beside the final one; what is left of it vanishes at the end, and so does that of dead runs."""
    _tidy(final)
    place = final.with_name(f".{final.stem}.{os.getpid()}.staged{final.suffix}")
    remove(place)
    try:
        yield place
    finally:
        remove(place)


def swap(place: Path, final: Path) -> None:
    """Make the staged artifact the final one. A folder that was there is put aside first, and removed after."""
    if place.is_file():
        sync(place)
        os.replace(place, final)
        sync(final.parent)
        return
    aside = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        os.replace(final, aside)
    try:
        os.replace(place, final)
    except OSError:
        if aside.exists():
            os.replace(aside, final)
        raise
    sync(final.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tidy(final: Path) -> None:
    """Remove what dead runs left beside a final name; a folder that one had put aside goes back to its place."""
    for kind, name in (("staged" + final.suffix, final.stem), ("old", final.name)):
        for stale in final.parent.glob(f".{glob.escape(name)}.*.{glob.escape(kind)}"):
            owner = stale.name.removeprefix(f".{name}.").split(".")[0]
            if not owner.isdigit() or _alive(int(owner)):
                continue
            if kind == "old" and not final.exists():
                os.replace(stale, final)
            else:
                remove(stale)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
