"""Speculative decoding of any target with any draft, in whatever runtimes they are, and what it is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright._verbs import VerbModule
from edgewright.errors import BadInput, RecipeError
from edgewright.machine import available_cores, describe_machine

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session
    from edgewright.speculative.contest import Ask, Contest, Row, Settings
    from edgewright.speculative.divergence import Divergence
    from edgewright.speculative.prompts import Prompt

DEFAULT_PROMPTS = 20
"""Held-out beginnings that are continued where no prompts are given."""
LONGEST_NGRAM = 16
FEWEST_PROMPTS_TO_TRUST = 10
Patterns = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """A prompt whose greedy text is not the plain one."""

    proposer: str
    gamma: int
    prompts: str
    where: str
    divergence: Divergence

    def to_json(self) -> dict[str, object]:
        return {
            "proposer": self.proposer,
            "gamma": self.gamma,
            "prompts": self.prompts,
            "where": self.where,
            **self.divergence.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Result of `speculate`.

    Args:
        target, draft: as they were given.
        runtimes: what ran the two.
        cost_ratio: bytes of the draft's weights / of the target's (`inventory.weight_bytes`): c of `mbsu`. None without
            a draft.
        measured_cost_ratio: time per token of the draft alone / of the target alone: c of `mbsu_measured`.
        rows: each proposer with each gamma over all prompts; where there are several sets also over each.
        divergences: greedy texts that are not the plain ones.
        notes: differences of the two vocabularies that do no harm, and prompts that were cut.
    """

    target: Path
    draft: Path | None
    runtimes: tuple[str, str | None]
    settings: Settings
    machine: dict[str, object]
    cost_ratio: float | None
    measured_cost_ratio: float | None
    rows: tuple[Row, ...]
    divergences: tuple[Parting, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def best(self) -> Row:
        """The fastest row over all prompts; of the draft model where there is one."""
        wanted = self.rows[0].proposer
        return max(
            (row for row in self.rows if row.prompts == "all" and row.proposer == wanted), key=lambda row: row.speedup
        )

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": 1,
            "target": str(self.target),
            "draft": None if self.draft is None else str(self.draft),
            "runtime": self.runtimes[0],
            "draft_runtime": self.runtimes[1],
            "machine": self.machine,
            "max_new_tokens": self.settings.max_new_tokens,
            "temperature": self.settings.temperature,
            "top_k": self.settings.top_k,
            "top_p": self.settings.top_p,
            "greedy_draft": self.settings.greedy_draft,
            "seed": self.settings.seed,
            "cost_ratio": self.cost_ratio,
            "measured_cost_ratio": self.measured_cost_ratio,
            **self.best.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "divergences": [each.to_json() for each in self.divergences],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def speculate(
    target: str | Path,
    draft: str | Path | None = None,
    *,
    prompts: Patterns | None = None,
    gamma: int | Sequence[int] = 4,
    ngram: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy_draft: bool = False,
    max_new_tokens: int = 64,
    max_prompt_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    say: Callable[[int, int], None] | None = None,
) -> Speculation:
    """Measure what a draft is worth for a target: acceptance, tokens per pass, speed against plain decoding, identity.

    Every prompt is continued by plain decoding and by each proposer with each gamma, in turns, after a warm-up. The
    loop is ours (`edgewright.speculative`), over the sessions of both files, each in its own runtime. The text has the
    law of the target alone; greedy, it is the same text.

    Args:
        target: the model whose text it is: any file, folder or directory that `open_session` opens.
        draft: a smaller one with the same vocabulary. None: n-grams alone.
        prompts: files or patterns, see `read_prompts`; each file is a set with rows of its own. None: beginnings of the
            held-out part of the interpreter's standard library.
        gamma: drafted tokens per round, one number or several.
        ngram: also prompt lookup, with n-grams of at most so many tokens: the baseline that needs no draft.
        temperature, top_k, top_p: of target and draft alike; temperature 0 is greedy.
        greedy_draft: the draft proposes its most likely token also where the target draws, as most runtimes do.
        max_new_tokens: at most so many for each prompt.
        max_prompt_tokens: of longer prompts the last so many are kept, which is counted; None: all.
        limit: the first so many prompts of each file.
        seed: of the draws.
        threads: of each runtime; None = its choice.
        say: told after each prompt how many are done, of how many.

    Raises:
        RecipeError: EW-190, nothing to measure, or a number that is not positive; EW-800, another vocabulary; EW-801,
            EW-803, settings out of their range; EW-804, a draft that is larger than the target.
        BadInput: EW-802, a runtime that cannot take part; EW-806, EW-807, files without prompts; EW-808, a prompt that
            does not fit into the context; and whatever opening the models raises.
    """
    from edgewright.export.runtimes import open_session, spinning
    from edgewright.speculative.contest import Contest, Settings
    from edgewright.speculative.trouble import check_session
    from edgewright.vocabulary import check_draft

    gammas = _gammas(gamma)
    _check_numbers(draft, ngram, max_new_tokens, max_prompt_tokens, limit)
    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        greedy_draft=greedy_draft,
    )
    settings.sampler(0)  # what makes no sense is said before a model is opened
    texts = _prompts(prompts, limit)
    ratio = None if draft is None else _cost_ratio(Path(target), Path(draft))
    with ExitStack() as stack:
        beside = draft is not None
        judge = stack.enter_context(open_session(Path(target), threads=threads, shares_cores=beside))
        check_session(judge, "target")
        asks, notes = _asks(judge, texts, max_new_tokens, max_prompt_tokens)
        helper = (
            None
            if draft is None
            else stack.enter_context(open_session(Path(draft), threads=threads, shares_cores=True))
        )
        if helper is not None:
            check_session(helper, "draft")
            notes = [*check_draft(judge, helper), *notes]
        alone = None
        if beside and judge.runtime in spinning.RUNTIMES:
            alone = stack.enter_context(open_session(Path(target), threads=threads))
        contest = Contest(judge, helper, gammas=gammas, ngram=ngram, settings=settings, cost_ratio=ratio, alone=alone)
        contest.run(asks, say=say)
        rows = contest.rows()
        return Speculation(
            target=Path(target),
            draft=None if draft is None else Path(draft),
            runtimes=(judge.runtime, None if helper is None else helper.runtime),
            settings=settings,
            machine=describe_machine(threads=available_cores() if threads is None else threads),
            cost_ratio=ratio,
            measured_cost_ratio=contest.measured_cost_ratio(),
            rows=tuple(rows),
            divergences=tuple(_partings(contest)),
            notes=tuple(notes),
            warnings=tuple(_warnings(rows)),
        )


