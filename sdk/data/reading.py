"""Files to documents: compression, decoding and the formats, a chunk at a time."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any, TypeVar

from edgewright.data.text import CHUNK_BYTES, RawDocument
from edgewright.errors import BadInput

HEAD_BYTES, HEADS = 1 << 22, 16
"""So much of so many compressed files is read to tell how far they expand."""
LINE_BYTES = 1 << 26
"""A line of JSON is parsed whole, so it may not be longer than this."""
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"%PDF", b"PK\x03\x04", b"\x7fELF", b"\x1f\x8b", b"\xfd7zXZ", b"GGUF",
          b"\x28\xb5\x2f\xfd", b"SQLite format 3\0", b"BZh91AY", b"\xca\xfe\xba\xbe", b"PAR1")  # fmt: skip
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How a text file is taken apart."""

    text_key: str = "text"
    """Key of the text in a line of JSON."""
    separator: str = "<|endoftext|>"
    """What stands between two documents of a .txt file."""


T = TypeVar("T")
Opener = Callable[[IO[bytes]], Iterator[bytes]]
Reader = Callable[[Iterator[bytes], Path, str, TextFormat], Iterator[RawDocument]]


def read_file(path: Path, document_id: str, form: TextFormat) -> Iterator[RawDocument]:
    """The documents of one file, by its suffix.

    Raises:
        BadInput: EW-204 for a suffix that is not known, EW-205 for a damaged compressed file, EW-206 when the file
            cannot be read.
    """
    opener, reader = file_kind(path)
    chunks = _guarded(path, opener)
    head = next(chunks, b"")
    if _looks_binary(head):
        fault = "UTF-16 text" if head.startswith(_UTF16) else "a binary file, or text in another encoding than UTF-8"
        return iter([RawDocument(document_id, str(path), 1, (), fault=fault)])
    return reader(chain((head,), chunks), path, document_id, form)


def file_kind(path: Path) -> tuple[Opener, Reader]:
    """How a file is decompressed and taken apart, by its suffixes; EW-204 when they are not known."""
    *_, last = suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
    opener = _OPENERS.get(last, _plain)
    suffix = suffixes[-2] if last in _OPENERS else last
    if suffix not in READERS:
        raise BadInput(
            "EW-204",
            "this kind of file cannot be read",
            where=path,
            expected=f"one of {' '.join(sorted(READERS))}, each also with {' '.join(sorted(_OPENERS))}",
            found=suffix or "a name without suffix",
            fix="rename or convert the file, or narrow data.files so that it is left out",
        )
    return opener, READERS[suffix]


def text_bytes(paths: Sequence[Path]) -> int:
    """Bytes of some files once decompressed; of compressed ones by how far the beginnings of the first ones expand.

    Raises:
        BadInput: EW-205 for a damaged compressed file, EW-206 when a file cannot be read.
    """
    plain, packed = 0, []
    for path in paths:
        if path.suffix.lower() in _OPENERS:
            packed.append(path)
        else:
            plain += path.stat().st_size
    sizes = [path.stat().st_size for path in packed]
    heads = sum(size * _expansion(path) for path, size in zip(packed[:HEADS], sizes, strict=False))
    return plain + round(heads * sum(sizes) / max(1, sum(sizes[:HEADS])))


def _expansion(path: Path) -> float:
    """Bytes of text for a byte of a compressed file, from its beginning."""
    opener = _OPENERS[path.suffix.lower()]

    def places(file: IO[bytes]) -> Iterator[tuple[int, int]]:
        for chunk in opener(file):
            yield len(chunk), file.tell()

    text, read, size = 0, 0, path.stat().st_size
    for length, read in _guarded(path, places):
        text += length
        if text >= HEAD_BYTES and read < size:  # what was read is decompressed to its end where nothing comes after it
            break
    return text / max(read, 1)


def _looks_binary(head: bytes) -> bool:
    """True for well-known binary formats, and where more than a tenth of the first bytes is no text."""
    if head.startswith(_MAGIC):
        return True
    sample = head[: 1 << 16]
    text = sample.decode("utf-8", "surrogateescape")
    if text.isascii() and "\0" not in text:
        return False
    return sum(character == "\0" or "\udc80" <= character <= "\udcff" for character in text) > len(text) / 10


