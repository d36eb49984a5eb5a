"""What speculative decoding's parts take on this machine, measured inside its own loop.

    python -m edgewright.planner.speculative_probe

is a process that holds a target and drafts for it, open in one runtime. Requests and replies are those of
`bench_worker`: `{"do": "open", "target", "drafts", "threads", "context"}` once, then `{"do": "round", "rounds"}` as
often as wanted; the reply to a round is one repeat of everything.

The loop of `edgewright.speculative` runs over `Scripted` sessions, so that all drafts are accepted or all are rejected.
Parts are timed where they happen: a draft alone would find its weights in the processor's cache, and the thread pool of
the target would not be in its way.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.bench_worker import Reply, Request, answer, private_stdout
from edgewright.errors import BadInput
from edgewright.planner.scripted import Calls, Clock, Scripted

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session

LONGEST = 8
"""Tokens of the longest draft that is measured; the target is on up to one more."""
USUAL = 4
"""Tokens of the drafts with which all but the first are measured."""
ROOM = 64
"""Tokens that the caches must hold behind the context."""
PLAIN_STEPS = 12
"""Plain steps for each round that is asked for, so that the base of every speed-up is measured best."""
TOKEN_SEED = 20_261_130


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Seconds, medians over the rounds of one call of the loop (of what is left: the mean).

    Args:
        verify: the target's pass.
        step: a pass of the draft over one token, but for the first of a round; None where there was no other.
        first: its first pass of a round, behind one of the target, which has taken the caches of the processor; on two
            tokens where all were accepted before.
        cut: both caches cut back.
        loop: what is left of a round.
    """

    verify: float
    step: float | None
    first: float
    cut: float
    loop: float


