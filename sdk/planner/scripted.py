"""A session whose most likely tokens are written down beforehand, and which keeps what its calls took.

The model runs as always and its logits are computed; only the entries of the script's tokens are raised afterwards. So
the real loop of speculative decoding, over two such sessions, accepts all drafts or none of them, whatever the models
are worth, and what it takes can be measured before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgewright.export.runtimes.session import Logits, Session

FORCED = 1e6
"""The logit of a token of the script: any sampler takes it."""
STRIDE = 7
"""Between tokens of a script that follow each other."""

Clock = Callable[[], float]


@dataclass(slots=True)
class Calls:
    """What calls of a session took, in seconds.

    Args:
        append: number of tokens and seconds, in order.
        rewind: seconds, in order.
    """

    append: list[tuple[int, float]] = field(default_factory=list)
    rewind: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of all of them."""
        return sum(seconds for _, seconds in self.append) + sum(self.rewind)

    def of(self, tokens: int) -> list[float]:
        """Seconds of each `append` of so many tokens."""
        return [seconds for count, seconds in self.append if count == tokens]


class Scripted(Session):
    """A session over another one, with a context in front that stays in the cache.

    Args:
        inner: the real one. It is not closed with this one.
        context: tokens that every text goes behind; they are run once.
        shift: 0: the script itself; else other tokens than those of any script with another shift.
        clock: seconds.
    """

    def __init__(self, inner: Session, context: Sequence[int], *, shift: int, clock: Clock) -> None:
        self.inner, self.runtime, self.path = inner, inner.runtime, inner.path
        self.vocab_size, self.capabilities = inner.vocab_size, inner.capabilities
        self.context_length = inner.context_length - len(context)
        self.start_id, self.eos_ids = inner.start_id, inner.eos_ids
        self.shift = shift
        self.calls = Calls()
        self._clock = clock
        self._behind = len(context)
        inner.rewind(0)
        inner.append(context, "none")

    @property
    def length(self) -> int:
        return self.inner.length - self._behind

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        end = self.length + len(tokens)
        start = self._clock()
        rows = self.inner.append(tokens, logits)
        self.calls.append.append((len(tokens), self._clock() - start))
        if rows is not None:
            for index in range(len(rows)):
                rows[index, self.scripted(end - len(rows) + 1 + index)] = FORCED
        return rows

    def rewind(self, length: int) -> None:
        start = self._clock()
        self.inner.rewind(self._behind + length)
        self.calls.rewind.append(self._clock() - start)

    def scripted(self, position: int) -> int:
        """The token at a position of the text."""
        return (STRIDE * position + self.shift) % self.vocab_size

    def native_generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        draft: Session | None = None,
        gamma: int | None = None,
    ) -> list[int]:
        raise NotImplementedError("a runtime's own loop does not let its logits be changed")

    def tokenize(self, text: str) -> list[int]:
        return self.inner.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self.inner.detokenize(tokens)

    def close(self) -> None:
        """Nothing is held here."""
