"""Which text is held out for evaluation: documents chosen by their names, or the end of a corpus of few documents."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.data.text import Document, is_held_out

Side = Literal["train", "held_out"]
TRAIN: Side = "train"
HELD_OUT: Side = "held_out"

REACH_BYTES = 1 << 16
"""How far before the border a line break or a space is looked for."""


class HashSplit(BaseModel):
    """Whole documents, by a hash of their names: what other documents come or go changes nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["hash"] = "hash"
    held_out: float
    """Share of the documents."""

    def divide(self, documents: Iterable[Document]) -> Iterator[tuple[Side, Document]]:
        """Tell the side of each document."""
        for document in documents:
            yield HELD_OUT if is_held_out(document.id, self.held_out) else TRAIN, document

    def words(self, total: int) -> str:
        """What is held out."""
        return f"{self.held_out:.1%} of the documents, by their names"

    def fills_both(self, documents: Iterable[Document]) -> bool:
        """Whether each side gets a document; reads no further than needed to know."""
        sides = set()
        for side, _ in self.divide(documents):
            sides.add(side)
            if len(sides) == 2:
                return True
        return False


class TailSplit(BaseModel):
    """The end of the corpus; the document that crosses the border becomes two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["tail"] = "tail"
    training_bytes: int = Field(gt=0)
    """UTF-8 bytes of text, in the order of reading, before the first held-out byte."""

    def words(self, total: int) -> str:
        """What is held out, of so many bytes."""
        return f"the last {total - self.training_bytes:,} of the {total:,} bytes of text"

    @classmethod
    def find(cls, documents: Iterable[Document], *, total: int, held_out: float) -> TailSplit | None:
        """Hold out the share `held_out` of `total` bytes, and what is left of the line that the border falls into.

        The cut is made after the last line break before the border, else after the last space, else at the border,
        between two characters. It lies near the border: the text for training may lose half of its bytes to it at most,
        the held-out text may grow by half.

        Returns:
            None when no text would be left on one of the sides.
        """
        border = total - math.ceil(total * held_out)
        reach = min(REACH_BYTES, border // 2, (total - border) // 2)
        begin = 0
        for document in documents:
            if begin + document.bytes > border:
                cut = begin + _last_break(document.texts, border - begin, reach)
                return cls(training_bytes=cut) if cut else None
            begin += document.bytes
        return None

    def divide(self, documents: Iterable[Document]) -> Iterator[tuple[Side, Document]]:
        """Tell the side of each document; the parts of one that is cut come one after the other, either may be left."""
        begin = 0
        for document in documents:
            left, begin = self.training_bytes - begin, begin + document.bytes
            if left <= 0:
                yield HELD_OUT, document
            elif left >= document.bytes:
                yield TRAIN, document
            else:
                first, second = _cut(document, left)
                yield TRAIN, first
                yield HELD_OUT, second


class CountSplit(BaseModel):
    """The last documents, each whole: for examples, of which none may be cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["count"] = "count"
    training_documents: int = Field(gt=0)
    """Documents, in the order of reading, before the first held-out one."""

    def words(self, total: int) -> str:
        """What is held out."""
        return f"those after the first {self.training_documents:,}"

    @classmethod
    def find(cls, documents: int, *, held_out: float) -> CountSplit | None:
        """Hold out the share `held_out` of that many, at least one; None when none would be left to train on."""
        held = math.ceil(documents * held_out)
        return cls(training_documents=documents - held) if held < documents else None

    def divide(self, documents: Iterable[Document]) -> Iterator[tuple[Side, Document]]:
        """Tell the side of each document."""
        for number, document in enumerate(documents):
            yield TRAIN if number < self.training_documents else HELD_OUT, document


Split = Annotated[HashSplit | TailSplit | CountSplit, Field(discriminator="rule")]
"""How a corpus was divided; JSON in its index."""


def _last_break(texts: Iterable[str], border: int, reach: int) -> int:
    """Byte of a text, at most `border`, at which to cut it."""
    taken, part = 0, b""
    ends = {b"\n": 0, b" ": 0}  # where the last one seen ends; a line break is preferred
    for text in texts:
        part = text.encode()[: border - taken]
        ends |= {mark: taken + part.rfind(mark) + 1 for mark in ends if mark in part}
        taken += len(part)
        if taken == border:
            break
    for end in ends.values():
        if end and end >= border - reach:
            return end
    return taken - len(part) + len(part.decode(errors="ignore").encode())


def _cut(document: Document, at: int) -> tuple[Document, Document]:
    """The first `at` bytes of a document and the others, both read from the one stream of its text."""
    texts = iter(document.texts)
    beyond: list[str] = []

    def before() -> Iterator[str]:
        left = at
        for text in texts:
            encoded = text.encode()
            yield encoded[:left].decode()
            left -= len(encoded)
            if left <= 0:
                beyond.append(encoded[len(encoded) + left :].decode())
                return

    first = before()

    def after() -> Iterator[str]:
        deque(first, maxlen=0)  # where the first part was not asked for
        yield from beyond
        yield from texts

    return Document(document.id, at, first), Document(f"{document.id}@{at}", document.bytes - at, after())
