"""What the checkpoint says: its logits on the gate's texts, read once, in torch.

The readings are kept, not the model: the torch model is closed before the file's own runtime opens, and one reading
serves any number of files. The logits are bounded (`MAX_LOGITS`), so is the time: almost all is prefill; token by token
runs only what the model writes itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgewright.export.gate.divergence import log_softmax
from edgewright.export.gate.texts import PROBES, REAL
from edgewright.export.runtimes.session import Session

REAL_TOKENS = 384
"""Positions of real text, all texts together."""
WRITTEN_TOKENS = 64
"""Positions of the text that the reference writes."""
GREEDY_TOKENS = 16
"""Tokens that follow each prompt."""
PROMPT = 12
"""Tokens of a prompt."""
LAST = 32
"""Positions at the end of the longest text that are compared."""
MAX_SPECIALS = 16
MAX_LOGITS = 2**26
"""Logits kept at most (256 MB); a vocabulary above 100,000 gets shorter texts."""

WRITTEN, SPECIAL, LONGEST = "written", "special", "longest"


@dataclass(frozen=True, slots=True)
class Reading:
    """A text and the logits of its last tokens."""

    tokens: list[int]
    rows: np.ndarray
    """float32 `[n, vocab]`, n at most `len(tokens)`; row -1 is the prediction after the last token."""

    @property
    def first(self) -> int:
        """The position of the first row."""
        return len(self.tokens) - len(self.rows)

    def at(self, start: int, count: int) -> np.ndarray:
        """The rows of the positions from `start` on."""
        return self.rows[start - self.first : start - self.first + count]

    def cut(self, length: int) -> Reading:
        """The same up to a length: a decoder's rows do not depend on what follows."""
        return Reading(self.tokens[:length], self.rows[: max(0, length - self.first)])


@dataclass(frozen=True, slots=True)
class Greedy:
    """What follows a prompt when the first choice is always taken."""

    prompt: list[int]
    tokens: list[int]
    rows: np.ndarray
    """float32 `[len(tokens), vocab]`: the logits that chose each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """All that a file is compared with."""

    name: str
    """Of the checkpoint, for messages."""
    vocab_size: int
    context_length: int
    """The checkpoint's, in tokens."""
    readings: dict[str, Reading]
    """By name: real texts, `WRITTEN`, `SPECIAL` (special tokens between words), `LONGEST` (as long as the
    context, or as compute allows; left out where the real texts reach as far)."""
    real: tuple[str, ...]
    """The names of the real texts."""
    greedy: list[Greedy]
    """One for each real text's beginning, and one after the start token alone."""
    splits: dict[str, list[int]]
    """Texts and their tokens."""

    @property
    def main(self) -> tuple[str, ...]:
        """The texts that every runtime reads whole."""
        return (*self.real, WRITTEN)


def read_reference(
    session: Session,
    *,
    texts: Mapping[str, str] | None = None,
    specials: Sequence[int] = (),
    full_context: int = 0,
    seed: int = 0,
) -> Reference:
    """Read the gate's texts with a model that is right by definition.

    Args:
        session: it must give logits and rewind.
        texts: real texts by name; by default the built-in ones (`texts.REAL`). All share 384 tokens.
        specials: ids of special tokens to mix into a text.
        full_context: tokens that a text may have which is read to the end of the context; a longer context is read
            as far as that ("long text"), and 0 leaves it out.
        seed: of the text that the model writes.
    """
    texts = REAL if texts is None else texts
    context = session.context_length
    rows = REAL_TOKENS + WRITTEN_TOKENS + (len(texts) + 1) * GREEDY_TOKENS + 2 * MAX_SPECIALS + LAST
    share = min(1.0, MAX_LOGITS / (rows * session.vocab_size))
    size = min(context, max(16, int(share * REAL_TOKENS / len(texts))))
    split = {name: session.tokenize(text) for name, text in texts.items()}
    tokens = {name: [session.start_id, *ids][:size] for name, ids in split.items()}
    every = [token for ids in tokens.values() for token in ids]
    tokens[SPECIAL] = _mixed(specials, every)[:context]
    readings = {name: Reading(text, read(session, text)) for name, text in tokens.items() if text}
    readings[WRITTEN] = _written_by(session, min(context, max(16, int(share * WRITTEN_TOKENS))), seed)
    if min(full_context, context) > size:
        text = [every[index % len(every)] for index in range(min(full_context, context))]
        readings[LONGEST] = Reading(text, read(session, text, last=min(LAST, len(text))))
    count = max(1, min(GREEDY_TOKENS, context - PROMPT))
    prompts = [[session.start_id], *(tokens[name][: max(1, min(PROMPT, context // 2))] for name in texts)]
    return Reference(
        name=str(session.path),
        vocab_size=session.vocab_size,
        context_length=context,
        readings=readings,
        real=tuple(texts),
        greedy=[_greedy(session, prompt, count) for prompt in prompts],
        splits={**{text: session.tokenize(text) for text in PROBES}, **{texts[name]: split[name] for name in texts}},
    )


def read_again(session: Session, reference: Reference) -> dict[str, Reading]:
    """All texts once more, with other weights in the session's model."""
    return {
        name: Reading(old.tokens, read(session, old.tokens, last=len(old.rows) if old.first else None))
        for name, old in reference.readings.items()
    }


def read(session: Session, text: list[int], pieces: Iterable[int] = (), *, last: int | None = None) -> np.ndarray:
    """The logits of a text from an empty cache.

    Args:
        session: what reads.
        text: its tokens.
        pieces: lengths in which it is read; by default at once.
        last: only the logits of so many tokens at the end, read after all others.
    """
    session.rewind(0)
    if last is not None:
        session.append(text[:-last], "none")
        return rows_of(session, text[-last:])
    rows, start = [], 0
    for size in pieces or [len(text)]:
        rows.append(rows_of(session, text[start : start + size]))
        start += size
    return np.concatenate(rows)


def rows_of(session: Session, tokens: list[int]) -> np.ndarray:
    """The logits of all these tokens, behind those in the cache."""
    found = session.append(tokens, "last" if len(tokens) == 1 else "all")
    assert found is not None
    return found


def _mixed(specials: Sequence[int], words: list[int]) -> list[int]:
    """Special tokens, each between two others of a text."""
    return [token for special, word in zip(specials[:MAX_SPECIALS], words, strict=False) for token in (special, word)]


def _written_by(session: Session, count: int, seed: int) -> Reading:
    """A text sampled from the model itself at temperature 1: its own language, whatever that is."""
    draw = np.random.default_rng(seed)
    session.rewind(0)
    text, rows = [session.start_id], []
    while True:
        rows.append(rows_of(session, text[-1:]))
        if len(text) == count:
            return Reading(text, np.concatenate(rows))
        chances = np.exp(log_softmax(rows[-1][0]))
        text.append(int(draw.choice(len(chances), p=chances / chances.sum())))


def _greedy(session: Session, prompt: list[int], count: int) -> Greedy:
    session.rewind(0)
    found = session.append(prompt, "last")
    assert found is not None
    tokens, rows = [int(found.argmax())], [found]
    while len(tokens) < count:
        rows.append(rows_of(session, tokens[-1:]))
        tokens.append(int(rows[-1].argmax()))
    return Greedy(prompt, tokens, np.concatenate(rows))
