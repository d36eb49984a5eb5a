"""Who may work in a run directory: it is a run's own, it can be written, and one process at a time has it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.errors import Locked, OutOfResources, Unsafe
from edgewright.files import write_json, write_text

if TYPE_CHECKING:
    from edgewright.recipe import Recipe

MARKER = ".edgewright-run"
"""A file that says that a directory is a run's, so that `--fresh` never removes anything else."""
PARTS = ("data", "stages", "exports")
"""Folders of a run directory that belong to the run."""


@contextmanager
def taken(recipe: Recipe, directory: Path, *, fresh: bool) -> Iterator[None]:
    """Make the run directory, and keep everybody else out of it inside the block.

    Args:
        fresh: remove what an earlier run left in it first.

    Raises:
        Locked: EW-402, another process works in it. Unsafe: EW-405, it holds what is not a run's.
        OutOfResources: EW-406, it cannot be written.
    """
    _check_place(recipe, directory, fresh)
    _make(directory)
    with _locked(directory):
        if fresh:
            _clear(directory)
        write_text(directory / MARKER, "This directory belongs to `edgewright run`.\n")
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process per run directory. The operating system drops the lock when its holder dies."""
    from filelock import FileLock, Timeout

    holder, lock = directory / "lock.json", FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = json.loads(holder.read_text(encoding="utf-8")) if holder.exists() else {}
        raise Locked(
            "EW-402",
            "another process works in this run directory",
            where=directory.absolute(),
            found=f"process {who.get('pid', 'unknown')} on {who.get('host', 'unknown')}, since {who.get('since', '?')}",
            fix="wait for it or stop it, or choose another output_dir",
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _check_place(recipe: Recipe, directory: Path, fresh: bool) -> None:
    """Refuse a directory whose folders are somebody else's, and a fresh start that would remove what the recipe needs.

    Raises:
        Unsafe: EW-405.
    """
    taken = [name for name in PARTS if (directory / name).exists()]
    if taken and not (directory / MARKER).exists():
        raise Unsafe(
            "EW-405",
            "this directory is no run's, and has folders of the names that a run uses",
            where=directory.absolute(),
            found=", ".join(taken),
            fix="choose another output_dir",
        )
    for path in recipe.input_paths() if fresh else []:
        if any(path.absolute().is_relative_to((directory / name).absolute()) for name in PARTS):
            raise Unsafe(
                "EW-405",
                "a fresh start would remove what the recipe needs",
                where=path,
                fix="move it out of the run directory, or choose another output_dir",
            )


def _make(directory: Path) -> None:
    """Make the run directory; whatever the system refuses there is the user's to mend (EW-406)."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutOfResources(
            "EW-406",
            "the run directory cannot be made or written",
            where=directory.absolute(),
            expected="a directory that this user may write to",
            found=error.strerror or str(error),
            fix="choose another output_dir",
        ) from error


def _clear(directory: Path) -> None:
    for name in PARTS:
        if (directory / name).exists():
            shutil.rmtree(directory / name)
    for name in ("plan.json", "results.json", "report.html"):
        (directory / name).unlink(missing_ok=True)
