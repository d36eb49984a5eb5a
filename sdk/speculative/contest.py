"""Speculative against plain decoding of one session: prompt by prompt in turns, in one run.

All contenders continue the same prompt one after the other, forwards and backwards by turns, so that a machine that
slows down slows all of them down, and none has always the place after the same other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import groupby
from operator import add
from typing import TYPE_CHECKING

from edgewright.export.runtimes.spinning import SETTLE_SECONDS
from edgewright.speculative.counts import Counts
from edgewright.speculative.divergence import Divergence, divergence
from edgewright.speculative.loop import Decoded, decode, plain
from edgewright.speculative.prompts import ALL
from edgewright.speculative.proposers import DraftModel, PromptLookup, Proposer
from edgewright.speculative.sampling import Sampler

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session

WARM_UP = 16
"""New tokens that each contender writes before anything is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How texts are written, by all contenders alike."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    greedy_draft: bool = False

    def sampler(self, number: int) -> Sampler:
        """The sampler of a prompt: the same for every contender, and in every run."""
        return Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=(self.seed, number))


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt in tokens, the start token first."""

    set: str
    where: str
    tokens: list[int]


@dataclass(slots=True)
class Contender:
    """A proposer with its gamma, and what it wrote for each prompt."""

    name: str
    """`draft` or `ngram`."""
    gamma: int
    make: Callable[[Sampler], Proposer]
    texts: list[Decoded] = field(default_factory=list)
    divergences: list[Divergence | None] = field(default_factory=list)
    """For each prompt, where greedy text is not the plain one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One proposer with one gamma on one set of prompts.

    Args:
        proposer: `draft` or `ngram`.
        gamma: drafted tokens per round, at most.
        prompts: name of the set; `all` for all of them.
        texts: prompts in it.
        counts: of all their rounds.
        cost_ratio: bytes of the draft's weights / of the target's; 0 for n-grams.
        measured_cost_ratio: time of a token that the draft writes alone / of one that the target does, median; None
            where the draft could read no prompt: its context is too short, or it lacks tokens.
        speedup: time per token of plain / of speculative decoding, once the prompt is in the caches; median of prompts.
        speedup_quartiles: of the same ratios; None for a single prompt.
        speedup_with_prompt: the same, with the time that the prompt takes (the draft reads it as well).
        tokens_per_s: median, once the prompt is in the caches.
        plain_tokens_per_s: of plain decoding of the same prompts.
        token_identity: share of prompts whose greedy text is the plain one, token by token; None where text is drawn.
        outside_noise: texts of the others that part where the runtime's own noise does not explain it.
    """

    proposer: str
    gamma: int
    prompts: str
    texts: int
    counts: Counts
    cost_ratio: float
    measured_cost_ratio: float | None
    speedup: float
    speedup_quartiles: tuple[float, float] | None
    speedup_with_prompt: float
    tokens_per_s: float
    plain_tokens_per_s: float
    token_identity: float | None
    outside_noise: int | None

    def to_json(self) -> dict[str, object]:
        counts, measured = self.counts, self.measured_cost_ratio
        return {
            "proposer": self.proposer,
            "gamma": self.gamma,
            "prompts": self.prompts,
            "texts": self.texts,
            "acceptance_rate": counts.acceptance_rate,
            "block_efficiency": counts.block_efficiency,
            "mbsu": counts.mbsu(self.cost_ratio),
            "mbsu_measured": None if measured is None else counts.mbsu(measured),
            "speedup": self.speedup,
            "speedup_quartiles": None if self.speedup_quartiles is None else list(self.speedup_quartiles),
            "speedup_with_prompt": self.speedup_with_prompt,
            "tokens_per_s": self.tokens_per_s,
            "plain_tokens_per_s": self.plain_tokens_per_s,
            "token_identity": self.token_identity,
            "outside_noise": self.outside_noise,
            "by_position": counts.by_position,
            "tokens": counts.tokens,
            "rounds": counts.rounds,
            "drafted": counts.drafted,
            "accepted": counts.accepted,
            "drafted_per_round": counts.gamma,
        }


class Contest:
    """All contenders over one target.

    Args:
        target: judges, and decodes plainly.
        draft: the draft model; None: n-grams alone.
        gammas: drafted tokens per round, each a contender.
        ngram: longest n-gram of prompt lookup; None: no such contender.
        settings: how all of them write.
        cost_ratio: bytes of the draft's weights / of the target's.
        alone: the target once more, in a session whose threads need not make way for a draft's: it decodes plainly.
    """

    def __init__(
        self,
        target: Session,
        draft: Session | None,
        *,
        gammas: Sequence[int],
        ngram: int | None,
        settings: Settings,
        cost_ratio: float | None,
        alone: Session | None = None,
    ) -> None:
        self.target, self.draft, self.settings = target, draft, settings
        self._plain_target = target if alone is None else alone
        self.cost_ratio = cost_ratio
        self.asks: list[Ask] = []
        self.plain: list[Decoded] = []
        self.drafts_own: list[Decoded | None] = []
        """What the draft wrote without the target, for the price of its tokens."""
        self.contenders: list[Contender] = []
        if draft is not None:
            self.contenders += [Contender("draft", gamma, self._draft_model) for gamma in gammas]
        if ngram is not None:
            self.contenders += [Contender("ngram", gamma, lambda _: PromptLookup(ngram)) for gamma in gammas]

    def _draft_model(self, sampler: Sampler) -> Proposer:
        assert self.draft is not None
        return DraftModel(
            self.draft,
            sampler,
            width=self.target.vocab_size,
            greedy=self.settings.greedy_draft,
            ends=self.target.eos_ids,
        )

    def run(self, asks: Sequence[Ask], *, say: Callable[[int, int], None] | None = None) -> None:
        """Warm up, then let all of them continue every prompt.

        Args:
            asks: prompts, at least one; each with its new tokens fits into the target's context.
            say: told after each prompt how many are done, of how many.
        """
        longest = max(asks, key=lambda ask: len(ask.tokens))
        self._plain(longest, 0, self.settings.max_new_tokens)  # some caches grow, and start small
        for contender in self.contenders:
            self._decode(contender, longest, 0, min(WARM_UP, self.settings.max_new_tokens))
        self._alone(longest, 0)
        self.asks = list(asks)
        writers: list[Callable[[Ask, int], None]] = [
            self._write_plainly,
            *(partial(self._write, each) for each in self.contenders),
            self._write_alone,
        ]
        for number, ask in enumerate(self.asks):
            for write in writers if number % 2 == 0 else reversed(writers):
                write(ask, number)
            if say is not None:
                say(number + 1, len(self.asks))
        if self.settings.temperature == 0:
            self._compare()

    def _write_plainly(self, ask: Ask, number: int) -> None:
        self.plain.append(self._plain(ask, number, self.settings.max_new_tokens))

    def _write(self, contender: Contender, ask: Ask, number: int) -> None:
        contender.texts.append(self._decode(contender, ask, number, self.settings.max_new_tokens))

    def _write_alone(self, ask: Ask, number: int) -> None:
        self.drafts_own.append(self._alone(ask, number))

    def _plain(self, ask: Ask, number: int, new: int) -> Decoded:
        found = plain(self._plain_target, ask.tokens, max_new_tokens=new, sampler=self.settings.sampler(number))
        if self._plain_target is not self.target:
            time.sleep(SETTLE_SECONDS)  # its threads still spin, in the way of whoever comes next
        return found

    def _decode(self, contender: Contender, ask: Ask, number: int, new: int) -> Decoded:
        sampler = self.settings.sampler(number)
        return decode(
            self.target,
            contender.make(sampler),
            ask.tokens,
            max_new_tokens=new,
            gamma=contender.gamma,
            sampler=sampler,
        )

    def _alone(self, ask: Ask, number: int) -> Decoded | None:
        """The draft's own text, as far as its context goes; None where it cannot read the prompt."""
        if self.draft is None or max(ask.tokens) >= self.draft.vocab_size:
            return None
        room = min(self.settings.max_new_tokens, self.draft.context_length - len(ask.tokens) + 1)
        if room < 1:
            return None
        sampler = self.settings.sampler(number)
        return plain(self.draft, ask.tokens, max_new_tokens=room, sampler=sampler, stop_at_eos=False)

    def _compare(self) -> None:
        for contender in self.contenders:
            contender.divergences = [
                divergence(self.target, ask.tokens, expected, found, gamma=contender.gamma)
                for ask, expected, found in zip(self.asks, self.plain, contender.texts, strict=True)
            ]

    def rows(self) -> list[Row]:
        """A row for each contender over all prompts, and where there are several sets one for each of them."""
        sets = {name: list(places) for name, places in self._sets()}
        groups = {ALL: list(range(len(self.asks)))} | (sets if len(sets) > 1 else {})
        return [self._row(contender, name, places) for contender in self.contenders for name, places in groups.items()]

    def _sets(self) -> list[tuple[str, list[int]]]:
        numbered = sorted(range(len(self.asks)), key=lambda place: self.asks[place].set)
        return [(name, list(group)) for name, group in groupby(numbered, key=lambda place: self.asks[place].set)]

    def _row(self, contender: Contender, name: str, places: Sequence[int]) -> Row:
        pairs = [(self.plain[place], contender.texts[place]) for place in places]
        ratios = [step_seconds(one) / step_seconds(other) for one, other in pairs]
        whole = [_whole_seconds(one) / _whole_seconds(other) for one, other in pairs]
        parted = [contender.divergences[place] for place in places] if contender.divergences else None
        drafted = contender.name == "draft"
        return Row(
            proposer=contender.name,
            gamma=contender.gamma,
            prompts=name,
            texts=len(places),
            counts=reduce(add, (found.counts for _, found in pairs)),
            cost_ratio=(self.cost_ratio or 0.0) if drafted else 0.0,
            measured_cost_ratio=self.measured_cost_ratio(places) if drafted else 0.0,
            speedup=statistics.median(ratios),
            speedup_quartiles=_quartiles(ratios),
            speedup_with_prompt=statistics.median(whole),
            tokens_per_s=1 / statistics.median(step_seconds(found) for _, found in pairs),
            plain_tokens_per_s=1 / statistics.median(step_seconds(found) for found, _ in pairs),
            token_identity=None if parted is None else sum(each is None for each in parted) / len(parted),
            outside_noise=None
            if parted is None
            else sum(each is not None and not each.within_noise for each in parted),
        )

    def measured_cost_ratio(self, places: Sequence[int] | None = None) -> float | None:
        """Time of a token of the draft alone / of the target alone, median over prompts; None where it is not known."""
        pairs = [
            (alone, self.plain[place])
            for place, alone in enumerate(self.drafts_own)
            if alone is not None and (places is None or place in places)
        ]
        return statistics.median(step_seconds(one) / step_seconds(other) for one, other in pairs) if pairs else None


def step_seconds(decoded: Decoded) -> float:
    """Seconds per new token, the prompt's left out."""
    return decoded.seconds / decoded.counts.tokens


def _whole_seconds(decoded: Decoded) -> float:
    return (decoded.seconds + decoded.prompt_seconds) / decoded.counts.tokens


def _quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
