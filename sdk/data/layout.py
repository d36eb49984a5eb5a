"""How the documents of a source lie on disk and become sequences: running text, or whole examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgewright.data.shards import StreamWriter, TokenStream
from edgewright.data.split import Side, Split
from edgewright.data.text import Document, Segment
from edgewright.data.tokenizer import Encoder


@dataclass(frozen=True, slots=True)
class Encoding:
    """What there is to encode."""

    config: Any
    """The source."""
    documents: Iterable[Document]
    split: Split
    encoder: Encoder
    writers: Mapping[Side, StreamWriter]
    special: Callable[[Segment], str]
    """The text of a segment without special tokens."""
    say: Callable[[str], None]


class Layout(ABC):
    """One way; without state."""

    running_text: ClassVar[bool]
    """Whether a sequence may begin and end anywhere, and every token is learned."""

    @abstractmethod
    def writer(self, directory: Path, side: Side, encoder: Encoder) -> StreamWriter:
        """What writes a split."""

    @abstractmethod
    def few(self, documents: Iterable[Document], *, total: int, held_out: float) -> Split | None:
        """How to divide what cannot be divided by names; None where it is too little."""

    @abstractmethod
    def encode(self, work: Encoding) -> dict[str, Any]:
        """Write all documents; what is to be said of it in the report, JSON."""

    @abstractmethod
    def open(self, directory: Path, files: dict[str, Any], side: Side) -> TokenStream:
        """Map a split."""
