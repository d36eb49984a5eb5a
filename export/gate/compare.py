"""A file in its own runtime against what its checkpoint said: how far are they apart?

Prefill and cached decoding are different code in every runtime, so one text is read in several ways: whole, in pieces,
token by token, after a rewind, to the end of the context, in a left-padded batch where the runtime offers one. Each
way is measured by itself: a fault that only one of them has must not drown in the mean of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.gate.divergence import TIE, interval, kl, regret, surprise
from edgewright.export.gate.reference import LONGEST, SPECIAL, WRITTEN, Greedy, Reading, Reference, read, rows_of
from edgewright.export.runtimes.session import Session

FULL, LONG = "full context", "long text"
"""What reading the longest text is called: it fills the checkpoint's context, or it does not."""

SHARE = 0.99
"""Share of the positions at which a file's first choice may cost no more than its limit."""

ENOUGH = 64
"""Positions from which on the mean KL to the checkpoint is a property of the file and not of the text. What is read in
shorter pieces is held against the file's own weights instead, where no quantization blurs the view (`kl_runtime`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` measured. Numbers are None when the runtime gave values that are not finite."""

    max_abs_diff: float | None
    """Largest difference of two logits, anywhere."""
    kl: float | None
    """Mean KL(checkpoint || file) in nats per token: the largest of the ways to read with enough positions."""
    kl_ci: tuple[float, float] | None
    """95% interval of that mean, with correlated neighbours (`divergence.interval`)."""
    kl_by_way: dict[str, float | None]
    """The mean KL of each way to read."""
    kl_weights: float | None
    """Mean KL(checkpoint || checkpoint with the file's weights), both in torch in float32: what the width costs.
    None where it was not measured (the weights are the checkpoint's, or do not fit its model)."""
    kl_runtime: float | None
    """Mean KL(checkpoint with the file's weights || file in its runtime): what the runtime's own rounding of
    activations and order of sums cost. The largest of all ways to read; None like `kl_weights`."""
    perplexity_ratio: float | None
    """The file's perplexity on real text over the checkpoint's."""
    top1_agreement: float
    """Share of positions where both prefer the same token (ties within 1e-3 aside)."""
    top1_regret: float | None
    """How much less likely, in nats, the checkpoint finds the file's first choice than its own, at all but the worst
    1% of the positions."""
    greedy_identity: bool
    """Whether the runtime's own greedy loop gives the checkpoint's tokens after every prompt (up to a tie)."""
    greedy_agreement: float
    """Mean share of a greedy continuation before it leaves the checkpoint's."""
    tokenizer_identity: bool
    """Whether both split text alike."""
    tokens: int
    """Positions that were compared, all ways together."""
    longest_text: int
    """Tokens of the longest text that the file read."""
    context_length: int
    """Tokens that the checkpoint's context holds; what lies beyond `longest_text` was not looked at."""
    skipped: dict[str, str]
    """The ways to read that were left out, and why."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Logits that a file gave: `rows` are those of the positions from `start` on."""

    way: str
    text: str
    start: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class _Measured:
    """One `_Found` against the checkpoint; arrays are `[positions]`."""

    way: str
    kl: np.ndarray
    kl_runtime: np.ndarray | None
    regret: np.ndarray
    max_abs_diff: float
    surplus: np.ndarray
    """Negative log-likelihood of the text's next token, less the checkpoint's; only of real texts read whole."""


