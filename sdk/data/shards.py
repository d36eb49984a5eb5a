"""Packed tokens on disk: one memory-mapped file for each split, and an index that is written last.

`index.json` names every file with its size and SHA-256 and carries the fingerprint of what it was made from. A build
that was interrupted has no index, so it is built again; a file that was damaged no longer fits its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.files import sha256_file

if TYPE_CHECKING:
    from edgewright.data.batches import Batches
    from edgewright.data.held_out import HeldOut
    from edgewright.data.source import Source
    from edgewright.data.split import Split

INDEX = "index.json"
FORMAT = 1
"""Raised when the layout of the files changes; older ones are then built again."""


@dataclass(frozen=True, slots=True)
class TokenStream:
    """The tokens of one split, documents one after another.

    Where one token both starts and ends documents the layout is `EOS doc EOS doc ... EOS`, else
    `BOS doc EOS BOS doc EOS`.
    """

    tokens: np.ndarray
    """Memory-mapped, uint16 or uint32 [tokens]."""
    documents: int
    """How many there are."""
    bytes: int
    """Their length in UTF-8."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predicted(self) -> int:
        """Tokens that are learned: `bytes` are those of their text."""
        return len(self)

    def sequences(self, sequence_length: int) -> int:
        """Whether there are any, and about how many."""
        from edgewright.data.batches import sequences

        return sequences(len(self), sequence_length)

    def batches(
        self, *, sequence_length: int, seed: int, restart_at_documents: bool, start_id: int, eos_id: int
    ) -> Batches:
        """Its sequences in an endless seeded order."""
        from edgewright.data.batches import Batches

        return Batches(
            self,
            sequence_length=sequence_length,
            seed=seed,
            restart_at_documents=restart_at_documents,
            start_id=start_id,
            eos_id=eos_id,
        )

    def for_evaluation(self, source: Source, split: Split, most: int | None) -> HeldOut:
        """What an evaluation reads of this held-out side: at most so many documents, from the source itself."""
        from itertools import islice

        from edgewright.data.documents import iterate_documents
        from edgewright.data.held_out import HeldOutTexts

        texts = iterate_documents(source, split="held_out", rule=split)
        return HeldOutTexts([text for _, text in islice(texts, most)])


class StreamWriter:
    """Writes one split, a piece of a document at a time.

    Args:
        path: the file, complete only after `close`.
        dtype: of the tokens.
        start_id: token that starts a document.
        eos_id: token that ends it.
    """

    def __init__(self, path: Path, *, dtype: type[np.generic], start_id: int, eos_id: int) -> None:
        self.path = path
        self.dtype = dtype
        self.documents = self.bytes = self.tokens = 0
        self._start = np.array([start_id], dtype=dtype)
        self._end = np.array([eos_id], dtype=dtype)
        self._between = self._start if start_id == eos_id else np.concatenate([self._end, self._start])
        self._hash = hashlib.sha256()
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._file = self._temporary.open("wb")

    def begin(self, size: int) -> None:
        """Start a document of `size` bytes."""
        self._write(self._between if self.documents else self._start)
        self.documents += 1
        self.bytes += size

    def add(self, ids: np.ndarray) -> None:
        """Append tokens to the document that was begun last."""
        self._write(ids)

    def close(self) -> dict[str, Any]:
        """End the last document, bring the file to disk and return its entry for the index."""
        if self.documents:
            self._write(self._end)
        return self.finish()

    def beside(self) -> dict[str, Any]:
        """Entries of further files that belong to the split, by name; after `close`."""
        return {}

    def finish(self) -> dict[str, Any]:
        """Bring the file to disk as it is and return its entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return {
            "file": self.path.name,
            "dtype": np.dtype(self.dtype).name,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256": self._hash.hexdigest(),
        }

    def abort(self) -> None:
        """Give up, unless it was closed: nothing is left."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, ids: np.ndarray) -> None:
        data = ids.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).tobytes()
        self._hash.update(data)
        self._file.write(data)
        self.tokens += len(ids)


def open_stream(directory: Path, entry: dict[str, Any]) -> TokenStream:
    """Map the file of an index entry."""
    dtype = np.dtype(entry["dtype"]).newbyteorder("<")
    path = directory / entry["file"]
    tokens = np.memmap(path, dtype=dtype, mode="r") if entry["tokens"] else np.zeros(0, dtype)
    return TokenStream(tokens=tokens, documents=entry["documents"], bytes=entry["bytes"])


def read_index(directory: Path, fingerprint: str) -> dict[str, Any] | str:
    """The index when everything it names is there, undamaged, and made from `fingerprint`; else the reason why not."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "not prepared yet"
    except ValueError:
        return "the index is damaged"
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("fingerprint") != fingerprint:
        return "the sources or the settings have changed"
    for entry in index["files"].values():
        path = directory / entry["file"]
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            return f"{entry['file']} is missing or damaged"
    return index
