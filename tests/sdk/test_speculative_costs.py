"""What speculative decoding costs and wins: the arithmetic against the table of the theory and by simulation, the fit
of drafts by size, and the probe over sessions whose costs are programmed. Nothing here looks at a real clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.errors import BadInput, RecipeError
from edgewright.export.runtimes.session import Capabilities, Logits, Session
from edgewright.planner.draft_cost import Sample, fit
from edgewright.planner.scripted import FORCED, Scripted
from edgewright.planner.speculative import Costs, best_gamma, expected_tokens, needed_acceptance, predict
from edgewright.planner.speculative_plan import costs_of, effort
from edgewright.planner.speculative_probe import LONGEST, Prober

# ---------------------------------------------------------------- arithmetic

ACCEPTANCES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
BEST = {
    0.02: ((3, 1.34), (4, 1.79), (6, 2.17), (8, 2.76), (11, 3.82), (19, 6.37)),
    0.05: ((2, 1.26), (3, 1.63), (4, 1.92), (6, 2.35), (8, 3.09), (13, 4.67)),
    0.10: ((1, 1.18), (2, 1.46), (3, 1.67), (4, 1.98), (6, 2.47), (10, 3.43)),
    0.20: ((1, 1.08), (1, 1.25), (2, 1.40), (3, 1.58), (4, 1.87), (7, 2.37)),
}
"""By c: best gamma and speed-up at each acceptance, where a check of many tokens takes no longer than one step."""


@pytest.mark.parametrize("ratio", BEST)
@pytest.mark.parametrize("column", range(len(ACCEPTANCES)))
def test_best_lengths_and_speedups_are_those_of_the_theory(ratio: float, column: int) -> None:
    costs = Costs.ratios(ratio, [1.0] * 30)
    found = best_gamma(costs, [ACCEPTANCES[column]] * 29)
    gamma, speedup = BEST[ratio][column]
    assert (found.gamma, round(found.speedup, 2)) == (gamma, speedup)
    assert found.low == found.speedup == found.high  # one repeat has no spread


def test_tokens_a_round() -> None:
    assert expected_tokens([]) == 1.0
    assert expected_tokens([1.0] * 5) == 6.0
    assert expected_tokens([0.5, 0.0, 0.9]) == 1.5  # what follows a token that is always rejected is never reached
    for a in (0.1, 0.6, 0.95):
        assert expected_tokens([a] * 4) == pytest.approx((1 - a**5) / (1 - a))


def test_a_draft_of_one_token_pays_from_an_acceptance_of_its_cost_on() -> None:
    for ratio in (0.05, 0.3, 0.77):
        found = needed_acceptance(Costs.ratios(ratio, [1.0, 1.0]), 1.0)
        assert found.acceptance == pytest.approx(ratio, abs=1e-3) and found.gamma == 1


FULL = Costs(
    step=(1.0,),
    verify=tuple((1.0 + 0.13 * (n - 1),) for n in range(1, 10)),
    draft=(0.21,),
    catch_up=(0.08,),
    undo=(0.11,),
    loop=tuple((0.02 + 0.005 * gamma,) for gamma in range(1, 9)),
)


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_predictions_are_what_a_simulation_of_rounds_comes_to(gamma: int) -> None:
    """Rates that differ by position; 100,000 rounds are within 1 %."""
    rates = np.array([0.9, 0.7, 0.6, 0.8, 0.5, 0.9, 0.4, 0.7])
    chance = np.random.default_rng(7)
    tokens, seconds = 0, 0.0
    for accepted in np.cumprod(chance.random((100_000, gamma)) < rates[:gamma], axis=1).sum(axis=1):
        tokens += int(accepted) + 1
        seconds += gamma * 0.21 + 1.0 + 0.13 * gamma + 0.02 + 0.005 * gamma
        seconds += 0.08 if accepted == gamma else 0.11
    assert predict(FULL, rates, gamma).speedup == pytest.approx(tokens / seconds, rel=0.01)


@pytest.mark.parametrize("wanted", [1.0, 1.2, 1.5])
def test_the_acceptance_needed_is_where_the_speedup_is_reached(wanted: float) -> None:
    found = needed_acceptance(FULL, wanted)
    assert found.acceptance is not None
    assert best_gamma(FULL, [found.acceptance] * 8).speedup >= wanted
    assert best_gamma(FULL, [found.acceptance - 0.002] * 8).speedup < wanted
    fixed = needed_acceptance(FULL, wanted, gamma=2)
    assert fixed.gamma == 2 and fixed.acceptance is not None
    assert (
        predict(FULL, [fixed.acceptance] * 2, 2).speedup
        >= wanted
        > predict(FULL, [fixed.acceptance - 0.002] * 2, 2).speedup
    )


def test_what_cannot_be_reached_is_said() -> None:
    slow = Costs.ratios(0.9, [1.0, 2.0, 3.0, 4.0])  # a check takes as long as the steps it replaces
    found = needed_acceptance(slow, 1.0)
    assert (found.acceptance, found.low, found.high, found.gamma) == (None, None, None, None)


def test_ranges_are_of_the_repeats_side_by_side() -> None:
    """A machine that was slower in some repeats, in all parts alike, has the same speed-up in all of them."""
    slower = np.array([1.0, 1.5, 3.0, 1.1, 2.0])
    alike = Costs(step=tuple(slower), verify=(tuple(slower), tuple(1.3 * slower)), draft=tuple(0.1 * slower))
    found = predict(alike, [0.8], 1)
    assert found.low == pytest.approx(found.speedup) == pytest.approx(found.high) == pytest.approx(1.8 / 1.4)
    unsure = replace(alike, draft=(0.1, 0.2, 0.3, 0.4, 0.5))
    found = predict(unsure, [0.8], 1)
    each = 1.8 * slower / (1.3 * slower + np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert (found.low, found.speedup, found.high) == pytest.approx(tuple(np.quantile(each, (0.1, 0.5, 0.9))))
    needed = needed_acceptance(unsure, 1.2)
    assert needed.low < needed.acceptance < needed.high  # type: ignore[operator]


def test_a_faster_plain_file_is_the_harder_comparison() -> None:
    found = predict(FULL, [0.9] * 4, 4)
    against = predict(FULL, [0.9] * 4, 4, plain=(0.4,))
    assert against.speedup == pytest.approx(0.4 * found.speedup) and found.speedup > 1 > against.speedup


@pytest.mark.parametrize("gamma", [0, -1, 9])
def test_gamma_out_of_its_range(gamma: int) -> None:
    with pytest.raises(RecipeError, match="1 to 8") as caught:
        predict(FULL, [0.5] * 20, gamma)
    assert caught.value.code == "EW-860"


@pytest.mark.parametrize("rates", [[1.2], [0.5, -0.1], [70.0], [float("nan")]])
def test_acceptance_out_of_its_range(rates: list[float]) -> None:
    for ask in (expected_tokens, lambda each: predict(FULL, each, 1)):
        with pytest.raises(RecipeError, match="from 0 to 1") as caught:
            ask(rates)
        assert caught.value.code == "EW-861"
    if rates == [70.0]:
        assert "write 0.7" in str(caught.value)


# ---------------------------------------------------------------- the fit


def test_the_fit_finds_what_steps_are_made_of() -> None:
    def sample(layers: int, size: float) -> Sample:
        return Sample(layers=layers, bytes=size, times=(1e-4 + 3e-5 * layers + size / 2e10, 2e-4 + 5e-5 * layers))

    sizes = [(1, 1e6), (4, 3e6), (1, 4e6), (2, 6e6)]
    found = fit([sample(*each) for each in sizes])
    assert found.fixed == pytest.approx((1e-4, 2e-4)) and found.layer == pytest.approx((3e-5, 5e-5))
    assert found.byte == pytest.approx((1 / 2e10, 0.0), abs=1e-16)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.step(3, 5e6) == pytest.approx((1e-4 + 9e-5 + 2.5e-4, 2e-4 + 1.5e-4))


def test_no_part_of_a_fit_is_below_nothing() -> None:
    """Noise that makes a larger draft the quicker one must not make a layer give time back."""
    samples = [Sample(layers=layers, bytes=1e6 * layers, times=(1e-4 / layers,)) for layers in (1, 2, 4)]
    found = fit(samples)
    assert min(found.fixed[0], found.layer[0], found.byte[0]) >= 0
    assert found.error > 0.5  # and the fit says that it does not fit


# ---------------------------------------------------------------- the probe, over programmed costs


class Clock:
    """Seconds that only programmed work lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Programmed(Session):
    """A model without weights: `cost(n)` seconds for n tokens, `cut` for each cache that is cut back."""

    runtime = "fake"
    path = Path("fake")
    vocab_size = 50
    context_length = 512
    capabilities = Capabilities(logits=True, rewind=True, fp32_compute=True)
    start_id = 0
    eos_ids = frozenset({3})

    def __init__(self, clock: Clock, cost: Callable[[int], float], *, cut: float = 0.0) -> None:
        self.clock, self.cost, self.cut = clock, cost, cut
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        self.tokens.extend(tokens)
        self.clock.now += self.cost(len(tokens))
        rows = np.zeros((len(tokens) if logits == "all" else 1, self.vocab_size), np.float32)
        rows[:, 11] = 5.0
        return None if logits == "none" else rows

    def rewind(self, length: int) -> None:
        if length < self.length:
            self.clock.now += self.cut
        del self.tokens[length:]

    def native_generate(self, *args: Any, **options: Any) -> list[int]:
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        return []

    def detokenize(self, tokens: Sequence[int]) -> str:
        return ""

    def close(self) -> None:
        pass