def _prompts(patterns: Patterns | None, limit: int | None) -> list[Prompt]:
    from edgewright.speculative.prompts import held_out_prompts, read_prompts

    if patterns is None:
        return held_out_prompts(DEFAULT_PROMPTS if limit is None else limit)
    return read_prompts([patterns] if isinstance(patterns, str | Path) else list(patterns), limit=limit)


def _gammas(gamma: int | Sequence[int]) -> list[int]:
    from edgewright.speculative.loop import check_gamma

    gammas = list(dict.fromkeys([gamma] if isinstance(gamma, int) else gamma))
    for each in gammas or [0]:
        check_gamma(each)
    return gammas


def _check_numbers(
    draft: str | Path | None, ngram: int | None, max_new_tokens: int, max_prompt_tokens: int | None, limit: int | None
) -> None:
    if draft is None and ngram is None:
        raise RecipeError(
            "EW-190",
            "there is nothing to measure",
            expected="a draft, or n-grams",
            fix="--draft DIR, or --ngram 3",
        )
    if ngram is not None and not 1 <= ngram <= LONGEST_NGRAM:
        raise RecipeError("EW-190", "ngram is out of its range", expected=f"1 to {LONGEST_NGRAM}", found=ngram)
    numbers = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "limit": limit}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise RecipeError("EW-190", f"{name} must be positive", expected="at least 1", found=value)


def _cost_ratio(target: Path, draft: Path) -> float:
    """Bytes of the draft's weights / of the target's, as their runtimes compute with them.

    Raises:
        RecipeError: EW-804, the draft's are more.
    """
    from edgewright.inventory import weight_bytes

    ours, theirs = weight_bytes(target), weight_bytes(draft)
    if theirs > ours:
        raise RecipeError(
            "EW-804",
            "the draft is larger than the target, so that it can only slow it down",
            where=draft.absolute(),
            expected=f"at most the {ours:,} bytes of weights that the target reads for a token",
            found=f"{theirs:,} bytes",
            fix="exchange the two, or export the draft in a smaller width",
        )
    return theirs / ours


def _asks(
    session: Session, prompts: Sequence[Prompt], max_new_tokens: int, longest: int | None
) -> tuple[list[Ask], list[str]]:
    """The prompts in tokens of the target, and in words how many were cut.

    Raises:
        BadInput: EW-808, one does not fit.
    """
    from edgewright.speculative.contest import Ask

    asks, cut = [], 0
    for prompt in prompts:
        tokens = [session.start_id, *session.tokenize(prompt.text)]
        if longest is not None and len(tokens) > longest:
            tokens = [session.start_id, *tokens[len(tokens) - longest + 1 :]]
            cut += 1
        room = session.context_length - max_new_tokens
        if len(tokens) > room:
            raise BadInput(
                "EW-808",
                "prompt and new tokens do not fit into the target's context",
                where=prompt.where,
                expected=f"at most {session.context_length} tokens together",
                found=f"{len(tokens)} of the prompt + {max_new_tokens} new",
                fix=f"--max-prompt-tokens {room} keeps the last tokens of longer prompts"
                if room > 0
                else "fewer new tokens",
            )
        asks.append(Ask(prompt.set, prompt.where, tokens))
    return asks, [f"{cut} of {len(asks)} prompts were cut to their last {longest} tokens"] if cut else []


def _partings(contest: Contest) -> list[Parting]:
    return [
        Parting(proposer=each.name, gamma=each.gamma, prompts=ask.set, where=ask.where, divergence=divergence)
        for each in contest.contenders
        for ask, divergence in zip(contest.asks, each.divergences, strict=False)
        if divergence is not None
    ]


def _warnings(rows: Sequence[Row]) -> list[str]:
    whole = [row for row in rows if row.prompts == "all"]
    warnings = [
        f"{row.proposer}, gamma {row.gamma}: {row.outside_noise} texts differ from plain decoding by more than the "
        "runtime's noise: speculative decoding is wrong there"
        for row in whole
        if row.outside_noise
    ]
    if whole[0].texts < FEWEST_PROMPTS_TO_TRUST:
        warnings.append(f"Only {whole[0].texts} prompts: below {FEWEST_PROMPTS_TO_TRUST} the medians say little.")
    return warnings


sys.modules[__name__].__class__ = VerbModule
