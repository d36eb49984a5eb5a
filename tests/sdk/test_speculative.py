"""Speculative decoding keeps the target's law, runs no pass in vain, and counts what happened."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from markov import MarkovSession, ScriptedSession, chain

from edgewright.errors import BadInput, EdgewrightError, RecipeError
from edgewright.speculative import (
    Counts,
    Decoded,
    DraftModel,
    PromptLookup,
    Proposal,
    Sampler,
    decode,
    plain,
    sampling,
)

GREEDY = Sampler()
PROMPT = [1, 4, 2]


def run(
    target: MarkovSession,
    draft: MarkovSession,
    *,
    new: int = 60,
    gamma: int = 4,
    sampler: Sampler = GREEDY,
    **more: bool,
) -> Decoded:
    proposer = DraftModel(draft, sampler, width=target.vocab_size, **more)
    return decode(target, proposer, PROMPT, max_new_tokens=new, gamma=gamma, sampler=sampler)


# --- greedy ---


@pytest.mark.parametrize("gamma", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_text_is_the_targets(seed: int, gamma: int) -> None:
    target = MarkovSession(chain(40, seed))
    near = MarkovSession(target.table + 0.7 * chain(40, 100 + seed))
    expected = plain(target, PROMPT, max_new_tokens=60, sampler=GREEDY)
    found = run(target, near, gamma=gamma)
    assert found.tokens == expected.tokens and len(found.tokens) == 60
    assert expected.counts.rounds == 60 and expected.counts.drafted == 0
    assert found.counts.accepted + found.counts.rounds == 60
    lookup = decode(target, PromptLookup(), PROMPT, max_new_tokens=60, gamma=gamma, sampler=GREEDY)
    assert lookup.tokens == expected.tokens and lookup.counts.accepted > 0


def test_the_draft_helps_or_does_not() -> None:
    """Some drafts of the test above must be accepted and some rejected, or it would prove little."""
    target = MarkovSession(chain(40, 0))
    rates = [run(target, MarkovSession(target.table + noise * chain(40, 100))).counts for noise in (0.0, 0.7, 9.0)]
    good, fair, bad = (each.acceptance_rate for each in rates)
    assert good == 1 and 0.2 < fair < 1 and bad < 0.2


@pytest.mark.parametrize("gamma", [1, 3, 4])
def test_the_target_as_its_own_draft(gamma: int) -> None:
    table = chain(30, 3)
    found = run(MarkovSession(table), MarkovSession(table), new=10 * (gamma + 1), gamma=gamma).counts
    assert (found.acceptance_rate, found.block_efficiency) == (1.0, gamma + 1)
    assert found.by_position == [1.0] * gamma
    drawn = run(
        MarkovSession(table), MarkovSession(table), new=400, gamma=gamma, sampler=Sampler(temperature=1.0)
    ).counts
    assert drawn.acceptance_rate is not None and drawn.acceptance_rate >= 0.99


# --- passes ---


def test_one_pass_of_the_target_a_round_and_one_of_the_draft_a_token() -> None:
    target = MarkovSession(chain(40, 1))
    draft = MarkovSession(target.table + 0.7 * chain(40, 7))
    counts = run(target, draft, new=400, sampler=Sampler(temperature=1.0)).counts
    assert target.appends[0] == (len(PROMPT) - 1, "none") and draft.appends[0] == (len(PROMPT) - 1, "none")
    rounds = target.appends[1:]
    assert len(rounds) == counts.rounds and {kind for _, kind in rounds} == {"all"}
    assert sum(size for size, _ in rounds) == counts.rounds + counts.drafted
    passes = draft.appends[1:]
    assert len(passes) == counts.drafted and {kind for _, kind in passes} == {"last"}
    assert max(size for size, _ in passes) == 2  # the accepted last draft and the target's token, run together
    assert 0 < sum(size == 2 for size, _ in passes) < counts.rounds


def test_the_caches_hold_the_text() -> None:
    """After each round: the target's all of it but the last token, the draft's a beginning of that."""
    target = MarkovSession(chain(40, 1))
    draft = MarkovSession(target.table + 0.7 * chain(40, 7))

    class Watching(DraftModel):
        rounds = 0

        def accept(self, accepted: int, token: int) -> None:
            super().accept(accepted, token)
            assert target.cache == self._text[:-1]
            assert draft.cache == self._text[: draft.length] and draft.length >= len(self._text) - 2
            self.rounds += 1

    sampler = Sampler(temperature=1.0)
    watching = Watching(draft, sampler)
    decode(target, watching, PROMPT, max_new_tokens=400, gamma=4, sampler=sampler)
    assert watching.rounds > 80


# --- ends ---


@pytest.mark.parametrize("place", range(3, 12))
@pytest.mark.parametrize("stop", [True, False])
def test_the_end_inside_a_block(place: int, stop: bool) -> None:
    script = [0, 1, 2, *range(3, 20)]
    script[place] = 29
    ends = frozenset({29})
    target, draft = ScriptedSession(script, 30, ends=ends), ScriptedSession(script, 30, ends=ends)
    for proposer in (DraftModel(draft, GREEDY, ends=ends), DraftModel(draft, GREEDY), PromptLookup()):
        found = decode(target, proposer, script[:3], max_new_tokens=12, gamma=4, sampler=GREEDY, stop_at_eos=stop)
        assert found.tokens == (script[3:place] if stop else script[3:15])
        assert found.ended == stop
        assert found.counts.tokens == len(found.tokens) + stop
        if not isinstance(proposer, PromptLookup):
            assert found.counts.acceptance_rate in (1.0, None)


def test_nothing_is_drafted_behind_an_end() -> None:
    script = [0, 1, 2, 3, 29, 5, 6]
    draft = ScriptedSession(script, 30)
    proposer = DraftModel(draft, GREEDY, ends=frozenset({29}))
    proposer.reset([0, 1, 2])
    assert proposer.propose(4).tokens == [3, 29]


def test_to_the_end_of_the_context() -> None:
    table = chain(40, 2)
    whole = plain(MarkovSession(table), PROMPT, max_new_tokens=62, sampler=GREEDY).tokens
    target = MarkovSession(table, context=64)
    assert run(target, MarkovSession(table, context=64), new=62).tokens == whole  # the last token needs no place
    for context in (1, 2, 3, 10, 40):  # a draft that sees less: it falls silent, the target goes on
        found = run(target, MarkovSession(table, context=context), new=62)
        assert found.tokens == whole
        assert found.counts.drafted == found.counts.accepted and (found.counts.accepted > 0) == (context >= 3)
    with pytest.raises(BadInput, match="EW-602"):
        run(target, MarkovSession(table), new=63)


# --- sampled ---

SETTINGS = {
    "all": {"temperature": 1.0},
    "cut": {"temperature": 0.7, "top_k": 8, "top_p": 0.9},
}
ROUNDS = 20_000


def expected_law(logits: np.ndarray, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """What transformers makes of logits `[rows, vocabulary]`, in float64."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.from_numpy(logits.astype(np.float64))
    none = torch.zeros((len(scores), 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(float(temperature))(none, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(none, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(none, scores)
    return scores.softmax(dim=-1).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("vocabulary", [12, 700])
def test_distributions_are_those_of_transformers(temperature: float, top_k: int, top_p: float, vocabulary: int) -> None:
    logits = (3 * np.random.default_rng(vocabulary).standard_normal((6, vocabulary))).astype(np.float32)
    if vocabulary == 700:
        logits[3:] = 0.001 * logits[3:]  # top-p needs more than the tokens that are sorted at first
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    law = expected_law(logits, temperature=temperature, top_k=min(top_k, vocabulary), top_p=top_p)
    for row, expected in zip(logits, law, strict=True):
        found = sampler.distribution(row)
        assert np.abs(found - expected).max() < 1e-12
        assert (found > 0).tolist() == (expected > 0).tolist()
        assert found[sampler.draw(found)] > 0


def z_of_joint(
    settings: dict[str, float], *, greedy: bool = False, lookup: bool = False, width: int = 12, seed: int = 11
) -> tuple[float, float]:
    """The first two tokens of `ROUNDS` texts against the target's law: z of chi-square, and how many were accepted."""
    target, draft = MarkovSession(chain(12, 5, sharpness=1.0)), MarkovSession(chain(width, 6, sharpness=1.0))
    sampler = Sampler(**settings, seed=seed)
    proposer = PromptLookup() if lookup else DraftModel(draft, sampler, width=12, greedy=greedy)
    prompt = [0, 3, 7, 5, 0, 3]
    seen = np.zeros((12, 12))
    counts = Counts()
    for _ in range(ROUNDS):
        found = decode(target, proposer, prompt, max_new_tokens=3, gamma=4, sampler=sampler, stop_at_eos=False)
        seen[found.tokens[0], found.tokens[1]] += 1
        counts += found.counts
    law = expected_law(target.table, **settings)
    expected = ROUNDS * law[prompt[-1]][:, None] * law
    assert seen[expected == 0].sum() == 0
    often = expected >= 5
    rest = [(seen[~often].sum(), expected[~often].sum())] if expected[~often].sum() >= 5 else []
    pairs = [*zip(seen[often], expected[often], strict=True), *rest]
    chi2, freedom = sum((one - other) ** 2 / other for one, other in pairs), len(pairs) - 1
    assert freedom > 10
    rate = counts.acceptance_rate
    assert rate is not None
    return (chi2 - freedom) / (2 * freedom) ** 0.5, rate


@pytest.mark.parametrize(
    ("kind", "settings"), [("sampled", "all"), ("sampled", "cut"), ("greedy", "cut"), ("lookup", "all")]
)
def test_sampled_text_has_the_targets_law(kind: str, settings: str) -> None:
    z, rate = z_of_joint(SETTINGS[settings], greedy=kind == "greedy", lookup=kind == "lookup")
    assert abs(z) < 4
    assert 0.02 < rate < 0.9  # both branches of the rule were taken


@pytest.mark.parametrize("width", [9, 16])
def test_a_draft_with_fewer_or_more_tokens_keeps_the_law(width: int) -> None:
    z, rate = z_of_joint(SETTINGS["all"], width=width)
    assert abs(z) < 4 and rate > 0.1


def test_a_draft_is_silent_behind_a_token_that_it_lacks() -> None:
    script = [0, 1, 2, 3, 4, 25, 5, 6, 7, 8]
    target, draft = ScriptedSession(script, 30), ScriptedSession([min(token, 19) for token in script], 20)
    for start, accepted in ((2, 2), (7, 0)):
        proposer = DraftModel(draft, GREEDY, width=30)
        new = len(script) - start
        found = decode(target, proposer, script[:start], max_new_tokens=new, gamma=2, sampler=GREEDY)
        assert found.tokens == script[start:] and found.counts.accepted == accepted


def test_resampling_from_the_whole_distribution_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the wrong rule fails the same test by far."""
    monkeypatch.setattr(sampling, "residual", lambda mass, drafted: mass)
    z, _ = z_of_joint(SETTINGS["all"])
    assert z > 40


def test_a_residual_that_is_rounding_is_no_division_by_zero() -> None:
    mass = np.random.default_rng(0).dirichlet(np.ones(50))
    assert np.array_equal(sampling.residual(mass, mass), mass)
    nearly = mass * (1 + 1e-15)
    assert np.array_equal(sampling.residual(mass, nearly), mass)
    other = np.random.default_rng(1).dirichlet(np.ones(50))
    rest = sampling.residual(mass, other)
    assert np.array_equal(rest, np.where(mass > other, mass - other, 0)) and 0 < rest.sum() < 1


def test_expected_acceptance_is_the_overlap() -> None:
    """sum min(p, q) where the draft draws; p(argmax q) where it does not."""
    p, q = (expected_law(chain(12, seed, sharpness=1.0).astype(np.float32), temperature=1.0)[3] for seed in (5, 6))
    target, draft = (MarkovSession(chain(12, seed, sharpness=1.0)) for seed in (5, 6))
    for greedy, expected in ((False, np.minimum(p, q).sum()), (True, p[q.argmax()])):
        sampler = Sampler(temperature=1.0, seed=2)
        proposer = DraftModel(draft, sampler, greedy=greedy)
        total = Counts()
        for _ in range(2000):
            total += decode(target, proposer, [0, 3], max_new_tokens=2, gamma=1, sampler=sampler).counts
        kept = total.kept[0] / total.tried[0]
        assert abs(kept - expected) < 4 * (expected * (1 - expected) / total.tried[0]) ** 0.5


# --- counts ---


class RightWithProbability:
    """Proposes the target's greedy tokens, each right with a given probability; what follows a wrong one is wrong."""

    def __init__(self, target: MarkovSession, chance: float) -> None:
        self.next = target.table.argmax(axis=1)
        self.vocabulary = target.vocab_size
        self.chance = chance
        self.random = np.random.default_rng(4)
        self.last = 0

    def reset(self, tokens: Sequence[int]) -> None:
        self.last = tokens[-1]

    def propose(self, gamma: int) -> Proposal:
        tokens, last = [], self.last
        for _ in range(gamma):
            right = int(self.next[last])
            last = right if self.random.random() < self.chance else (right + 1) % self.vocabulary
            tokens.append(last)
        return Proposal(tokens)

    def accept(self, accepted: int, token: int) -> None:
        self.last = token


@pytest.mark.parametrize(("chance", "gamma"), [(0.5, 3), (0.8, 4), (0.9, 2)])
def test_tau_follows_the_formula(chance: float, gamma: int) -> None:
    """tau = (1 - a^(gamma + 1)) / (1 - a) for a draft that is right with probability a."""
    target = MarkovSession(chain(50, 8), context=200_000)
    tau = (1 - chance ** (gamma + 1)) / (1 - chance)
    new = round(20_000 * tau)
    counts = decode(
        target, RightWithProbability(target, chance), PROMPT, max_new_tokens=new, gamma=gamma, sampler=GREEDY
    ).counts
    assert counts.rounds > 19_000
    assert counts.block_efficiency is not None and abs(counts.block_efficiency / tau - 1) < 0.01
    assert all(abs(rate - chance) < 0.02 for rate in counts.by_position if rate is not None)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 4.0])
def test_the_figures_agree(noise: float) -> None:
    target = MarkovSession(chain(40, 1))
    counts = run(target, MarkovSession(target.table + noise * chain(40, 7)), new=200).counts
    rate, tau = counts.acceptance_rate, counts.block_efficiency
    assert rate is not None and tau is not None
    assert tau == pytest.approx(1 + counts.gamma * rate, abs=1e-12)
    assert tau == (counts.accepted + counts.rounds) / counts.rounds
    assert counts.mbsu(0.1) == pytest.approx(tau / (0.1 * counts.gamma + 1), abs=1e-12)
    assert sum(counts.kept) == counts.accepted
    assert counts.rounds - 1 <= counts.tried[0] <= counts.rounds  # the last round may have had nothing to draft


def test_counts_add_up() -> None:
    one, other = Counts(), Counts()
    for drafted, accepted in ((4, 2), (4, 4), (1, 0)):
        one.add_round(drafted, accepted)
    other.add_round(6, 5)
    other.add_round(0, 0)
    total = one + other
    assert (total.drafted, total.accepted, total.rounds, total.tokens) == (15, 11, 5, 16)
    assert total.tried == [4, 3, 3, 2, 1, 1] and total.kept == [3, 3, 2, 2, 1, 0]
    assert total.by_position == [3 / 4, 1.0, 2 / 3, 1.0, 1.0, 0.0]
    nothing = Counts()
    assert (nothing.acceptance_rate, nothing.block_efficiency, nothing.mbsu(0.1)) == (None, None, None)


# --- prompt lookup ---


def looked_up(text: list[int], gamma: int, longest: int, shortest: int) -> list[int]:
    """By trying all places."""
    for length in range(longest, shortest - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                return text[start + length : start + length + gamma]
    return []


@pytest.mark.parametrize(("longest", "shortest"), [(3, 1), (2, 2), (1, 1), (5, 2)])
def test_prompt_lookup_finds_the_last_place(longest: int, shortest: int) -> None:
    random = np.random.default_rng(longest)
    lookup = PromptLookup(longest, shortest)
    found = 0
    for _ in range(30):
        text = random.integers(0, 4, 2).tolist()
        lookup.reset(text)
        for _ in range(25):
            proposed = lookup.propose(4).tokens
            assert proposed == looked_up(text, 4, longest, shortest)
            found += bool(proposed)
            accepted = int(random.integers(0, len(proposed) + 1))
            token = int(random.integers(0, 4))
            text += [*proposed[:accepted], token]
            lookup.accept(accepted, token)
    assert found > 100


# --- what is refused ---


@pytest.mark.parametrize("gamma", [0, -1, 65])
def test_gamma_out_of_range(gamma: int) -> None:
    with pytest.raises(RecipeError, match="EW-803"):
        run(MarkovSession(chain(10, 0)), MarkovSession(chain(10, 1)), gamma=gamma)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}]
    + [{"top_p": value} for value in (0.0, 1.1, -0.5, float("nan"))],
)
def test_senseless_samplers(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="EW-801"):
        Sampler(**settings)