class Prober:
    """Opens a target and its drafts, and measures all of them as often as it is asked to."""

    target: Scripted
    alone: Scripted
    """The target as it decodes without a draft, where its threads need not make way for another's."""
    drafts: list[Scripted]

    def __init__(self, open_session: Callable[..., Session], clock: Clock = time.perf_counter) -> None:
        self._open_session, self._clock = open_session, clock

    def open(self, request: Request) -> Reply:
        """Open the files, and put the context into every cache.

        Raises:
            BadInput: EW-802, logits or a cache that cannot be cut back are missing; EW-865, EW-867.
        """
        from edgewright.export.runtimes import spinning
        from edgewright.speculative.trouble import check_session

        paths = [str(request["target"]), *map(str, _list(request["drafts"]))]
        threads = int(str(request["threads"]))
        sessions = [self._open_session(Path(path), threads=threads, shares_cores=True) for path in paths]
        for session in sessions:
            check_session(session, "target" if session is sessions[0] else "draft")
            _check_vocabulary(session, sessions[0])
        length = min(int(str(request["context"])), *(session.context_length // 2 for session in sessions))
        for session in sessions:
            _check_room(session, length)
        vocabulary = range(min(session.vocab_size for session in sessions))
        context = random.Random(TOKEN_SEED).choices(vocabulary, k=length)
        self.target, *self.drafts = (Scripted(each, context, shift=0, clock=self._clock) for each in sessions)
        self.alone = self.target
        if self.target.runtime in spinning.RUNTIMES:
            session = self._open_session(Path(paths[0]), threads=threads)
            self.alone = Scripted(session, context, shift=0, clock=self._clock)
        return {"runtime": self.target.runtime, "context": length}

    def round(self, request: Request) -> Reply:
        """Everything once, over so many rounds of the loop. Seconds; medians, so that an interruption is not a cost.

        `step`: a plain step. `verify`: the target on 1, 2, ... tokens. `loop`: the loop beside both models, with drafts
        of 1, 2, ... tokens. `drafts`: for each a step, what its first pass takes longer behind an accepted draft
        (`catch_up`), and what a round takes longer that rejects (`undo`).
        """
        rounds = int(str(request["rounds"]))
        step, single = self._plain(PLAIN_STEPS * rounds)
        gammas = range(1, LONGEST + 1)
        kept = [self.pattern(self.drafts[0], gamma, True, rounds) for gamma in gammas]
        lost = [self.pattern(self.drafts[0], gamma, False, rounds) for gamma in gammas]
        drafts = [_parts(kept, lost)]
        for draft in self.drafts[1:]:
            own = [[self.pattern(draft, USUAL, accepted, rounds)] for accepted in (True, False)]
            drafts.append(_parts(*own))
        return {
            "step": step,
            "verify": [single, *(pattern.verify for pattern in kept)],
            "loop": [pattern.loop for pattern in kept],
            "drafts": drafts,
        }

    def _plain(self, count: int) -> tuple[float, float]:
        """Seconds of a step of plain decoding, and of the target in it."""
        from edgewright.export.runtimes.spinning import SETTLE_SECONDS
        from edgewright.speculative import Sampler, plain

        target = self.alone
        count = min(count, target.context_length - 1)
        target.calls = Calls()
        start = self._clock()
        plain(target, [target.start_id], max_new_tokens=count, sampler=Sampler(), stop_at_eos=False)
        seconds = self._clock() - start
        if target is not self.target:
            time.sleep(SETTLE_SECONDS)  # its threads still spin, in the way of the other sessions
        single = statistics.median(target.calls.of(1))
        return single + (seconds - target.calls.total) / count, single

    def pattern(self, draft: Scripted, gamma: int, accepted: bool, rounds: int) -> Pattern:
        """The loop's own rounds, all drafts accepted or all rejected."""
        from edgewright.speculative import DraftModel, Sampler, decode

        target, sampler = self.target, Sampler()
        draft.shift = 0 if accepted else 1
        target.calls, draft.calls = Calls(), Calls()
        room = min(target.context_length, draft.context_length) - 1
        rounds = min(rounds, room // (gamma + 1) if accepted else room - gamma)
        # Rejecting, the last gamma tokens are those of rounds that may not draft as many.
        count = rounds * (gamma + 1) if accepted else rounds + gamma
        start = self._clock()
        decoded = decode(
            target, DraftModel(draft, sampler), [target.start_id], max_new_tokens=count, gamma=gamma, sampler=sampler,
            stop_at_eos=False,
        )  # fmt: skip
        seconds = self._clock() - start
        taken = decoded.counts.rounds
        assert taken == (rounds if accepted else count), "every round goes as the script says"
        cuts = (target.calls.rewind[1:], draft.calls.rewind[1:])  # the first of each empties the cache
        singles, pairs = draft.calls.of(1), draft.calls.of(2)
        # The first round is another one: nothing was accepted or rejected before it.
        firsts = pairs if accepted else singles[gamma : gamma * rounds : gamma]
        verify = target.calls.of(gamma + 1)
        return Pattern(
            verify=statistics.median(verify[1:] or verify),
            step=statistics.median(singles[1:]) if len(singles) > 1 else None,
            first=statistics.median(firsts or singles[:1]),
            cut=sum(statistics.median(each) for each in cuts if each),
            loop=(seconds - target.calls.total - draft.calls.total) / taken,
        )


def _parts(kept: Sequence[Pattern], lost: Sequence[Pattern]) -> dict[str, float]:
    """A draft's own parts, from rounds that accepted and rounds that rejected, with drafts of the same lengths."""
    steps = [pattern.step for pattern in kept if pattern.step is not None]
    step = statistics.median(steps)
    undo = [
        pattern.verify - accepted.verify + pattern.cut + pattern.first - step
        for pattern, accepted in zip(lost, kept, strict=True)
    ]
    kept_undo = sorted(undo)[len(undo) // 4 : len(undo) - len(undo) // 4]
    catch_up = [pattern.first - step for pattern in kept]
    return {
        "step": step,
        "catch_up": max(0.0, statistics.median(catch_up)),
        "undo": max(0.0, statistics.fmean(kept_undo)),
    }


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _check_vocabulary(session: Session, target: Session) -> None:
    """Raises BadInput: EW-865."""
    if session.vocab_size != target.vocab_size:
        raise BadInput(
            "EW-865",
            "target and draft have different vocabularies",
            where=session.path,
            expected=f"logits {target.vocab_size} wide, as the target's",
            found=session.vocab_size,
            fix="train the draft with the target's tokenizer and the same vocab_size, padding included",
        )


def _check_room(session: Session, context: int) -> None:
    """Raises BadInput: EW-867."""
    if session.context_length < context + ROOM or context < 1:
        raise BadInput(
            "EW-867",
            "the context of this model is too short to measure speculative decoding in it",
            where=session.path,
            expected=f"at least {2 * ROOM} tokens",
            found=session.context_length,
            fix="export a model with a longer context",
        )


def main() -> None:
    """Entry point of the process."""
    replies = private_stdout()
    from edgewright.export.runtimes import open_session

    prober = Prober(open_session)
    answer({"open": prober.open, "round": prober.round}, sys.stdin, replies)


if __name__ == "__main__":
    main()
