"""`check --show-batch`: the first batch as training will get it: tokens, which are learned, where documents meet."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from edgewright.data import Batch, Corpus
    from edgewright.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """A document, or what of it lies in this sequence."""

    tokens: list[int]
    pieces: list[str]
    """The text of each token."""
    learned: list[bool]
    """Whether each token is predicted and counts."""
    padding: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "pieces": self.pieces, "learned": self.learned, "padding": self.padding}


@dataclass(frozen=True, slots=True)
class ShownBatch:
    """The first micro-batch of a stage.

    Args:
        stage: whose.
        sequences: which sequences of the data these are.
        rows: the documents of each.
        sequence_length: places of a row.
        learned: labels that count.
    """

    stage: str
    sequences: list[int]
    rows: list[list[ShownDocument]]
    sequence_length: int
    learned: int

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "sequence_length": self.sequence_length,
            "learned": self.learned,
            "rows": [
                {"sequence": sequence, "documents": [document.to_json() for document in row]}
                for sequence, row in zip(self.sequences, self.rows, strict=True)
            ],
        }


def show_batch(recipe: Recipe, say: Callable[[str], None]) -> ShownBatch:
    """The first micro-batch of a recipe's first stage.

    The corpus of the run directory is used where it is prepared; else one is prepared in a temporary folder, since the
    order of training depends on all of it. Nothing is kept.

    Raises:
        BadInput, Unsafe, OutOfResources: what preparing the corpus raises.
    """
    from edgewright.data import prepare_data
    from edgewright.data.prepare import is_prepared

    stage = recipe.trainings[0]
    there = recipe.run_directory / "data"
    folder = there if is_prepared(recipe.data, there) else Path(tempfile.mkdtemp(prefix="edgewright-"))
    try:
        corpus = prepare_data(recipe.data, folder, say=say)
        batches = corpus.train.batches(
            sequence_length=recipe.data.sequence_length,
            seed=recipe.seed_of(stage),
            restart_at_documents=recipe.data.restart_at_documents,
            start_id=corpus.start_id,
            eos_id=corpus.eos_id,
        )
        batch = batches.batch(0, stage.training.per_device_train_batch_size)
        return _shown(stage.name, batch, corpus)
    finally:
        if folder != there:
            shutil.rmtree(folder, ignore_errors=True)


def _shown(stage: str, batch: Batch, corpus: Corpus) -> ShownBatch:
    text = _pieces(corpus)
    rows = [list(_documents(batch, row, text)) for row in range(len(batch.indices))]
    length = batch.input_ids.shape[1]
    return ShownBatch(stage, batch.indices, rows, length, batch.valid_tokens)


def _documents(batch: Batch, row: int, text: Callable[[int], str]) -> Iterator[ShownDocument]:
    """The documents of a row: a token is learned where the label before it counts; the last label comes at the end."""
    from edgewright.data import IGNORED

    documents = batch.document_ids[row].tolist()
    places = range(len(documents))
    for number, (_, group) in enumerate(groupby(places, key=lambda place: documents[place])):
        span = list(group)
        labels = batch.labels[row, span].tolist()
        tokens = batch.input_ids[row, span].tolist()
        learned = [False, *(label != IGNORED for label in labels[:-1])]
        if labels[-1] != IGNORED:
            tokens, learned = [*tokens, labels[-1]], [*learned, True]
        padding = number > 0 and not any(learned) and len(set(tokens)) == 1
        yield ShownDocument(tokens, [text(token) for token in tokens], learned, padding)


def _pieces(corpus: Corpus) -> Callable[[int], str]:
    """What a token is as text: decoded, or as the vocabulary has it where it is no whole character.

    It is decoded after another one: some tokenizers drop the space before the first of what they decode.
    """
    from edgewright.data.tokenizer import load_encoder

    tokenizer = load_encoder(corpus.tokenizer_dir).tokenizer
    before: str = tokenizer.decode([corpus.start_id], skip_special_tokens=False)

    def text(token: int) -> str:
        decoded: str = tokenizer.decode([corpus.start_id, token], skip_special_tokens=False).removeprefix(before)
        name = tokenizer.id_to_token(token)
        return decoded if decoded and "\ufffd" not in decoded else name or f"<{token}>"

    return text


def print_batch(shown: ShownBatch, console: Console) -> None:
    """The batch on a console: colours on a terminal; elsewhere marks alone.

    A line holds a run of tokens that are learned (`+`) or not (`-`), with their number; `|` stands between tokens.
    """
    from rich.text import Text

    places = shown.sequence_length * len(shown.rows)
    head = f"first batch of stage {shown.stage}: {len(shown.rows)} sequences of {shown.sequence_length} tokens, "
    share = f"{shown.learned:,} of {places:,} places are learned ({shown.learned / places:.0%})"
    console.print(Text(head + share), soft_wrap=True)
    console.print(
        Text("+ learned   - read, not learned   | between two tokens   = border of documents"), soft_wrap=True
    )
    for sequence, row in zip(shown.sequences, shown.rows, strict=True):
        console.print()
        console.print(Text(f"sequence {sequence}", style="bold"))
        for number, document in enumerate(row):
            console.print(Text(f"  ={'=' * 8} {_name(number, document)}", style="yellow"))
            if not document.padding:
                for learned, line in _runs(document):
                    console.print(Text(line, style="green" if learned else "dim"), soft_wrap=True)


def _name(number: int, document: ShownDocument) -> str:
    if document.padding:
        return f"padding, {len(document.tokens)} places"
    return f"document {number + 1}: {len(document.tokens)} tokens, {sum(document.learned)} learned"


def _runs(document: ShownDocument) -> Iterator[tuple[bool, str]]:
    pairs = zip(document.learned, document.pieces, strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[0]):
        pieces = [_visible(piece) for _, piece in group]
        yield learned, f"  {'+' if learned else '-'} {len(pieces):4}  {'|'.join(pieces)}"


def _visible(piece: str) -> str:
    """Line breaks, tabs and what is not printed, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in piece)


def console() -> Console:
    """Standard output: colours only on a terminal that wants them."""
    import sys

    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, no_color=bool(os.environ.get("NO_COLOR")), width=None)
