"""Loss, perplexity and bits per byte of any session, so of any checkpoint and of every exported file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgewright._verbs import VerbModule
from edgewright.errors import BadInput

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session

LONGEST_TOKEN = 64
"""Characters: longer tokens are rare enough that a text of that many per token is more than enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How well a model predicts text.

    Args:
        path: the model, as it was given.
        runtime: what ran it.
        documents: documents read, the last one perhaps in part.
        tokens: tokens predicted.
        bytes: UTF-8 bytes of the text those tokens stand for.
        loss: mean negative log-likelihood, nats per token.
        bits_per_byte: total nats / ln 2 / bytes: comparable between tokenizers.
        perplexity: exp(loss).
        ci95: 95 % interval of bits_per_byte (normal, windows taken as independent: the text is the sample, not the
            model); None for a single window.
    """

    path: Path
    runtime: str
    documents: int
    tokens: int
    bytes: int
    loss: float
    bits_per_byte: float
    perplexity: float
    ci95: tuple[float, float] | None

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": 1,
            "path": str(self.path),
            "runtime": self.runtime,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "ci95": None if self.ci95 is None else list(self.ci95),
        }


def evaluate(
    target: str | Path,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    max_tokens: int = 50_000,
    text_key: str = "text",
    window: int = 512,
    threads: int | None = None,
) -> Evaluation:
    """Measure a checkpoint or an exported file on text, in its own runtime and with its own tokenizer.

    Args:
        target: Hugging Face directory, GGUF file or GenAI folder.
        data: file patterns, or None for the held-out part of the interpreter's standard library.
        max_tokens: stop after so many tokens.
        text_key: key of the text in .jsonl files.
        window: tokens of context at most; see `windows`.
        threads: of the runtime; None = its choice.

    Raises:
        BadInput: EW-2xx for text that cannot be read, EW-210 when there is none, and whatever opening the model raises.
    """
    from edgewright.data import StdlibData, TrainTokenizer, iterate_documents
    from edgewright.export.runtimes import open_session

    if data is None:
        documents = iterate_documents(StdlibData(type="stdlib", tokenizer=TrainTokenizer()), split="held_out")
    else:
        patterns = [data] if isinstance(data, str | Path) else list(data)
        documents = iterate_documents([str(pattern) for pattern in patterns], text_key=text_key)
    with open_session(Path(target), threads=threads) as session:
        encoded = ((session.tokenize(text), len(text.encode())) for text in _texts(documents, max_tokens))
        return evaluate_session(session, encoded, max_tokens=max_tokens, window=window)


def evaluate_session(
    session: Session,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    max_tokens: int,
    window: int = 512,
    seed: int | None = None,
) -> Evaluation:
    """Measure an open session.

    Args:
        documents: (token ids without start and end token, UTF-8 bytes) of each document.
        max_tokens: stop after so many tokens; a document may be read in part, its bytes are counted in part.
        window: tokens of context at most.
        seed: draw windows at random from all documents, so that few tokens speak for all the text (the documents are
            held in memory); None: read from the start.

    Raises:
        BadInput: EW-210, no text at all.
    """
    parts = _parts(session, documents, min(window, session.context_length))
    return _measure(session, parts, max_tokens, seed)


def evaluate_examples(
    session: Session,
    examples: Iterable[tuple[Sequence[int], Sequence[bool]]],
    *,
    bytes_per_token: float,
    max_tokens: int,
    window: int = 512,
    seed: int | None = None,
) -> Evaluation:
    """Measure an open session on what is learned of examples, and on nothing else.

    Args:
        examples: (token ids with all that the template gave them, which of them count) of each example.
        bytes_per_token: of the tokens that count.
        max_tokens, window, seed: as for `evaluate_session`; tokens that count.

    Raises:
        BadInput: EW-210, nothing counts.
    """
    length = min(window, session.context_length)
    return _measure(session, _counted_parts(examples, length, bytes_per_token), max_tokens, seed)


@dataclass(frozen=True, slots=True)
class _Part:
    """A window: its inputs, the positions whose predictions count, what they should be, and the bytes of that."""

    document: int
    inputs: list[int]
    places: list[int]
    targets: list[int]
    bytes: float

    def first(self, most: int) -> _Part:
        """The first predictions alone."""
        if most >= len(self.targets):
            return self
        share = self.bytes * most / len(self.targets)
        return _Part(
            self.document, self.inputs[: self.places[most - 1] + 1], self.places[:most], self.targets[:most], share
        )


def _measure(session: Session, parts: Iterable[_Part], max_tokens: int, seed: int | None) -> Evaluation:
    if seed is not None:
        everything = list(parts)
        parts = (everything[index] for index in np.random.default_rng(seed).permutation(len(everything)))
    nats: list[float] = []
    sizes: list[int] = []
    shares: list[float] = []
    seen: set[int] = set()
    for whole in parts:
        left = max_tokens - sum(sizes)
        if left <= 0:
            break
        part = whole.first(left)
        session.rewind(0)
        logits = session.append(part.inputs, "all")
        assert logits is not None
        nats.append(float(negative_log_likelihood(logits[part.places], part.targets).sum()))
        sizes.append(len(part.targets))
        shares.append(part.bytes)
        seen.add(part.document)
    if not sizes:
        raise BadInput(
            "EW-210", "there is no text to evaluate on", expected="at least one token", fix="give files with text"
        )
    total, total_bytes = sum(sizes), sum(shares)
    loss = sum(nats) / total
    bits = sum(nats) / math.log(2) / total_bytes
    return Evaluation(
        path=session.path,
        runtime=session.runtime,
        documents=len(seen),
        tokens=total,
        bytes=round(total_bytes),
        loss=loss,
        bits_per_byte=bits,
        perplexity=math.exp(min(loss, 700.0)),
        ci95=_interval(bits, np.array(nats) / math.log(2), np.array(shares)),
    )


def _parts(session: Session, documents: Iterable[tuple[Sequence[int], int]], length: int) -> Iterator[_Part]:
    """Every window, all of whose predictions count; bytes by the document's mean per token."""
    for number, (tokens, size) in enumerate(documents):
        for inputs, targets in windows([session.start_id, *tokens], length):
            share = size * len(targets) / len(tokens)
            yield _Part(number, inputs, list(range(len(targets))), targets, share)


