"""Speculative decoding: several tokens of the target for one of its passes, with the target's own law.

Each round the proposer guesses up to gamma tokens, one pass of the target judges them all, and adds a token of its own.
The target's cache always holds the text but its last token, so that a round is one `append` and, where a token was
rejected, one `rewind`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgewright.errors import RecipeError
from edgewright.speculative.counts import Counts
from edgewright.speculative.proposers import Proposal, Proposer
from edgewright.speculative.sampling import Sampler
from edgewright.speculative.trouble import no_numbers

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session

MAX_GAMMA = 64
"""Drafted tokens per round at most: no draft is right so often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A text, and what it took.

    Args:
        tokens: the new tokens, without the end-of-text token.
        counts: of its rounds.
        end: the end-of-text token that the model wrote, if it did.
        prompt_seconds: until the prompt, but for its last token, was in the caches.
        seconds: from then on.
    """

    tokens: list[int]
    counts: Counts
    end: int | None
    prompt_seconds: float
    seconds: float

    @property
    def ended(self) -> bool:
        """Whether the model ended the text itself."""
        return self.end is not None


class NoProposer:
    """Proposes nothing: each round is a plain step of the target."""

    def reset(self, tokens: Sequence[int]) -> None:
        pass

    def propose(self, gamma: int) -> Proposal:
        return Proposal([])

    def accept(self, accepted: int, token: int) -> None:
        pass


def plain(
    target: Session, prompt: Sequence[int], *, max_new_tokens: int, sampler: Sampler, stop_at_eos: bool = True
) -> Decoded:
    """Decode token by token, in the same loop: what speculative decoding is measured against.

    Arguments, result and errors as `decode`.
    """
    return _decode(target, NoProposer(), prompt, max_new_tokens, 0, sampler, stop_at_eos)


def decode(
    target: Session,
    proposer: Proposer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    gamma: int,
    sampler: Sampler,
    stop_at_eos: bool = True,
) -> Decoded:
    """Let `target` continue a prompt with the help of `proposer`.

    Greedy, the tokens are those of `plain`, but for ties within the runtime's noise between one-token and many-token
    evaluation; sampled, they have the same law.

    Args:
        prompt: tokens, at least one; the start token is not added.
        max_new_tokens: at most so many; a last round drafts no more than can still be used.
        gamma: tokens that are drafted in a round, at most.
        sampler: how the target chooses; give the proposer the same one.
        stop_at_eos: end at the target's end-of-text tokens.

    Raises:
        RecipeError: EW-803, gamma is out of its range.
        BadInput: EW-602, prompt and new tokens do not fit; EW-606, an empty prompt; EW-805, logits that are no numbers.
    """
    check_gamma(gamma)
    return _decode(target, proposer, prompt, max_new_tokens, gamma, sampler, stop_at_eos)


def check_gamma(gamma: int) -> None:
    """Whether a round can draft so many tokens.

    Raises:
        RecipeError: EW-803.
    """
    if not 1 <= gamma <= MAX_GAMMA:
        raise RecipeError(
            "EW-803",
            "gamma, the tokens drafted per round, is out of its range",
            expected=f"1 to {MAX_GAMMA}",
            found=gamma,
            fix="2 to 5 suit most pairs",
        )


def _decode(
    target: Session,
    proposer: Proposer,
    prompt: Sequence[int],
    max_new_tokens: int,
    gamma: int,
    sampler: Sampler,
    stop_at_eos: bool,
) -> Decoded:
    target.check_generation(prompt, max_new_tokens)
    ends = target.eos_ids if stop_at_eos else frozenset()
    started = time.perf_counter()
    target.rewind(0)
    if len(prompt) > 1:
        target.append(prompt[:-1], "none")
    proposer.reset(prompt)
    ready = time.perf_counter()
    new: list[int] = []
    counts = Counts()
    last, end = prompt[-1], None
    while len(new) < max_new_tokens and end is None:
        proposal = _up_to_end(proposer.propose(min(gamma, max_new_tokens - len(new) - 1)), ends)
        drafted = proposal.tokens
        held = target.length
        rows = target.append([last, *drafted], "all")
        assert rows is not None
        try:
            accepted, last = sampler.verify(rows, drafted, proposal.probabilities)
        except FloatingPointError as error:
            raise no_numbers(target, error) from error
        if accepted == len(drafted) and drafted and drafted[-1] in ends:
            # The end was drafted and accepted: it is this round's own token, and nothing follows it.
            new += drafted[:-1]
            counts.add_round(accepted - 1, accepted - 1)
            end = drafted[-1]
            continue
        new += drafted[:accepted]
        counts.add_round(len(drafted), accepted)
        if last in ends:
            end = last
        else:
            new.append(last)
            if accepted < len(drafted):
                target.rewind(held + 1 + accepted)
            proposer.accept(accepted, last)
    return Decoded(
        tokens=new, counts=counts, end=end, prompt_seconds=ready - started, seconds=time.perf_counter() - ready
    )


def _up_to_end(proposal: Proposal, ends: frozenset[int]) -> Proposal:
    """A proposal without what stands behind an end-of-text token."""
    if ends.isdisjoint(proposal.tokens):
        return proposal
    count = 1 + next(place for place, token in enumerate(proposal.tokens) if token in ends)
    rows = proposal.probabilities
    return Proposal(proposal.tokens[:count], None if rows is None else rows[:count])