# --- bytes ---


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gz(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _xz(file: IO[bytes]) -> Iterator[bytes]:
    with lzma.LZMAFile(file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


_ZST_BITE = 1 << 8
"""A block of four bytes may hold 128 KiB of text, so this bounds what comes out at once to 8 MiB."""


def _zst(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise BadInput(
            "EW-207", "reading .zst files needs the package zstandard", fix="pip install 'edgewright[data]'"
        ) from error
    frame, buffer = None, bytearray()
    try:
        while bite := file.read(_ZST_BITE):
            while bite:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                buffer += frame.decompress(bite)
                bite = b""
                if frame.eof:
                    bite, frame = frame.unused_data, None
            if len(buffer) >= CHUNK_BYTES:
                yield bytes(buffer)
                buffer.clear()
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the file ends inside a frame")
    yield bytes(buffer)


_OPENERS: dict[str, Opener] = {".gz": _gz, ".xz": _xz, ".zst": _zst}


def _guarded(path: Path, opener: Callable[[IO[bytes]], Iterator[T]]) -> Iterator[T]:
    """What an opener makes of a file, with damage and refusals turned into messages that name it."""
    try:
        with path.open("rb") as file:
            yield from opener(file)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BadInput(
            "EW-205",
            "the compressed file is damaged or was cut off",
            where=path,
            found=str(error),
            fix="fetch or compress it again, or leave it out of data.files",
        ) from error
    except OSError as error:
        raise BadInput(
            "EW-206",
            "the file cannot be read",
            where=path,
            found=error.strerror,
            fix="check its permissions and the disk",
        ) from error


# --- text ---


def _decoded(chunks: Iterator[bytes]) -> Iterator[str]:
    """UTF-8 to text; a byte that is no UTF-8 becomes a lone surrogate, a byte order mark at the start goes."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    head = True
    for chunk in chunks:
        text = decoder.decode(chunk)
        if head and text:
            text, head = text.removeprefix("\ufeff"), False
        yield text
    yield decoder.decode(b"", final=True)


def _read_whole(chunks: Iterator[bytes], path: Path, document_id: str, form: TextFormat) -> Iterator[RawDocument]:
    """The file is one document."""
    yield RawDocument(document_id, str(path), 1, (text for text in _decoded(chunks) if text))


def _read_txt(chunks: Iterator[bytes], path: Path, document_id: str, form: TextFormat) -> Iterator[RawDocument]:
    """The file is one document, or several with the separator between them."""
    parts = _split(_decoded(chunks), form.separator)
    for (index, line), group in groupby(parts, key=lambda part: part[:2]):
        name = document_id if index == 0 else f"{document_id}#{index}"
        yield RawDocument(name, str(path), line, (text for _, _, text in group))


def _split(texts: Iterator[str], separator: str) -> Iterator[tuple[int, int, str]]:
    """Yield `(number of the document, line where it starts, text)`; a line break on either side of a separator goes."""
    index, line, rest = 0, 1, ""
    start, fresh = 1, False
    for text in texts:
        *complete, rest = (rest + text).split(separator)
        for part in complete:
            yield index, start, (part.removeprefix("\n") if fresh else part).removesuffix("\n")
            line += part.count("\n") + separator.count("\n")
            index, start, fresh = index + 1, line, True
        if len(rest) > 2 * len(separator):  # keep what may be the beginning of a separator
            ready, rest = rest[: -len(separator)], rest[-len(separator) :]
            yield index, start, ready.removeprefix("\n") if fresh else ready
            line += ready.count("\n")
            fresh = False
    yield index, start, rest.removeprefix("\n") if fresh else rest


def _read_jsonl(chunks: Iterator[bytes], path: Path, document_id: str, form: TextFormat) -> Iterator[RawDocument]:
    """One document for each line: an object with the text under `text_key`. Blank lines are no documents."""
    for number, line in _lines(chunks, path):
        if not line.strip():
            continue
        text, fault = _parse(line, form.text_key)
        yield RawDocument(f"{document_id}:{number}", str(path), number, (text,), fault=fault, one_line=True)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """Line number, object and fault of every line of a .jsonl file that is not blank; no object where there is a fault.

    Raises:
        BadInput: as `read_file`; EW-204 also for a file of text.
    """
    opener, reader = file_kind(path)
    if reader is not _read_jsonl:
        raise BadInput(
            "EW-204",
            "examples are read from JSON Lines alone",
            where=path,
            expected=f".jsonl, also with {' '.join(sorted(_OPENERS))}",
            found=path.name,
            fix='one object a line: {"prompt": ..., "completion": ...} or {"messages": [...]}',
        )
    chunks = _guarded(path, opener)
    head = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
    if _looks_binary(head):
        yield 1, None, "a binary file, or text in another encoding than UTF-8"
        return
    for number, line in _lines(chain((head,), chunks), path):
        if line.strip():
            yield number, *_record(line)


def _record(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object of a line of JSON, or why there is none."""
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        return None, f"no JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return None, "JSON that is nested too deeply"
    if not isinstance(record, dict):
        return None, f"JSON, but not an object: {type(record).__name__}"
    return record, ""


def _parse(line: bytes, text_key: str) -> tuple[str, str | None]:
    """The text of a line of JSON, or why there is none."""
    record, fault = _record(line)
    if record is None:
        return "", fault
    if text_key not in record:
        return "", f"no key {text_key!r} (data.text_key); the keys are {', '.join(map(str, record)) or 'none'}"
    text = record[text_key]
    if not isinstance(text, str):
        return "", f"{text_key!r} is no text but {type(text).__name__}"
    return text, None


def _lines(chunks: Iterator[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    number, rest = 1, b""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            yield number, line
            number += 1
        if len(rest) > LINE_BYTES:
            raise BadInput(
                "EW-208",
                "a line of JSON is too long to be parsed",
                where=f"{path}:{number}",
                expected=f"at most {LINE_BYTES >> 20} MiB for each line",
                fix="is this JSON Lines, one object a line? Put very long documents into .txt files",
            )
    yield number, rest


READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".md": _read_whole,
    ".py": _read_whole,
    ".jsonl": _read_jsonl,
}
