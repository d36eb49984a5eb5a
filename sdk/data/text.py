"""Documents: what a source hands over, what is refused, and how long texts are cut.

Text flows as chunks of bounded size, so a document of a gigabyte needs no gigabyte of memory. Bytes that are no UTF-8
travel as lone surrogates (`surrogateescape`) until `screen` meets them: there, in one place, the policy for bad text,
blank documents and exact duplicates is applied and every case is counted.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Literal

from edgewright.errors import BadInput

BadTextPolicy = Literal["strict", "skip", "replace"]

CHUNK_BYTES = 1 << 20
"""How much of a file is read at a time."""
MEMORY_BYTES = 1 << 22
"""A document longer than this waits on disk, not in memory, until it is known to be good."""
PIECE_CHARACTERS = 1 << 15
"""Documents are encoded in pieces of at most this many characters."""

_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?= [^\W_])")
_BEFORE_SPACE = re.compile(r"(?<=\S)(?=[ \n\t\r])")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of an example, all of one kind."""

    text: str
    counted: bool
    """Whether its tokens are learned."""
    special: bool
    """Whether special tokens are read out of it: a template's text; in what people wrote they are plain text."""
    begins: bool = False
    """Whether a text begins here, which goes on with nothing that comes before: a prompt after its start token."""


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A document as it was found, not judged yet."""

    id: str
    """Name that does not depend on where the corpus lies; the held-out split hashes it."""
    file: str
    """The file it came from, for messages."""
    line: int
    """Line of that file at which it starts, from 1."""
    chunks: Iterable[str]
    """Its text, to be read once and before the next document is asked for."""
    fault: str | None = None
    """Why it cannot be read at all, for instance a line that is no JSON."""
    one_line: bool = False
    """Its line breaks are none of the file's, as in a line of JSON."""
    segments: tuple[Segment, ...] = ()
    """The same text in parts, for an example of which only some parts are learned."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document that passed: clean text, not blank, not seen before."""

    id: str
    bytes: int
    """Length in UTF-8."""
    texts: Iterable[str]
    """Its text in chunks; read once."""
    file: str = ""
    line: int = 0
    segments: tuple[Segment, ...] = ()
    """As `RawDocument.segments`, cleaned alike."""


@dataclass(slots=True)
class Counts:
    """What became of the documents; nothing is dropped without being counted here."""

    documents: int = 0
    """Documents kept."""
    bytes: int = 0
    """Their length in UTF-8."""
    blank: int = 0
    """Dropped: nothing but white space."""
    duplicates: int = 0
    """Dropped: the same text came before."""
    skipped: int = 0
    """Dropped by the policy `skip`: invalid UTF-8, NUL, binary or malformed."""
    replaced: int = 0
    """Kept by the policy `replace`, with bad characters turned into U+FFFD."""

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def summary(self) -> str:
        """The same in words, for messages."""
        parts = [f"{self.documents:,} documents kept"]
        parts += [f"{count:,} {name}" for name, count in self.to_json().items() if count and name in _DROPPED]
        return ", ".join(parts)


_DROPPED = ("blank", "duplicates", "skipped", "replaced")


def screen(
    documents: Iterable[RawDocument], *, policy: BadTextPolicy, counts: Counts, scratch: Path | None = None
) -> Iterator[Document]:
    """Yield the documents that may be used, one at a time, and count the others.

    Duplicates are found by a 128-bit hash of the text, about 100 bytes of memory for each document.

    Args:
        documents: what a source found, in its order.
        policy: what to do with invalid UTF-8, NUL and malformed documents.
        counts: changed in place.
        scratch: folder for the one long document that is being looked at; the system's own by default.

    Raises:
        BadInput: EW-201 on bad text, EW-202 on a malformed document, when the policy does not allow it.
    """
    seen: set[bytes] = set()
    for raw in documents:
        with ExitStack() as stack:
            examined = _examine(raw, policy, scratch, stack)
            if examined is None:
                counts.skipped += 1
            elif examined.blank:
                counts.blank += 1
            elif examined.digest in seen:
                counts.duplicates += 1
            else:
                seen.add(examined.digest)
                counts.documents += 1
                counts.bytes += examined.size
                counts.replaced += examined.replaced
                segments = tuple(replace(part, text=_UNUSABLE.sub("\ufffd", part.text)) for part in raw.segments)
                yield Document(raw.id, examined.size, examined.texts, raw.file, raw.line, segments)


