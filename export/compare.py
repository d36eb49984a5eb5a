"""Two sessions of what should be one model: how far are they apart?

The reference writes a text itself (temperature 1, seeded), so that any model is tested on its own language. Both read
it whole, in two pieces and token by token, since prefill and cached decoding are different code in every runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.runtimes.session import Session

TIE = 1e-3
"""Logits closer than this are equal: which of them wins says nothing about a model."""

MAX_LOGITS = 2**24
"""Logits of a text at most (64 MB each time that it is read), unless that left less than 64 tokens."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b  # 12345 + 678\n",
    "x = {'key': [1, 2.5, -3e-4]}\t!?\n\n\n  indented   and spaced",
    "naïve café, Ünïcödé, Привет, 你好, שלום, 🙂",
    "I'm sure they'll say it's 1999's SHOUTING.",
)
"""Texts that both tokenizers must split alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` measured. Differences are None when the candidate gave values that are not finite."""

    max_abs_diff: float | None
    """Largest difference of two logits, anywhere."""
    kl: float | None
    """Mean KL(reference || candidate) in nats per token: the largest mean of the ways to read the text."""
    kl_ci: tuple[float, float] | None
    """95% interval of that mean, by the normal approximation over positions."""
    top1_agreement: float
    """Share of positions where both prefer the same token (ties within 1e-3 aside)."""
    greedy_identity: bool
    """Whether the candidate's own greedy loop gives the reference's tokens (up to a tie)."""
    tokenizer_identity: bool
    """Whether both split text alike."""
    tokens: int
    """Positions of the text."""


def compare(
    reference: Session, candidate: Session, *, tokens: int = 256, greedy: int = 64, seed: int = 0
) -> Comparison:
    """Measure how far a candidate is from a reference.

    Args:
        reference: what is right; it must give logits and rewind.
        candidate: what is judged; it must give logits and rewind.
        tokens: length of the text; less where a context is shorter or the vocabulary is very large.
        greedy: tokens to generate greedily.
        seed: of the text.

    Raises:
        BadInput: EW-607, the two have different vocabularies.
    """
    if reference.vocab_size != candidate.vocab_size:
        raise BadInput(
            "EW-607",
            "these two have different vocabularies",
            where=candidate.path,
            expected=f"{reference.vocab_size} tokens, as {reference.path} has",
            found=candidate.vocab_size,
            fix="compare a file with the checkpoint that it was made from",
        )
    context = min(reference.context_length, candidate.context_length)
    tokens = min(tokens, context, max(64, MAX_LOGITS // reference.vocab_size))
    text, decoded = _written_by(reference, tokens, seed)
    short = max(2, len(text) // 8)
    reference.rewind(0)
    whole = _rows(reference, text)
    pairs = [
        (whole, _read(candidate, text, [len(text)])),
        (whole, _read(candidate, text, [len(text) // 3, len(text) - len(text) // 3])),
        (decoded, _read(candidate, text, [1] * len(text))),
        (whole[:short], _read(candidate, text[:short], [short])),
    ]
    divergences = [_kl(right, found) for right, found in pairs]
    worst = max(divergences, key=lambda values: float(values.mean()))
    finite = all(np.isfinite(found).all() for _, found in pairs)
    prompt = text[: max(1, min(16, len(text) // 2))]
    return Comparison(
        max_abs_diff=max(float(np.abs(right - found).max()) for right, found in pairs) if finite else None,
        kl=float(worst.mean()) if finite else None,
        kl_ci=_interval(worst) if finite else None,
        top1_agreement=min(_agreement(right, found) for right, found in pairs),
        greedy_identity=finite and _same_greedy(reference, candidate, prompt, min(greedy, context - len(prompt))),
        tokenizer_identity=all(reference.tokenize(probe) == candidate.tokenize(probe) for probe in PROBES),
        tokens=len(text),
    )


def _written_by(session: Session, count: int, seed: int) -> tuple[list[int], np.ndarray]:
    """A text sampled from a session, and the logits it gave while writing: `[count, vocab]`, read token by token."""
    draw = np.random.default_rng(seed)
    session.rewind(0)
    text, rows = [session.start_id], []
    while True:
        row = _rows(session, text[-1:], "last")
        rows.append(row)
        if len(text) == count:
            return text, np.concatenate(rows)
        chances = np.exp(_log_softmax(row[0]))
        text.append(int(draw.choice(len(chances), p=chances / chances.sum())))


def _read(session: Session, text: list[int], pieces: list[int]) -> np.ndarray:
    """The logits `[len(text), vocab]` of a text that is read in pieces of these lengths, from an empty cache."""
    session.rewind(0)
    rows, start = [], 0
    for size in pieces:
        rows.append(_rows(session, text[start : start + size]))
        start += size
    return np.concatenate(rows)


def _rows(session: Session, tokens: list[int], logits: str = "all") -> np.ndarray:
    found = session.append(tokens, "last" if logits == "last" or len(tokens) == 1 else "all")
    assert found is not None
    return found


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows.astype(np.float64) - rows.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _kl(right: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(right || found) of every position, `[positions]`, in nats; infinite where `found` is not finite."""
    result = np.full(len(right), np.inf)
    for index in np.flatnonzero(np.isfinite(found).all(axis=1)):
        p, q = _log_softmax(right[index]), _log_softmax(found[index])
        result[index] = max(0.0, float((np.exp(p) * (p - q)).sum()))
    return result


def _interval(values: np.ndarray) -> tuple[float, float]:
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return max(0.0, float(values.mean()) - half), float(values.mean()) + half


def _agreement(right: np.ndarray, found: np.ndarray) -> float:
    """Share of rows where the candidate's first choice is one of the reference's (there are several only in a tie)."""
    chosen = np.take_along_axis(right, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float((right.max(axis=1) - chosen < TIE).mean())


def _same_greedy(reference: Session, candidate: Session, prompt: list[int], count: int) -> bool:
    """Whether the candidate's own loop follows the reference's first choices, up to the first tie that it breaks."""
    own = candidate.native_generate(prompt, count, stop_at_eos=False)
    reference.rewind(0)
    row = _rows(reference, prompt, "last")[0]
    for token in own:
        if token != int(row.argmax()):
            return bool(row.max() - row[token] < TIE)
        row = _rows(reference, [token])[0]
    return len(own) == count
