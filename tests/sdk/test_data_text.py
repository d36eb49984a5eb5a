"""Screening of documents, cutting of long ones, and the held-out split."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.data import text as text_module
from edgewright.data.text import Counts, RawDocument, is_held_out, pieces, screen
from edgewright.errors import BadInput


def raw(name: str, *chunks: str, fault: str | None = None) -> RawDocument:
    return RawDocument(name, f"{name}.txt", 1, chunks, fault=fault)


def run(documents: list[RawDocument], policy: str) -> tuple[dict[str, str], Counts]:
    counts = Counts()
    kept = {
        document.id: "".join(document.texts)
        for document in screen(documents, policy=policy, counts=counts)  # type: ignore[arg-type]
    }
    return kept, counts


BAD = {
    "byte": b"one\ntwo \xff".decode("utf-8", "surrogateescape"),
    "nul": "one\ntwo \0",
    "surrogate": "one\ntwo \ud800",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_by_policy(name: str) -> None:
    documents = [raw("good", "fine"), raw("bad", BAD[name]), raw("after", "also fine")]
    kept, counts = run(documents, "skip")
    assert list(kept) == ["good", "after"]
    assert (counts.documents, counts.skipped, counts.replaced) == (2, 1, 0)
    kept, counts = run(documents, "replace")
    assert kept["bad"] == "one\ntwo \ufffd"
    assert (counts.documents, counts.skipped, counts.replaced) == (3, 0, 1)
    with pytest.raises(BadInput, match=r"bad\.txt:2:5") as caught:
        run(documents, "strict")
    assert caught.value.code == "EW-201" and caught.value.exit_code == 3


def test_the_message_names_the_byte() -> None:
    with pytest.raises(BadInput, match="0xff"):
        run([raw("bad", BAD["byte"])], "strict")


def test_bad_text_late_in_a_long_document_drops_all_of_it() -> None:
    chunks = ["word " * 1000] * 3 + [BAD["byte"]] + ["word " * 1000]
    kept, counts = run([raw("long", *chunks), raw("next", "text")], "skip")
    assert list(kept) == ["next"] and counts.skipped == 1


def test_a_skipped_document_is_read_to_its_end() -> None:
    """A sequential reader hands out the next document only after that."""
    read: list[str] = []

    def chunks() -> Iterator[str]:
        for chunk in ("a\0", "b", "c"):
            read.append(chunk)
            yield chunk

    run([RawDocument("x", "x", 1, chunks())], "skip")
    assert read == ["a\0", "b", "c"]


def test_blank_and_duplicate_documents_are_counted() -> None:
    documents = [raw("a", "x", "y"), raw("b", ""), raw("c", " \n\t"), raw("d", "xy"), raw("e"), raw("f", "xyz")]
    kept, counts = run(documents, "strict")
    assert kept == {"a": "xy", "f": "xyz"}
    assert (counts.documents, counts.blank, counts.duplicates, counts.bytes) == (2, 3, 1, 5)


def test_malformed_documents() -> None:
    documents = [raw("a", "x"), raw("b", fault="no JSON")]
    kept, counts = run(documents, "skip")
    assert list(kept) == ["a"] and counts.skipped == 1
    for policy in ("strict", "replace"):
        with pytest.raises(BadInput, match="no JSON") as caught:
            run(documents, policy)
        assert caught.value.code == "EW-202"


@settings(deadline=None)
@given(st.lists(st.text(alphabet="aé\n😀\r ", max_size=5), min_size=1, max_size=20), st.integers(1, 40))
def test_long_documents_come_back_unchanged_from_disk(chunks: list[str], memory: int) -> None:
    whole = "".join(chunks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "MEMORY_BYTES", memory)
        patch.setattr(text_module, "CHUNK_BYTES", 3)
        kept, counts = run([raw("a", *chunks)], "strict")
    assert kept == ({"a": whole} if whole.strip() else {})
    assert counts.bytes == (len(whole.encode()) if whole.strip() else 0)


def test_memory_does_not_grow_with_the_document() -> None:
    def peak(megabytes: int) -> int:
        document = RawDocument("a", "a", 1, ("word" * (1 << 18) for _ in range(megabytes)))
        tracemalloc.start()
        total = sum(len(piece) for found in screen([document], policy="strict", counts=Counts()) for piece in
                    pieces(found.texts))  # fmt: skip
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert total == megabytes << 20
        return highest

    assert peak(40) < peak(10) + (1 << 20)


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab1 \n", max_size=200), max_size=5), st.integers(4, 50))
def test_pieces_are_bounded_and_join_to_the_text(texts: list[str], limit: int) -> None:
    found = list(pieces(texts, limit))
    assert "".join(found) == "".join(texts)
    assert all(0 < len(piece) <= limit for piece in found)


def test_pieces_prefer_the_space_between_two_words() -> None:
    found = list(pieces(["one, two three\nfour. five " * 100], limit=64))
    assert len(found) > 40
    assert all(left[-1].isalnum() and right[0] == " " and right[1].isalnum() for left, right in pairwise(found))


def test_held_out_depends_on_the_name_alone() -> None:
    names = [f"folder/file{number}.py" for number in range(5000)]
    held_out = {name for name in names if is_held_out(name, 0.1)}
    assert 400 < len(held_out) < 600
    assert held_out <= {name for name in names if is_held_out(name, 0.2)}
    assert [name for name in names[:40] if is_held_out(name, 0.1)] == HELD_OUT_NAMES


HELD_OUT_NAMES = ["folder/file13.py", "folder/file14.py", "folder/file35.py", "folder/file37.py"]
"""Written down: the split must not change from one version to the next."""
