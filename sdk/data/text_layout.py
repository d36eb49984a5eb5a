"""Running text on disk: documents one after another, in one stream of tokens that is cut into sequences anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.data.layout import Encoding, Layout
from edgewright.data.shards import StreamWriter, TokenStream, open_stream
from edgewright.data.split import Side, Split, TailSplit
from edgewright.data.text import Document
from edgewright.data.tokenizer import Encoder

_BATCH_CHARACTERS = 1 << 21
"""How much is encoded at once: enough to keep every core busy."""
_SECONDS_BETWEEN_LINES = 5.0


class TextLayout(Layout):
    """Documents with tokens at their borders."""

    running_text = True

    def writer(self, directory: Path, side: Side, encoder: Encoder) -> StreamWriter:
        path = directory / f"{side}.bin"
        return StreamWriter(path, dtype=encoder.dtype, start_id=encoder.start_id, eos_id=encoder.eos_id)

    def few(self, documents: Iterable[Document], *, total: int, held_out: float) -> Split | None:
        """The end of the text."""
        return TailSplit.find(documents, total=total, held_out=held_out)

    def encode(self, work: Encoding) -> dict[str, Any]:
        _encode(work.documents, work.split, work.encoder, work.writers, work.say)
        return {}

    def open(self, directory: Path, files: dict[str, Any], side: Side) -> TokenStream:
        return open_stream(directory, files[side])


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    side: Side
    document_bytes: int | None
    """Of the whole document, on its first piece; None on the others."""


def _cut(documents: Iterable[Document], split: Split, encoder: Encoder) -> Iterator[_Piece]:
    for side, document in split.divide(documents):
        for number, text in enumerate(encoder.cut(document.texts)):
            yield _Piece(text, side, None if number else document.bytes)


def _encode(
    documents: Iterable[Document],
    split: Split,
    encoder: Encoder,
    writers: Mapping[Side, StreamWriter],
    say: Callable[[str], None],
) -> None:
    stream = _cut(documents, split, encoder)
    spoken = time.monotonic()
    for batch in _batched(stream):
        for piece, ids in zip(batch, encoder.encode([piece.text for piece in batch]), strict=True):
            writer = writers[piece.side]
            if piece.document_bytes is not None:
                writer.begin(piece.document_bytes)
            writer.add(ids)
        if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            say(f"tokenized {sum(writer.bytes for writer in writers.values()) / 1e6:,.0f} MB")


def _batched(stream: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in stream:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