def compare(reference: Reference, candidate: Session, own: Mapping[str, Reading] | None = None) -> Comparison:
    """Measure how far a file is from its checkpoint.

    Args:
        reference: what the checkpoint says.
        candidate: the file in its runtime; it must give logits.
        own: what the checkpoint says with the file's own weights (`read_again`).

    Raises:
        BadInput: EW-607, the two have different vocabularies; EW-558, the runtime shows no logits.
    """
    _check_comparable(reference, candidate)
    measured = [_measure(found, reference, own) for found in _ways(reference, candidate)]
    by_way = {way: [each for each in measured if each.way == way] for way in dict.fromkeys(m.way for m in measured)}
    means = {way: float(np.concatenate([each.kl for each in those]).mean()) for way, those in by_way.items()}
    finite = all(np.isfinite(mean) for mean in means.values())
    long = [way for way in means if own is None or sum(len(each.kl) for each in by_way[way]) >= ENOUGH] or list(means)
    worst = max(long, key=lambda way: means[way])
    regrets = np.concatenate([each.regret for each in measured])
    shares = _greedy_shares(reference, candidate) if finite else [0.0]
    return Comparison(
        max_abs_diff=max(each.max_abs_diff for each in measured) if finite else None,
        kl=means[worst] if finite else None,
        kl_ci=interval([each.kl for each in by_way[worst]]) if finite else None,
        kl_by_way={way: mean if np.isfinite(mean) else None for way, mean in means.items()},
        kl_weights=None if own is None else _weights_cost(reference, own),
        kl_runtime=_runtime_cost(by_way) if finite else None,
        perplexity_ratio=float(np.exp(np.concatenate([m.surplus for m in measured]).mean())) if finite else None,
        top1_agreement=float((regrets < TIE).mean()),
        top1_regret=float(np.quantile(regrets, SHARE, method="lower")) if finite else None,
        greedy_identity=min(shares) == 1,
        greedy_agreement=float(np.mean(shares)),
        tokenizer_identity=all(candidate.tokenize(text) == tokens for text, tokens in reference.splits.items()),
        tokens=len(regrets),
        longest_text=_longest(reference, candidate),
        context_length=reference.context_length,
        skipped=_skipped(reference, candidate),
    )


def _check_comparable(reference: Reference, candidate: Session) -> None:
    if reference.vocab_size != candidate.vocab_size:
        raise BadInput(
            "EW-607",
            "these two have different vocabularies",
            where=candidate.path,
            expected=f"{reference.vocab_size} tokens, as {reference.name} has",
            found=candidate.vocab_size,
            fix="compare a file with the checkpoint that it was made from",
        )
    if not candidate.capabilities.logits:
        raise BadInput(
            "EW-558",
            "this runtime shows no logits of this file, so that nothing can be proven",
            where=candidate.path,
            expected="logits of every position",
            found=f"{candidate.runtime} that only generates text",
            fix="export the model again",
        )