def target_cost(count: int) -> float:
    return 1.0 + 0.2 * (count - 1)


def draft_cost(count: int) -> float:
    return 0.1 + 0.04 * (count - 1)


@pytest.fixture
def probed() -> tuple[Prober, Clock]:
    """A target and two drafts, the second three times as slow, with a context of 100 tokens."""
    clock = Clock()
    made = {
        "target": Programmed(clock, target_cost, cut=0.5),
        "small": Programmed(clock, draft_cost, cut=0.03),
        "large": Programmed(clock, lambda count: 3 * draft_cost(count), cut=0.06),
    }
    prober = Prober(lambda path, threads, shares_cores: made[str(path)], clock)
    reply = prober.open({"target": "target", "drafts": ["small", "large"], "threads": 1, "context": 100})
    assert reply == {"runtime": "fake", "context": 100}
    return prober, clock


def test_the_probe_finds_programmed_costs(probed: tuple[Prober, Clock]) -> None:
    reply = probed[0].round({"rounds": 3})
    assert reply["step"] == pytest.approx(1.0)
    assert reply["verify"] == pytest.approx([target_cost(count) for count in range(1, LONGEST + 2)])
    assert reply["loop"] == pytest.approx([0.0] * LONGEST, abs=1e-9)
    small, large = reply["drafts"]  # type: ignore[misc]
    assert small["step"] == pytest.approx(0.1) and small["catch_up"] == pytest.approx(0.04)  # type: ignore[index]
    assert large["step"] == pytest.approx(0.3) and large["catch_up"] == pytest.approx(0.12)  # type: ignore[index]
    assert large["undo"] == pytest.approx(0.5 + 0.06)  # type: ignore[index]
    assert small["undo"] == pytest.approx(0.5 + 0.03)  # type: ignore[index]


