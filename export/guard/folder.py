"""The entries of a folder that somebody else made: names, links, special files, code and pickles by content."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path

from edgewright.errors import BadInput, Unsafe
from edgewright.export.guard.archive import archive_kind
from edgewright.export.guard.files import open_regular, printable
from edgewright.export.guard.paths import is_plain

MAX_FILES = 4_000
MAX_DEPTH = 8
"""Folders inside folders."""

CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".so", ".dylib", ".dll"})
WEIGHT_SUFFIXES = frozenset({
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".safetensors",
})  # fmt: skip

# A pickle of protocol 0 or 1 has no magic; it names what it calls as `c<module>\n<name>\n` or `i<module>\n<name>\n`.
_TEXT_GLOBAL = re.compile(rb"[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n")
_PICKLE_OPCODES = frozenset(b"()012FINJKLMPQRSTUVX]abcdeghijlopqrstu}BCG.\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c")
_ZLIB = (b"\x78\x9c", b"\x78\x01")
_MEMBER = re.compile(rb"\.(?:pkl|pickle|npy|joblib|dill)|data\.pkl|archive/")
_ENDS = 2**20


def check_entries(directory: Path, *, deep: bool = False, scripts: Collection[str] = ()) -> list[Path]:
    """Refuse a folder with links that lead out, names that trick, special files, code or pickles.

    Hard links are fine here, since caches and installers make them: no tool tells a file from its other name. Where the
    bytes of a file are taken for weights whatever they are (external data), `guard/paths.inside` refuses them.

    Args:
        directory: the folder.
        deep: look into folders inside as well; else those are left alone, since nothing opens them.
        scripts: names of scripts that may lie directly in the folder, of which nothing is opened.

    Returns:
        The files.

    Raises:
        Unsafe: EW-314, code; EW-315, a pickle; EW-316, a link that leads out; EW-338, a name that tricks.
        BadInput: EW-310, no folder or one with far too many entries; EW-311, a pipe or device.
    """
    if not directory.is_dir():
        what = "this is a file, not a model directory" if directory.exists() else "there is no such model directory"
        raise BadInput(
            "EW-310",
            what,
            where=directory.absolute(),
            expected="a directory with config.json, *.safetensors and tokenizer.json",
            fix="check the path; a model on a hub must be downloaded first: hf download NAME --local-dir DIR",
        )
    root = directory.resolve()
    entries = []
    for path in _walk(directory, deep=deep):
        entries.append(path)
        if len(entries) > MAX_FILES:
            raise BadInput(
                "EW-310",
                "this directory holds too many entries for a model",
                where=directory.absolute(),
                expected=f"at most {MAX_FILES}, in at most {MAX_DEPTH} folders inside each other",
                found="more",
                fix="check the path",
            )
        _check_link(path, directory, root)
    entries.sort()
    _check_names(directory, entries)
    files = [path for path in entries if not path.is_dir()]
    for path in files:
        if path.name in scripts and path.parent == directory:
            open_regular(path)
        else:
            _check_file(path)
    return files


def _walk(directory: Path, *, deep: bool, depth: int = 0) -> Iterator[Path]:
    """The entries, one at a time, so that a folder with a million of them is never held in memory."""
    with os.scandir(directory) as entries:
        for entry in entries:
            yield Path(entry.path)
            if deep and entry.is_dir(follow_symlinks=False):
                if depth == MAX_DEPTH:
                    raise BadInput(
                        "EW-310",
                        "the folders of this model are nested too deeply",
                        where=directory.absolute(),
                        expected=f"at most {MAX_DEPTH} inside each other",
                        fix="check the path",
                    )
                yield from _walk(Path(entry.path), deep=deep, depth=depth + 1)


def _check_link(path: Path, directory: Path, root: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise Unsafe(
            "EW-316",
            "this link leads out of the model directory",
            where=printable_path(path),
            expected=f"a file inside {directory}",
            found=printable(str(path.readlink())),
            fix=f"copy the model with its links resolved: cp -rL {directory} COPY",
        )


def _check_names(directory: Path, entries: list[Path]) -> None:
    """Refuse names that show as something else, and two names that are one file on other systems."""
    seen: dict[tuple[Path, str], Path] = {}
    for path in entries:
        folded = (path.parent, unicodedata.normalize("NFC", path.name).casefold())
        if not is_plain(path.name):
            raise _tricky(path, "the name of this entry is none that a model needs", "letters, digits, dots and dashes")
        if folded in seen:
            what = "two entries differ only in the case of letters: which one is read depends on the system"
            raise _tricky(path, what, f"one of {seen[folded].name} and {path.name}")
        seen[folded] = path


def _tricky(path: Path, what: str, expected: str) -> Unsafe:
    return Unsafe(
        "EW-338",
        what,
        where=printable_path(path),
        expected=expected,
        found=printable(path.name),
        fix="rename or delete it, if the model is your own; else do not use it",
    )


def printable_path(path: Path) -> str:
    """The absolute path as a terminal may print it, whatever its name holds."""
    text = str(path.absolute())
    return text if text.isprintable() else f"{path.parent.absolute()}/{printable(path.name)}"


def _check_file(path: Path) -> None:
    open_regular(path)
    if path.suffix.lower() in CODE_SUFFIXES:
        raise Unsafe(
            "EW-314",
            "this model directory holds code",
            where=path.absolute(),
            expected="data only",
            found=path.name,
            fix="if the architecture is one that transformers knows, delete the file; code from models is never run",
        )
    check_not_pickle(path)


def check_not_pickle(path: Path) -> None:
    """Refuse a file that is a pickle or holds one, whatever its name says.

    Raises:
        Unsafe: EW-315.
    """
    with path.open("rb") as file:
        first = file.read(4096)
        file.seek(max(0, path.stat().st_size - _ENDS))
        last = file.read(_ENDS) if first.startswith(b"PK") else b""
    kind = _pickle_kind(first, last, weights=path.suffix.lower() in WEIGHT_SUFFIXES)
    if kind is not None:
        raise Unsafe(
            "EW-315",
            f"this file is {kind}: opening it can run any code",
            where=path.absolute(),
            expected="weights as .safetensors",
            found=kind,
            fix="ask the author for safetensors; or, where nothing can be harmed, load it in a sandbox with the tool "
            "that wrote it, save it as safetensors, and delete this file",
        )


def _pickle_kind(first: bytes, last: bytes, *, weights: bool) -> str | None:
    """What makes a file a pickle; None when nothing does. `weights`: its name says that a loader would try."""
    if first[8:9] == b"{" and first[4:8] == b"\0\0\0\0":
        return None  # the header length of safetensors, whose low bytes may look like anything
    if len(first) > 2 and first[0] == 0x80 and first[1] <= 5 and (first[2] in _PICKLE_OPCODES or first[2] >= 0x80):
        return f"a pickle (protocol {first[1]})"
    if first.startswith(b"PK\x03\x04") and (weights or _MEMBER.search(first + last)):
        return "a zip archive as pickles travel in"
    if first.startswith(b"\x93NUMPY") and b"|O" in first[:256]:
        return "a numpy array of pickled objects"
    if not weights:
        return None
    if archive_kind(first) is not None or first.startswith(_ZLIB):
        return "an archive in the place of weights"
    return "a pickle (protocol 0 or 1)" if _TEXT_GLOBAL.search(first) else None
