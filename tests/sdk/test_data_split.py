"""The split by position: what it cuts, where, and that it is the same text for whoever reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewright.data.split import REACH_BYTES, HashSplit, TailSplit
from edgewright.data.text import Document, is_held_out


def read(texts: list[str], chunk: int = 7) -> Iterator[Document]:
    for number, text in enumerate(texts):
        chunks = (text[start : start + chunk] for start in range(0, len(text), chunk))
        yield Document(f"d{number}", len(text.encode()), chunks)


def sides(split: TailSplit, texts: list[str], chunk: int = 7) -> dict[str, list[tuple[str, int, str]]]:
    parts: dict[str, list[tuple[str, int, str]]] = {"train": [], "held_out": []}
    for side, document in split.divide(read(texts, chunk)):
        parts[side].append((document.id, document.bytes, "".join(document.texts)))
    return parts


def find(texts: list[str], held_out: float) -> TailSplit | None:
    return TailSplit.find(read(texts), total=len("".join(texts).encode()), held_out=held_out)


@given(
    texts=st.lists(st.text(st.sampled_from("ab \né語😀"), min_size=1), min_size=1, max_size=5),
    held_out=st.floats(0.01, 0.99),
    chunk=st.integers(1, 40),
)
def test_nothing_is_lost_and_the_share_is_kept(texts: list[str], held_out: float, chunk: int) -> None:
    split = find(texts, held_out)
    total = len("".join(texts).encode())
    wanted = math.ceil(total * held_out)
    if split is None:
        assert total - wanted < 4, "less than one character would be left"
        return
    parts = sides(split, texts, chunk)
    assert all(size == len(text.encode()) > 0 for side in parts.values() for _, size, text in side)
    train, end = ("".join(text for _, _, text in parts[side]) for side in ("train", "held_out"))
    assert train + end == "".join(texts) and train and end
    assert len(train.encode()) == split.training_bytes
    assert wanted <= len(end.encode()) <= wanted * 1.5 + 3
    assert len(parts["train"]) + len(parts["held_out"]) <= len(texts) + 1, "at most one document is cut"
    # whoever leaves one of the sides unread gets the same text on the other
    for side in ("train", "held_out"):
        alone = [(d.id, d.bytes, "".join(d.texts)) for s, d in split.divide(read(texts, chunk)) if s == side]
        assert alone == parts[side]


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("x" * 70 + " a\n" + "y" * 5 + " b c" + "z" * 18, "x" * 70 + " a\n"),  # a line break before a space
        ("x" * 70 + " a " + "y" * 27, "x" * 70 + " a "),
        ("x" * 60 + "\n" + "x" * 39, "x" * 60 + "\n" + "x" * 19),  # out of reach: half of what is held out
        ("x" * 79 + "\n" + "y" * 20, "x" * 79 + "\n"),
        ("é" * 50, "é" * 40),
        ("語" * 30 + "x" * 10, "語" * 26),  # 100 bytes: the border is inside a character
    ],
)
def test_where_it_is_cut(text: str, train: str) -> None:
    assert len(text.encode()) == 100
    split = find([text], 0.2)
    assert split is not None and sides(split, [text])["train"] == [("d0", len(train.encode()), train)]


def test_the_border_between_documents_is_no_cut() -> None:
    texts = ["a" * 80, "b" * 20]
    split = find(texts, 0.2)
    assert split == TailSplit(training_bytes=80)
    assert [document.id for _, document in split.divide(read(texts))] == ["d0", "d1"]


def test_a_line_break_is_not_looked_for_too_far_away() -> None:
    text = "\n" + "x" * (8 * REACH_BYTES)
    split = TailSplit.find(read([text], 1 << 12), total=len(text), held_out=0.25)
    assert split == TailSplit(training_bytes=len(text) - math.ceil(len(text) * 0.25))


def test_names_decide_where_they_can_and_no_more_is_read_than_needed() -> None:
    split = HashSplit(held_out=0.2)
    documents = read(["text"] * 1000)
    assert split.fills_both(documents)
    read_on = int(next(documents).id[1:])
    first = next(n for n in range(1000) if is_held_out(f"d{n}", 0.2) != is_held_out("d0", 0.2))
    assert read_on == first + 1
    assert not split.fills_both(read(["text"] * first))