@pytest.mark.parametrize("gamma", [2, 5])
def test_a_prediction_from_the_probe_is_what_the_loop_takes(probed: tuple[Prober, Clock], gamma: int) -> None:
    """The real loop, with a draft that is right with a probability by position, on the programmed clock."""
    from edgewright.speculative import DraftModel, Sampler, decode, plain

    prober, clock = probed
    rates = (0.9, 0.6, 0.8, 0.5, 0.7)
    costs = costs_of([prober.round({"rounds": 3})], 0)
    prober.target.context_length = prober.drafts[0].context_length = 10**9
    prober.target.inner.context_length = prober.drafts[0].inner.context_length = 10**9  # type: ignore[misc]
    chance = np.random.default_rng(3)
    sampler = Sampler()

    class Sometimes(DraftModel):
        def propose(self, count: int) -> Any:
            proposal = super().propose(count)
            right = chance.random(len(proposal.tokens)) < np.array(rates[: len(proposal.tokens)])
            wrong = [token if kept else (token + 1) % 50 for token, kept in zip(proposal.tokens, right, strict=True)]
            return type(proposal)(wrong, None)

    prober.drafts[0].shift = 0
    start = clock.now
    decoded = decode(
        prober.target, Sometimes(prober.drafts[0], sampler), [0], max_new_tokens=8000, gamma=gamma, sampler=sampler,
        stop_at_eos=False,
    )  # fmt: skip
    seconds = clock.now - start
    start = clock.now
    plain(prober.target, [0], max_new_tokens=500, sampler=sampler, stop_at_eos=False)
    measured = (clock.now - start) / 500 * 8000 / seconds
    assert decoded.counts.by_position == pytest.approx(rates[:gamma], abs=0.05)
    by_position = [float(each or 0) for each in decoded.counts.by_position]
    assert predict(costs, by_position, gamma).speedup == pytest.approx(measured, rel=0.01)


