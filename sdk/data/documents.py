"""Documents for evaluation, streamed: from file patterns or from the `data:` section of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from edgewright.data.files import FilesData
from edgewright.data.source import Source
from edgewright.data.split import HashSplit, Split
from edgewright.data.text import Counts, pieces, screen


def iterate_documents(
    data: Source | str | Sequence[str],
    *,
    split: Literal["all", "train", "held_out"] = "all",
    rule: Split | None = None,
    text_key: str = "text",
    counts: Counts | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield `(id, text)` of each document, duplicates and blank ones left out.

    A document longer than a few million characters comes as several consecutive pairs with the same id, so that memory
    stays bounded.

    Args:
        data: a data section, or one file pattern or several (bad text is then an error).
        split: which documents of a data section.
        rule: how the corpus was divided, `Corpus.split`; by the names of the documents if not given.
        text_key: key of the text in .jsonl files; for patterns.
        counts: where to count what was kept and dropped.

    Raises:
        BadInput: EW-2xx as in `prepare_data`.
    """
    if not isinstance(data, Source):
        patterns = (data,) if isinstance(data, str) else tuple(data)
        data = FilesData(files=patterns, text_key=text_key)
    counts = Counts() if counts is None else counts
    documents = screen(data.documents(), policy=data.on_bad_text, counts=counts)
    if split != "all":
        rule = rule or HashSplit(held_out=data.held_out)
        documents = (document for side, document in rule.divide(documents) if side == split)
    for document in documents:
        for piece in pieces(document.texts, limit=1 << 22):
            yield document.id, piece
