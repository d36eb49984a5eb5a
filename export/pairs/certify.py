"""The gate of pairs: the target and the draft as they ship, decoding together in the runtime that will run them.

Every prompt is continued by the runtime's own plain loop and by its speculative one, one after the other, in turn. The
tokens must be the same. A runtime that adds in another order when it reads several tokens at once may break a tie
otherwise; how far its logits move by that is measured on the same text (`noise.py`), and a divergence that this does
not explain fails the gate. So does a runtime that never drafted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from typing import Any, Literal

from edgewright.errors import BadInput
from edgewright.export.gate.texts import REAL
from edgewright.export.pairs.noise import judged
from edgewright.export.runtimes import spinning
from edgewright.export.runtimes.pair import PairSession
from edgewright.export.runtimes.session import Session
from edgewright.speculative.counts import Counts
from edgewright.speculative.divergence import Divergence

PROMPT_TOKENS = 24
"""Tokens of a built-in prompt."""
NEW_TOKENS = 48
"""Tokens that follow each prompt."""
PIECES = 3
"""Prompts from each of the gate's texts."""
ALARM = 0.1
"""By what share the acceptance of the files may differ from that of the checkpoints, and theirs from training's."""
ERRORS = 2.0
"""And by how many standard errors: a few hundred tokens tell a low acceptance badly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a pair did in its runtime, greedily. Rates are 0 to 1, `None` where nothing was measured."""

    gamma: int
    prompts: int
    tokens: int
    """New tokens, all prompts together."""
    drafted_per_round: float
    """Drafted tokens per pass of the target, at most gamma: at the end of a text there are fewer, and OpenVINO drafts
    fewer behind a draft that was accepted whole."""
    acceptance_rate: float | None
    """Drafted tokens that were accepted."""
    block_efficiency: float | None
    """New tokens per pass of the target, at most gamma + 1: 1 + drafted_per_round * acceptance_rate."""
    by_position: list[float | None]
    """Acceptance at each position where all before it were accepted; empty where the runtime does not tell."""
    cost_ratio: float
    """Bytes of the draft's weights over those of the target's: what its pass costs where all wait for the memory."""
    mbsu: float | None
    """block_efficiency / (cost_ratio * drafted_per_round + 1)."""
    plain_tokens_per_s: float
    tokens_per_s: float
    speedup: float
    """Plain over speculative time, the median over the prompts; both loops took turns."""
    token_identity: float
    """Share of the prompts after which both loops gave the same tokens."""
    divergences: list[Divergence]
    """The first token of each of the others."""
    peak_memory: int | None
    """The most bytes that a process of its own had in memory while it decoded with the pair."""
    checkpoint_acceptance: float | None
    """The acceptance of both checkpoints in float32, same prompts and gamma."""
    checkpoint_agreement: float | None
    """Of the drafted tokens that the target looked at there, the share it accepted."""
    trained_agreement: float | None
    """The same at the end of training, as `draft.json` tells it; it holds the prompts, too."""
    alarm: bool
    """The two acceptances, or the two agreements, differ by more than 10 %, and by more than chance explains."""
    gate: Literal["passed", "failed"]
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For manifests and `--json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a pair is held against: rates as in `Certificate`. What is not known raises no alarm."""

    checkpoint_acceptance: float | None = None
    checkpoint_agreement: float | None = None
    trained_agreement: float | None = None


def certify(
    pair: PairSession,
    prompts: Sequence[Sequence[int]],
    *,
    cost_ratio: float,
    expected: Expected,
    peak_memory: int | None,
    new_tokens: int = NEW_TOKENS,
) -> Certificate:
    """Measure and judge a pair.

    Args:
        pair: open in its runtime.
        prompts: each at least one token; such that do not fit are left out.
        cost_ratio: bytes of the draft's weights over those of the target's.
        expected: what to hold the acceptance against.
        peak_memory: measured elsewhere (`peak.py`).
        new_tokens: that follow each prompt, at most.

    Raises:
        BadInput: EW-832, no prompt fits.
    """
    fitting = [list(prompt) for prompt in prompts if 1 <= len(prompt) <= pair.context_length - new_tokens]
    if not fitting:
        raise BadInput(
            "EW-832",
            "no prompt leaves room for an answer",
            where=pair.path,
            expected=f"at most {pair.context_length - new_tokens} tokens",
            found=f"{len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens",
            fix="give shorter prompts",
        )
    _turn(pair, fitting[0], min(8, new_tokens))  # pipelines are compiled when they are first used
    turns = [_turn(pair, prompt, new_tokens) for prompt in fitting]
    counts = sum((turn.counts for turn in turns), Counts())
    different = [turn for turn in turns if turn.plain != turn.drafted]
    divergences = [judged(pair.target, turn.prompt, turn.plain, turn.drafted, pair.gamma) for turn in different]
    alarms = _alarms(counts, expected)
    reasons = _reasons(counts, divergences)
    return Certificate(
        gamma=pair.gamma,
        prompts=len(turns),
        tokens=sum(len(turn.drafted) for turn in turns),
        drafted_per_round=counts.gamma,
        acceptance_rate=counts.acceptance_rate,
        block_efficiency=counts.block_efficiency,
        by_position=counts.by_position,
        cost_ratio=cost_ratio,
        mbsu=counts.mbsu(cost_ratio),
        plain_tokens_per_s=sum(len(turn.plain) for turn in turns) / sum(turn.plain_seconds for turn in turns),
        tokens_per_s=sum(len(turn.drafted) for turn in turns) / sum(turn.seconds for turn in turns),
        speedup=_speedup(turns),
        token_identity=1 - len(different) / len(turns),
        divergences=divergences,
        peak_memory=peak_memory,
        **asdict(expected),
        alarm=bool(alarms),
        gate="failed" if reasons else "passed",
        reasons=reasons,
        warnings=[*alarms, *_warnings(counts, turns)],
    )


def built_in_prompts(session: Session) -> list[list[int]]:
    """Beginnings of pieces of the gate's texts, each with the start token: prose, code and many languages."""
    found = []
    for text in REAL.values():
        tokens = session.tokenize(text)
        for piece in range(PIECES):
            start = piece * len(tokens) // PIECES
            found.append([session.start_id, *tokens[start : start + PROMPT_TOKENS - 1]])
    return found


def counts_of(target: Session, draft: Session, prompts: Sequence[Sequence[int]], gamma: int) -> Counts:
    """What two checkpoints do together, decoding greedily as `certify` does."""
    from edgewright.speculative import DraftModel, Sampler, decode

    sampler, counts = Sampler(temperature=0.0), Counts()
    for prompt in prompts:
        if len(prompt) <= target.context_length - NEW_TOKENS:
            proposer = DraftModel(draft, sampler, width=target.vocab_size, ends=target.eos_ids)
            counts += decode(
                target, proposer, prompt, max_new_tokens=NEW_TOKENS, gamma=gamma, sampler=sampler, stop_at_eos=True
            ).counts
    return counts


# ---------------------------------------------------------------- one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One prompt, continued twice."""

    prompt: list[int]
    plain: list[int]
    drafted: list[int]
    plain_seconds: float
    seconds: float
    counts: Counts


def _turn(pair: PairSession, prompt: list[int], count: int) -> _Turn:
    start = time.perf_counter()
    plain = pair.target.native_generate(prompt, count)
    plain_seconds = time.perf_counter() - start
    if pair.runtime in spinning.RUNTIMES:
        time.sleep(spinning.SETTLE_SECONDS)  # the threads of the target alone still spin, in the way of the pair's
    start = time.perf_counter()
    drafted = pair.native_generate(prompt, count)
    seconds = time.perf_counter() - start
    assert pair.drafted is not None
    return _Turn(
        prompt=prompt,
        plain=plain,
        drafted=drafted,
        plain_seconds=plain_seconds,
        seconds=seconds,
        counts=pair.drafted,
    )


def _speedup(turns: Sequence[_Turn]) -> float:
    """Per token, so that a text that diverged and ended elsewhere does not count as faster."""
    ratios = [
        (turn.plain_seconds / max(1, len(turn.plain))) / (turn.seconds / max(1, len(turn.drafted))) for turn in turns
    ]
    return statistics.median(ratios)


# ---------------------------------------------------------------- the verdict


def _reasons(counts: Counts, divergences: Sequence[Divergence]) -> list[str]:
    reasons = []
    if not counts.drafted:
        reasons.append("the runtime never drafted a token: it decoded with the target alone")
    wrong = [each for each in divergences if not each.within_noise]
    if wrong:
        worst = max(wrong, key=lambda each: each.margin)
        reasons.append(
            f"after {len(wrong)} prompts the speculative loop gives other tokens than the plain one, and the runtime's "
            f"rounding does not explain it: the largest gap between the two tokens is {worst.margin:.3g}, "
            f"its logits move by {worst.noise:.3g} at most"
        )
    return reasons


def _warnings(counts: Counts, turns: Sequence[_Turn]) -> list[str]:
    warnings = []
    if counts.acceptance_rate == 0:
        warnings.append("no drafted token was accepted: this draft only costs")
    speedup = _speedup(turns)
    if speedup < 1:
        warnings.append(f"on this machine the pair is slower than its target alone: {speedup:.2f} times its speed")
    return warnings


def _alarms(counts: Counts, expected: Expected) -> list[str]:
    """What became of the acceptance from training to the checkpoints, and from them to the files, where it changed."""
    alarms = []
    if differs(counts.acceptance_rate, expected.checkpoint_acceptance, counts.drafted):
        alarms.append(
            f"ALARM: in this runtime {counts.acceptance_rate:.1%} of the drafted tokens are accepted, with the "
            f"checkpoints in float32 {expected.checkpoint_acceptance:.1%}: quantization or the runtime changes who "
            "agrees with whom"
        )
    if differs(expected.checkpoint_agreement, expected.trained_agreement, counts.tokens):
        alarms.append(
            f"ALARM: on these prompts draft and target agree on {expected.checkpoint_agreement:.1%} of the tokens, at "
            f"the end of training it was {expected.trained_agreement:.1%}: these are other texts, or other models"
        )
    return alarms


def differs(rate: float | None, expected: float | None, tokens: int) -> bool:
    """Whether two rates differ by more than 10 %, and by more than so few tokens do by chance."""
    if rate is None or expected is None or not isfinite(expected):
        return False
    chance = sqrt(2 * expected * (1 - expected) / tokens)  # both were counted over about as many tokens
    return abs(rate - expected) > max(ALARM * expected, ERRORS * chance)