def test_a_script_only_raises_its_own_tokens() -> None:
    clock = Clock()
    inner = Programmed(clock, target_cost)
    session = Scripted(inner, [7] * 20, shift=0, clock=clock)
    assert (session.length, inner.length, session.context_length) == (0, 20, 492)
    rows = session.append([1, 2, 3], "all")
    assert rows is not None and list(rows.argmax(axis=1)) == [session.scripted(position) for position in (1, 2, 3)]
    assert (rows[:, 11] == 5.0).all() and (np.sort(rows, axis=1)[:, :-2] == 0).all() and rows.max() == FORCED
    session.rewind(0)
    assert inner.tokens == [7] * 20  # the context stays
    last = session.append([4, 4], "last")
    assert last is not None and int(last[0].argmax()) == session.scripted(2)
    assert session.calls.append == [(3, pytest.approx(1.4)), (2, pytest.approx(1.2))]


def opened(**changes: dict[str, Any]) -> Prober:
    """A prober that has opened a target and a draft of 50 tokens, with attributes changed."""
    clock = Clock()
    made = {name: Programmed(clock, target_cost) for name in ("target", "draft")}
    for name, attributes in changes.items():
        for attribute, value in attributes.items():
            setattr(made[name], attribute, value)
    prober = Prober(lambda path, threads, shares_cores: made[str(path)], clock)
    prober.open({"target": "target", "drafts": ["draft"], "threads": 1, "context": 256})
    return prober


STUCK = Capabilities(logits=True, rewind=False, fp32_compute=True)
MUTE = Capabilities(logits=False, rewind=True, fp32_compute=True)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"target": {"capabilities": STUCK}}, "EW-802", "target cannot be used"),
        ({"draft": {"capabilities": MUTE}}, "EW-802", "draft cannot be used"),
        ({"draft": {"vocab_size": 51}}, "EW-865", "different vocabularies"),
        ({"target": {"context_length": 100}}, "EW-867", "too short"),
    ],
)
def test_files_that_cannot_decode_speculatively(changes: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        opened(**changes)
    assert caught.value.code == code and caught.value.fix


def test_a_short_context_is_halved() -> None:
    prober = opened(draft={"context_length": 200})
    assert prober.target.inner.length == 100
    reply = prober.round({"rounds": 6})
    assert len(reply["verify"]) == LONGEST + 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("warm_up", "expected"),
    [(1e-3, (15, 6)), (0.5, (15, 6)), (2.0, (9, 5)), (5.0, (9, 2)), (10.0, (4, 2)), (99.0, (3, 2))],
)
def test_effort_fits_the_time(warm_up: float, expected: tuple[int, int]) -> None:
    assert effort(warm_up, 45.0) == expected