def _ways(reference: Reference, session: Session) -> Iterator[_Found]:
    """Everything that the file is asked, one answer at a time."""
    context = session.context_length
    texts = {name: reading.cut(context).tokens for name, reading in reference.readings.items()}
    for name in reference.main:
        yield _Found("prefill", name, 0, read(session, texts[name]))
    for name in reference.real:  # other kernels than for a long prompt
        yield _Found("short prefill", name, 0, read(session, texts[name][: max(2, len(texts[name]) // 16)]))
    if SPECIAL in texts:
        yield _Found("special tokens", SPECIAL, 0, read(session, texts[SPECIAL]))
    written = texts[WRITTEN]
    third = max(1, len(written) // 3)
    if len(written) > third:
        yield _Found("pieces", WRITTEN, 0, read(session, written, [third, len(written) - third]))
    yield _Found("decoding", WRITTEN, 0, read(session, written, [1] * len(written)))
    if session.capabilities.rewind and len(written) > third:
        session.rewind(third)
        yield _Found("after a rewind", WRITTEN, third, rows_of(session, written[third:]))
    yield from _long_text(reference, session)
    if session.capabilities.left_padding:
        names = [*reference.real, WRITTEN]
        batch = [texts[name][: len(texts[name]) // (1 + index)] for index, name in enumerate(names)]
        for name, rows in zip(names, session.batch_logits(batch), strict=True):
            yield _Found("left-padded batch", name, 0, rows)


def _long_text(reference: Reference, session: Session) -> Iterator[_Found]:
    """The end of the longest text, and once more token by token after a rewind."""
    if LONGEST not in reference.readings:
        return
    reading = reference.readings[LONGEST]
    if len(reading.tokens) > session.context_length:
        return  # the runtime's cache is shorter; the checkpoint's logits were kept for the end of its own only
    way = FULL if len(reading.tokens) == reference.context_length else LONG
    yield _Found(way, LONGEST, reading.first, read(session, reading.tokens, last=len(reading.rows)))
    if session.capabilities.rewind:
        session.rewind(reading.first)
        rows = [rows_of(session, [token]) for token in reading.tokens[reading.first :]]
        yield _Found(f"{way}, decoding", LONGEST, reading.first, np.concatenate(rows))


def _longest(reference: Reference, session: Session) -> int:
    read_whole = [len(reading.tokens) for name, reading in reference.readings.items() if name != LONGEST]
    long = len(reference.readings[LONGEST].tokens) if LONGEST in reference.readings else 0
    return max(*(min(length, session.context_length) for length in read_whole), long * (long <= session.context_length))


def _skipped(reference: Reference, session: Session) -> dict[str, str]:
    """What `_ways` left out, in words."""
    longest, context = _longest(reference, session), reference.context_length
    skipped = {}
    if longest < context:
        shorter = session.context_length < context
        why = f"the runtime holds {session.context_length} tokens only" if shorter else "it would cost too much time"
        skipped[FULL] = f"{why}; the longest text had {longest} of {context} tokens"
    if SPECIAL not in reference.readings:
        skipped["special tokens"] = "the tokenizer has none"
    if not session.capabilities.rewind:
        skipped["after a rewind"] = f"{session.runtime} cannot rewind"
    if not session.capabilities.left_padding:
        skipped["left-padded batch"] = f"{session.runtime} reads one text at a time"
    return skipped


def _measure(found: _Found, reference: Reference, own: Mapping[str, Reading] | None) -> _Measured:
    reading, count = reference.readings[found.text], len(found.rows)
    right = reading.at(found.start, count)
    following = reading.tokens[found.start + 1 : found.start + count + 1]
    is_real = found.way == "prefill" and found.text in reference.real
    surplus = _surplus(right, found.rows, following) if is_real else np.empty(0)
    return _Measured(
        way=found.way,
        kl=kl(right, found.rows),
        kl_runtime=kl(own[found.text].at(found.start, count), found.rows) if own is not None else None,
        regret=regret(right, found.rows),
        max_abs_diff=float(np.abs(right - found.rows).max()),
        surplus=surplus,
    )


def _surplus(right: np.ndarray, found: np.ndarray, following: list[int]) -> np.ndarray:
    count = len(following)  # nothing follows the last row of a text
    return surprise(found[:count], following) - surprise(right[:count], following)


def _weights_cost(reference: Reference, own: Mapping[str, Reading]) -> float | None:
    costs = np.concatenate([kl(reference.readings[name].rows, own[name].rows) for name in reference.main])
    mean = float(costs.mean())
    return mean if np.isfinite(mean) else None


def _runtime_cost(by_way: Mapping[str, list[_Measured]]) -> float | None:
    costs = [[each.kl_runtime for each in those if each.kl_runtime is not None] for those in by_way.values()]
    means = [float(np.concatenate(each).mean()) for each in costs if each]
    return max(means) if means else None


def _greedy_shares(reference: Reference, candidate: Session) -> list[float]:
    """One for every prompt that leaves room for an answer; a runtime with room for none has shown nothing."""
    fitting = [greedy for greedy in reference.greedy if len(greedy.prompt) < candidate.context_length]
    return [_greedy_share(candidate, greedy) for greedy in fitting] or [0.0]


def _greedy_share(candidate: Session, greedy: Greedy) -> float:
    """How much of its own greedy continuation the candidate shares with the checkpoint, up to a tie that it breaks."""
    count = min(len(greedy.tokens), candidate.context_length - len(greedy.prompt))
    own = candidate.native_generate(greedy.prompt, count, stop_at_eos=False)
    for index, (token, right, row) in enumerate(zip(own, greedy.tokens, greedy.rows, strict=False)):
        if token != right:
            return 1.0 if row[right] - row[token] < TIE else index / count
    return len(own) / count