def _counted_parts(
    examples: Iterable[tuple[Sequence[int], Sequence[bool]]], length: int, bytes_per_token: float
) -> Iterator[_Part]:
    """Every window with a prediction that counts."""
    for number, (tokens, counted) in enumerate(examples):
        for start, (inputs, targets) in zip(range(0, len(tokens) - 1, length), windows(tokens, length), strict=True):
            places = [place for place in range(len(targets)) if counted[start + place + 1]]
            chosen = [targets[place] for place in places]
            if places:
                yield _Part(number, inputs, places, chosen, bytes_per_token * len(places))


def _interval(bits: float, window_bits: np.ndarray, window_bytes: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the ratio sum(bits) / sum(bytes) over windows (delta method); None for a single window."""
    count = len(window_bits)
    if count < 2:
        return None
    residuals = window_bits - bits * window_bytes
    half = 1.96 * math.sqrt(float((residuals**2).sum()) * count / (count - 1)) / float(window_bytes.sum())
    return bits - half, bits + half


def _texts(documents: Iterable[tuple[str, str]], max_tokens: int) -> Iterator[str]:
    """Whole documents from their pieces; of a very long one no more than the budget can need."""
    for _, pieces in groupby(documents, key=lambda pair: pair[0]):
        text = ""
        for _, piece in pieces:
            if len(text) < LONGEST_TOKEN * max_tokens:
                text += piece
        yield text


def windows(tokens: Sequence[int], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a document that begins with its start token into (inputs, targets) of at most `length` tokens.

    Windows overlap by one token, so every token but the first is predicted exactly once; a window starts without the
    context before it, as the rows of training do.
    """
    for start in range(0, len(tokens) - 1, length):
        part = list(tokens[start : start + length + 1])
        yield part[:-1], part[1:]


def negative_log_likelihood(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """-log softmax(logits)[target] in nats, float64 [n]; logits float32 [n, vocabulary]."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1, keepdims=True)
    normalizer = np.log(np.exp(wide - peak).sum(axis=1)) + peak[:, 0]
    return normalizer - wide[np.arange(len(targets)), list(targets)]


sys.modules[__name__].__class__ = VerbModule