@dataclass(frozen=True, slots=True)
class _Examined:
    size: int
    digest: bytes
    blank: bool
    replaced: bool
    texts: Iterable[str]


def _examine(raw: RawDocument, policy: BadTextPolicy, scratch: Path | None, stack: ExitStack) -> _Examined | None:
    """Read a document to its end and keep its clean text, in a temporary file when it is long; None: skip it."""
    if raw.fault is not None:
        if policy != "skip":
            raise _malformed(raw)
        return None
    digest = hashlib.blake2b(digest_size=16)
    size, line, blank, replaced = 0, raw.line, True, False
    texts: list[str] = []
    spool: IO[str] | None = None
    chunks = iter(raw.chunks)
    for chunk in chunks:
        text, encoded = chunk, _encode(chunk)
        if encoded is None:
            if policy == "strict":
                raise _bad_text(raw, chunk, line)
            if policy == "skip":
                deque(chunks, maxlen=0)  # a sequential reader has to be taken to the end of the document
                return None
            text, replaced = _UNUSABLE.sub("\ufffd", chunk), True
            encoded = text.encode()
        digest.update(encoded)
        size += len(encoded)
        line += chunk.count("\n")
        blank = blank and (not text or text.isspace())
        texts.append(text)
        if size > MEMORY_BYTES:
            spool = spool or stack.enter_context(_temporary(scratch))
            spool.writelines(texts)
            texts.clear()
    return _Examined(size, digest.digest(), blank, replaced, _contents(spool, texts))


def _temporary(scratch: Path | None) -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", newline="", dir=scratch)


def _contents(spool: IO[str] | None, texts: list[str]) -> Iterator[str]:
    """What was put into the file, then what is still in memory."""
    if spool is not None:
        spool.seek(0)
        while chunk := spool.read(CHUNK_BYTES):
            yield chunk
    yield from texts


def _encode(text: str) -> bytes | None:
    """UTF-8 of a clean text; None when it holds NUL or what is no character."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return None
    return None if b"\0" in encoded else encoded


def _bad_text(raw: RawDocument, chunk: str, line: int) -> BadInput:
    match = _UNUSABLE.search(chunk)
    assert match is not None
    character = ord(match.group())
    where = f"{raw.file}:{raw.line}"
    if not raw.one_line:
        line += chunk.count("\n", 0, match.start())
        where = f"{raw.file}:{line}:{match.start() - chunk.rfind(chr(10), 0, match.start())}"
    if character == 0:
        found = "a NUL byte"
    elif 0xDC80 <= character <= 0xDCFF:
        found = f"the byte 0x{character - 0xDC00:02x}, which is no UTF-8 here"
    else:
        found = f"the lone surrogate U+{character:04X}"
    return BadInput(
        "EW-201",
        "the text cannot be used as it is",
        where=where,
        expected="valid UTF-8 without NUL",
        found=found,
        fix="repair the file (UTF-16 or Latin-1? convert it: iconv -t UTF-8), or set data.on_bad_text to `skip` (drop "
        "such documents) or `replace` (put U+FFFD there); both are counted",
    )


def _malformed(raw: RawDocument) -> BadInput:
    return BadInput(
        "EW-202",
        "the document cannot be read",
        where=f"{raw.file}:{raw.line}",
        found=raw.fault,
        fix="repair or remove it, or set data.on_bad_text to `skip`, which drops such documents and counts them",
    )


def pieces(texts: Iterable[str], limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters whose concatenation is the text.

    A cut is made before the space between two words: every pre-tokenizer in use splits there as well, so that
    the pieces give the same tokens as the whole. Where there is no such place in the last quarter of a piece, any white
    space will do, and where there is none at all the piece ends at the limit.
    """
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > limit:
            end = _border(rest, start, limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _border(text: str, start: int, limit: int) -> int:
    end = start + limit
    for pattern in (_BETWEEN_WORDS, _BEFORE_SPACE):
        if match := pattern.search(text, start + limit * 3 // 4, end):
            return match.start()
    return end


def is_held_out(document_id: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split.

    It depends on the document's name alone: the same on every machine, whatever other documents come or go.
    """
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64
