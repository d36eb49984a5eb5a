"""Archives in the place of a model: never unpacked here, and never handed to a library that might."""

from __future__ import annotations

from pathlib import Path

from edgewright.errors import Unsafe

MAGICS = {
    b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "an empty zip archive", b"PK\x07\x08": "a zip archive in parts",
    b"\x1f\x8b": "a gzip file", b"BZh": "a bzip2 file", b"\xfd7zXZ\x00": "an xz file", b"\x5d\x00\x00": "an lzma file",
    b"\x28\xb5\x2f\xfd": "a zstandard file", b"\x04\x22\x4d\x18": "an lz4 file", b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive", b"MSCF": "a cab archive", b"!<arch>\n": "an ar archive",
    b"070701": "a cpio archive", b"070707": "a cpio archive", b"xar!": "a xar archive",
}  # fmt: skip
"""First bytes of archives and compressed files."""
SUFFIXES = frozenset({
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".lzma", ".zst", ".tzst", ".lz4", ".7z", ".rar",
    ".cab", ".cpio", ".nemo", ".mar",
})  # fmt: skip
"""Names of archives; a tar of the oldest kind has no first bytes of its own."""
_TAR_MAGIC_AT, _TAR_MAGIC = 257, b"ustar"


def archive_kind(first: bytes) -> str | None:
    """What kind of archive begins with these bytes (some 300 are needed); None for none."""
    if first[_TAR_MAGIC_AT : _TAR_MAGIC_AT + len(_TAR_MAGIC)] == _TAR_MAGIC:
        return "a tar archive"
    return next((kind for magic, kind in MAGICS.items() if first.startswith(magic)), None)


def check_not_archive(path: Path) -> None:
    """Refuse an archive, by content or name, where a model should be. Not one byte of it is unpacked.

    Raises:
        Unsafe: EW-336.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        kind = archive_kind(file.read(512))
    if kind is None and path.suffix.lower() in SUFFIXES:
        kind = f"a file named {path.suffix}"
    if kind is None:
        return
    raise Unsafe(
        "EW-336",
        f"this is {kind}, not a model: archives are not unpacked here",
        where=path.absolute(),
        expected="a model directory, or one model file",
        found=kind,
        fix="unpack it into an empty folder with a tool that refuses paths and links out of it (python -m tarfile "
        "--filter data -e ARCHIVE FOLDER, python -m zipfile -e ARCHIVE FOLDER), look at what came out, and name the "
        "folder",
    )
