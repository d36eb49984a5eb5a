"""Artifact: an exported file or folder, and the manifest `edgewright.json` that says what it is."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgewright.export.guard import read_json
from edgewright.files import sha256_file, write_json

MANIFEST = "edgewright.json"
SCHEMA_VERSION = 1

Gate = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Fallback:
    """A tensor that is not stored as asked."""

    tensor: str
    """Its name in the checkpoint."""
    quant: str
    """The type in which it is stored instead."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An exported file or folder."""

    path: Path
    to: str
    """The target, a key of `targets.TARGETS`."""
    quant: str
    """The width, by the target's own name for it."""
    bytes: int
    """Of the file, or of all files of the folder but the manifest."""
    fallbacks: list[Fallback] = field(default_factory=list)
    gate: Gate = "skipped"
    parity: dict[str, Any] | None = None
    """What the gate measured; None when it was skipped."""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    """What `--to best` tried, this artifact among them; empty for any other target."""
    notes: list[str] = field(default_factory=list)
    """What its user should know, as `Written.notes`."""
    pair: dict[str, Any] | None = None
    """Of a bundle with a draft: gamma, where its parts are, and the `Certificate` unless the gate was skipped."""

    def to_json(self) -> dict[str, object]:
        """The object that `export --json` prints."""
        return {
            "schema_version": SCHEMA_VERSION,
            "path": str(self.path),
            "to": self.to,
            "quant": self.quant,
            "bytes": self.bytes,
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks],
            "gate": self.gate,
            "parity": self.parity,
            "candidates": self.candidates,
            "notes": self.notes,
            "pair": self.pair,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a writer made, before the gate saw it."""

    fallbacks: list[Fallback]
    lattice: dict[str, str]
    """For each lattice tensor of the source, by checkpoint name: `exact`, or what was lost."""
    digests: dict[str, str]
    """For each matrix, by checkpoint name: `digest` of the values that the file must give back."""
    embedding_quant: str
    """The type of token embedding and head."""
    versions: dict[str, str]
    """The packages that wrote it."""
    notes: list[str] = field(default_factory=list)
    """What the runtime does otherwise than the checkpoint's own code, and no setting changes."""


DIGEST_CHUNK = 1 << 16
"""Values that are hashed at a time: few enough to stay in a core's cache."""


class Digest:
    """sha256 over the shape and the float32 values of a weight, given a few rows at a time; -0.0 counts as 0.0."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._found = hashlib.sha256(repr(shape).encode())

    def update(self, values: np.ndarray) -> None:
        """Go on with the next rows."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        for start in range(0, flat.size, DIGEST_CHUNK):
            self._found.update((flat[start : start + DIGEST_CHUNK] + np.float32(0)).data)

    def hexdigest(self) -> str:
        """Of all rows so far."""
        return self._found.hexdigest()


def digest(values: np.ndarray) -> str:
    """The `Digest` of a whole weight.

    Args:
        values: float32 `[out, in]` of a matrix, or `[n]`.
    """
    found = Digest(values.shape)
    found.update(values)
    return found.hexdigest()


def manifest_path(artifact: Path) -> Path:
    """Where the manifest of an artifact lies: in the folder, or beside the file."""
    return (artifact if artifact.is_dir() else artifact.parent) / MANIFEST


def read_entry(artifact: Path) -> dict[str, Any] | None:
    """What the manifest says about an artifact; None when there is no manifest or no such entry."""
    entries = _entries(manifest_path(artifact))
    return entries.get("." if artifact.is_dir() else artifact.name)


def write_entry(artifact: Path, entry: dict[str, Any], *, name: str | None = None) -> None:
    """Add or replace the entry of an artifact; those of other files in the directory stay.

    Args:
        artifact: the file or folder.
        entry: what to say about it.
        name: the key, where it differs from the artifact's own name.
    """
    path = manifest_path(artifact)
    entries = _entries(path)
    entries[name or ("." if artifact.is_dir() else artifact.name)] = entry
    write_json(path, {"schema_version": SCHEMA_VERSION, "artifacts": dict(sorted(entries.items()))})


def drop_entry(artifact: Path) -> None:
    """Remove the entry of an artifact, if there is one."""
    path = manifest_path(artifact)
    entries = _entries(path)
    if entries.pop("." if artifact.is_dir() else artifact.name, None) is not None:
        write_json(path, {"schema_version": SCHEMA_VERSION, "artifacts": entries})


def _entries(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    artifacts = read_json(path).get("artifacts")
    return artifacts if isinstance(artifacts, dict) else {}


def size_of(artifact: Path) -> int:
    """Bytes of a file, or of all files in a folder but the manifest."""
    return sum(path.stat().st_size for path in _content(artifact))


def hash_of(artifact: Path) -> str:
    """sha256 of a file; of a folder, of the lines `sha256 name` of its files but the manifest."""
    if artifact.is_file():
        return sha256_file(artifact)
    digests = [(sha256_file(path), path.relative_to(artifact).as_posix()) for path in _content(artifact)]
    return hashlib.sha256("".join(f"{digest} {name}\n" for digest, name in digests).encode()).hexdigest()


def settled_hash_of(artifact: Path) -> str:
    """`hash_of` what was just written, while it goes to the disk; on return both are done."""
    with ThreadPoolExecutor(1) as pool:
        settled = pool.map(sync, _content(artifact))
        found = hash_of(artifact)
        list(settled)  # raises what went wrong
    return found


def _content(artifact: Path) -> list[Path]:
    if artifact.is_file():
        return [artifact]
    return sorted(path for path in artifact.rglob("*") if path.is_file() and path.name != MANIFEST)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
