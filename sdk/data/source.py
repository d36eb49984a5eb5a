"""What every kind of data source has in common: the fields of `data:` in a recipe and the two questions asked of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from edgewright.data.layout import Layout
from edgewright.data.text import BadTextPolicy, RawDocument, Segment
from edgewright.data.text_layout import TextLayout
from edgewright.data.tokenizer import PretrainedTokenizer, TrainTokenizer


class Source(BaseModel, ABC):
    """Where the text comes from and how it is turned into sequences."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    not_in_tokens: ClassVar[frozenset[str]] = frozenset({"sequence_length", "restart_at_documents", "files", "path"})
    """Settings that do not decide the bytes on disk; files are known by `fingerprint`."""
    layout: ClassVar[Layout] = TextLayout()
    """How its documents lie on disk."""

    tokenizer: Annotated[TrainTokenizer | PretrainedTokenizer, Field(discriminator="type")] = TrainTokenizer()
    """A tokenizer trained on the corpus, or one that exists."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens of one training sequence."""
    held_out: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share kept for evaluation: of the documents, chosen by a hash of their names, or of the text, at its end, where
    there are too few documents for that."""
    on_bad_text: BadTextPolicy = "strict"
    """Invalid UTF-8, NUL and malformed documents: stop, drop the document, or put U+FFFD there."""
    restart_at_documents: bool = True
    """Whether attention and positions start anew at every document of a packed sequence."""

    @abstractmethod
    def fingerprint(self) -> list[object]:
        """What tells, without reading the text, whether the source is still the same: an entry for each file (JSON).

        Raises:
            BadInput: EW-203 when there is nothing there.
        """

    def text_bytes(self) -> int | None:
        """Bytes of the text, about; None where the files do not tell. Markup such as JSON's is counted as well."""
        sizes = [entry[1] for entry in self.fingerprint() if isinstance(entry, list) and isinstance(entry[1], int)]
        return sum(sizes) if sizes else None

    def complete_tokenizer(self, directory: Path) -> None:  # noqa: B027 - an optional hook
        """Put beside the tokenizer's files what the recipe says of them."""

    def visible(self) -> Callable[[Segment], str]:
        """What gives the text of a segment that is meant to be read."""
        return lambda segment: segment.text

    @abstractmethod
    def documents(self) -> Iterator[RawDocument]:
        """All documents in a fixed order; each must be read before the next one is asked for."""
