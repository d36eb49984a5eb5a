"""Where drafted tokens come from: a smaller model in any runtime, or the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edgewright.speculative.sampling import Sampler, best
from edgewright.speculative.trouble import no_numbers

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session


class Proposal(NamedTuple):
    """Tokens that may follow, and for each the distribution it was drawn from, float64 `[vocabulary of the target]`;
    no distributions where the tokens were chosen without chance."""

    tokens: list[int]
    probabilities: list[np.ndarray] | None = None


class Proposer(Protocol):
    """Guesses what the target will write."""

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a text with these tokens."""

    def propose(self, gamma: int) -> Proposal:
        """At most gamma tokens that may follow the text; fewer, or none, where it has no more to say."""

    def accept(self, accepted: int, token: int) -> None:
        """The text goes on with the first `accepted` tokens of the last proposal, and then with `token`."""


class DraftModel:
    """A small model in a session of its own, in step with the target (arXiv:2211.17192).

    One pass for each drafted token and no other: the last drafted token is not run, since what would follow it may
    never be asked for. Where it was accepted, the first pass of the next round takes it and the target's own token.

    Args:
        session: the draft, with logits and a cache that can be cut back.
        sampler: the target's own, so that both distributions are cut the same way.
        width: of the target's logits, which the distributions get: tokens that the draft lacks have probability 0, and
            behind one it proposes nothing more; what it has beyond is left out before it is drawn. By default its own.
        greedy: propose the most likely token although the target draws, as most runtimes do. The text has the target's
            law all the same; what changes is how many tokens are accepted: E p(argmax q), not sum min(p, q).
        ends: tokens after which nothing is proposed.
    """

    def __init__(
        self,
        session: Session,
        sampler: Sampler,
        *,
        width: int | None = None,
        greedy: bool = False,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.session = session
        self._sampler = sampler
        self._width = session.vocab_size if width is None else width
        self._greedy = greedy or sampler.greedy
        self._ends = ends
        self._text: list[int] = []
        self._proposed: list[int] = []
        self._lost = False

    def reset(self, tokens: Sequence[int]) -> None:
        self._text, self._proposed = list(tokens), []
        self._lost = max(tokens) >= self.session.vocab_size
        self.session.rewind(0)
        ready = tokens[:-1]
        if ready and len(ready) <= self.session.context_length and not self._lost:
            self.session.append(ready, "none")

    def propose(self, gamma: int) -> Proposal:
        # The last drafted token is not run, so it needs no place in the cache.
        count = 0 if self._lost else min(gamma, self.session.context_length - len(self._text) + 1)
        tokens: list[int] = []
        drawn_from: list[np.ndarray] | None = None if self._greedy else []
        fed: Sequence[int] = self._text[self.session.length :]
        while len(tokens) < count:
            row = self.session.append(fed, "last")
            assert row is not None
            token = self._choose(row[0, : self._width], drawn_from)
            tokens.append(token)
            if token in self._ends:
                break
            fed = (token,)
        self._proposed = tokens
        return Proposal(tokens, drawn_from)

    def accept(self, accepted: int, token: int) -> None:
        right = len(self._text) + accepted
        self._text += self._proposed[:accepted]
        self._text.append(token)
        self._lost = self._lost or token >= self.session.vocab_size
        if right < self.session.length:
            self.session.rewind(right)

    def _choose(self, row: np.ndarray, drawn_from: list[np.ndarray] | None) -> int:
        try:
            if drawn_from is None:
                return best(row)
            mass = self._sampler.distribution(row)
        except FloatingPointError as error:
            raise no_numbers(self.session, error) from error
        if len(mass) < self._width:
            mass = np.concatenate([mass, np.zeros(self._width - len(mass))])
        drawn_from.append(mass)
        return self._sampler.draw(mass)


class PromptLookup:
    """No model: what followed the last few tokens when they last stood in the text (prompt lookup).

    The longest run of tokens that was there before counts, and of several places the last. Costs next to nothing, and
    helps where the text repeats itself or its prompt. A lookup of one step each: places are kept by their n-grams.

    Args:
        longest: tokens of the runs that are looked for, at most.
        shortest: at least.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._text: list[int] = []
        self._proposed: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def reset(self, tokens: Sequence[int]) -> None:
        self._text, self._proposed, self._places = [], [], {}
        for token in tokens:
            self._add(token)

    def propose(self, gamma: int) -> Proposal:
        self._proposed = []
        for length in self._lengths:
            place = self._places.get(tuple(self._text[-length:])) if length <= len(self._text) else None
            if place is not None:
                self._proposed = self._text[place : place + gamma]
                break
        return Proposal(list(self._proposed))

    def accept(self, accepted: int, token: int) -> None:
        for each in (*self._proposed[:accepted], token):
            self._add(each)

    def _add(self, token: int) -> None:
        """Let the text go on, and remember that this token followed the runs before it."""
        place = len(self._text)
        for length in self._lengths:
            if length <= place:
                self._places[tuple(self._text[place - length :])] = place
        self._text.append(token)
