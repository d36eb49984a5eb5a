"""Files to documents: formats, compression, damage."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.data import reading
from edgewright.data.files import FilesData
from edgewright.data.reading import TextFormat, read_file, text_bytes
from edgewright.data.text import RawDocument
from edgewright.errors import BadInput


def documents(path: Path, form: TextFormat | None = None) -> dict[str, str]:
    return {found.id: "".join(found.chunks) for found in read_file(path, path.name, form or TextFormat())}


def faults(path: Path) -> list[tuple[int, str | None]]:
    return [(found.line, found.fault) for found in read_file(path, path.name, TextFormat())]


def zst(data: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` gives."""
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[:1000]) + compressor.compress(data[1000:])


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("suffix", [".py", ".md", ".txt", ".TXT"])
def test_a_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9\n")
    assert documents(file) == {file.name: "one\r\ntwo é\n"}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"line {number} é\n" for number in range(5000))
    file = tmp_path / f"a.b.txt{suffix}"
    file.write_bytes(COMPRESSIONS[suffix](text.encode()))
    assert documents(file) == {file.name: text}


@pytest.mark.parametrize("suffix", ["", *COMPRESSIONS])
@pytest.mark.parametrize("files", [1, 3])
def test_the_bytes_of_compressed_text(tmp_path: Path, suffix: str, files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where they are few, told from the beginnings of the first files where they are many."""
    monkeypatch.setattr(reading, "HEADS", 2)
    text = "".join(f"{number * 7919 % 10007} " for number in range(1_000_000)).encode()
    assert len(text) > reading.HEAD_BYTES
    paths = [tmp_path / f"{number}.txt{suffix}" for number in range(files)]
    for path in paths:
        path.write_bytes(COMPRESSIONS.get(suffix, bytes)(text))
    assert text_bytes(paths) == pytest.approx(files * len(text), rel=0.03)
    short, empty = tmp_path / f"short.txt{suffix}", tmp_path / f"empty.txt{suffix}"
    short.write_bytes(COMPRESSIONS.get(suffix, bytes)(text[:3000]))
    empty.write_bytes(COMPRESSIONS.get(suffix, bytes)(b""))
    assert text_bytes([short, empty]) == 3000
    assert FilesData(files=f"{tmp_path}/?.txt{suffix}").text_bytes() == text_bytes(paths)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_truncated_compressed_files_are_named(tmp_path: Path, suffix: str, keep: float) -> None:
    data = COMPRESSIONS[suffix]("".join(f"{number * 7919 % 10007} " for number in range(50_000)).encode())
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BadInput, match=file.name) as caught:
        documents(file)
    assert caught.value.code == "EW-205"


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_what_only_claims_to_be_compressed(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(b"plain text, not compressed at all")
    with pytest.raises(BadInput, match=file.name) as caught:
        documents(file)
    assert caught.value.code == "EW-205"


def test_unreadable_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="EW-206"):
        documents(tmp_path / "gone.txt")
    for name in ("a.docx", "a", "a.gz", "a.docx.gz"):
        with pytest.raises(BadInput, match="EW-204"):
            documents(tmp_path / name)


def test_separators_in_text_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n<|endoftext|>\nthree\n<|endoftext|>four<|endoftext|>\n")
    assert documents(file) == {"a.txt": "one\ntwo", "a.txt#1": "three", "a.txt#2": "four", "a.txt#3": ""}
    assert [found.line for found in read_file(file, "a", TextFormat())] == [1, 3, 5, 5]
    assert documents(file, TextFormat(separator="\n\n")) == {"a.txt": file.read_text()}


@settings(deadline=None)
@given(st.text(alphabet="ab\n|", max_size=60), st.integers(1, 7))
def test_separators_are_found_across_chunks(text: str, size: int) -> None:
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    found: dict[int, str] = {}
    for index, _, part in reading._split(iter(chunks), "ab|"):
        found[index] = found.get(index, "") + part
    expected = text.split("ab|")
    expected = expected[:1] + [part.removeprefix("\n") for part in expected[1:]]
    assert list(found.values()) == [part.removesuffix("\n") for part in expected[:-1]] + expected[-1:]


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "one\ntwo"}), "", json.dumps({"id": 3, "text": "é😀"}), '{"text": "\\ud83d\\ude00"}']
    file.write_text("\n".join(lines))
    assert documents(file) == {"a.jsonl:1": "one\ntwo", "a.jsonl:3": "é😀", "a.jsonl:4": "😀"}
    file.write_text(json.dumps({"body": "here"}) + "\n")
    assert documents(file, TextFormat(text_key="body")) == {"a.jsonl:1": "here"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "a"', "no JSON"),
        ("[1]", "not an object: list"),
        ('{"body": "a", "id": 1}', "no key 'text'.*the keys are body, id"),
        ('{"text": 5}', "no text but int"),
        ("[" * 100_000, "no JSON|nested too deeply"),
    ],
)
def test_malformed_json_lines_are_faults_of_their_line(tmp_path: Path, line: str, fault: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n" + '{"text": "fine too"}\n')
    (first, second, third) = faults(file)
    assert first == (1, None) and third == (3, None)
    assert second[0] == 2 and re.search(fault, second[1] or "")


def test_a_line_of_json_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LINE_BYTES", 1 << 20)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "' + "word " * 700_000 + '"}\n')
    with pytest.raises(BadInput, match="a.jsonl:2") as caught:
        documents(file)
    assert caught.value.code == "EW-208"


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\x89PNG\r\n\x1a\n" + b"plain" * 100, "binary"),
        (bytes(range(256)) * 20, "binary"),
        ("every character twice".encode("utf-16"), "UTF-16"),
        ("Привет, мир".encode("cp1251"), "another encoding"),
    ],
)
def test_binary_files_are_faults(tmp_path: Path, data: bytes, fault: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    ((line, found),) = faults(file)
    assert line == 1 and fault in (found or "")


@pytest.mark.parametrize("text", ["", "Привет, мир", "日本語 " * 50, "caf\xe9"])
def test_text_is_not_taken_for_binary(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.md"
    file.write_text(text, encoding="utf-8")
    assert documents(file) == {"a.md": text}


def test_invalid_bytes_travel_as_surrogates_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1)
    file = tmp_path / "a.txt"
    file.write_bytes("aé😀b".encode() + b"\xff" + b"rest of it, long enough \xe2\x82")
    text = documents(file)["a.txt"]
    assert text == "aé😀b\udcffrest of it, long enough \udce2\udc82"


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_reading_a_single_huge_line_takes_little_memory(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    data = b"all on one line " * (1 << 16)
    file.write_bytes(COMPRESSIONS.get(suffix, bytes)(data * 48))
    tracemalloc.start()
    (found,) = (drain(document) for document in read_file(file, "a", TextFormat()))
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == len(data) * 48
    assert highest < 20 << 20


def drain(document: RawDocument) -> int:
    return sum(map(len, document.chunks))