def test_an_empty_prompt() -> None:
    with pytest.raises(BadInput, match="EW-606"):
        decode(MarkovSession(chain(10, 0)), PromptLookup(), [], max_new_tokens=3, gamma=2, sampler=GREEDY)


@pytest.mark.parametrize(
    ("value", "sampler", "whose"),
    list(itertools.product([np.nan, np.inf], [GREEDY, Sampler(temperature=1.0)], ["target", "draft"])),
)
def test_logits_that_are_no_numbers(value: float, sampler: Sampler, whose: str) -> None:
    table = chain(10, 0)
    broken = table.copy()
    broken[:, 4] = value
    target = MarkovSession(broken if whose == "target" else table)
    draft = MarkovSession(broken if whose == "draft" else table)
    with pytest.raises(EdgewrightError, match="EW-805"):
        run(target, draft, sampler=sampler)


def test_a_head_without_most_tokens() -> None:
    """Logits of minus infinity are tokens that a model never writes, as in a trimmed head."""
    table = chain(20, 0)
    trimmed = table.copy()
    trimmed[:, 10:] = -np.inf
    for sampler in (GREEDY, Sampler(temperature=1.0, top_p=0.9)):
        assert run(MarkovSession(table), MarkovSession(trimmed), sampler=sampler).counts.accepted > 0
