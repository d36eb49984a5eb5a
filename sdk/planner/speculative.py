"""What speculative decoding will win, from what its parts cost. Pure arithmetic; `speculative_probe.py` measures.

A round drafts gamma tokens, lets the target check them at once, and gives those accepted and one of the target's own.
With b_i the probability that draft i is accepted when those before it were,

    tau   = 1 + b_1 + b_1 b_2 + ... + b_1 ... b_gamma                     tokens a round
    round = gamma draft + verify(gamma + 1) + loop(gamma) + P catch_up + (1 - P) undo,    P = b_1 ... b_gamma
    S     = tau step / round

In units of the target's step this is S = tau / (c gamma + v(gamma + 1)) (Leviathan et al., arXiv 2211.17192; FastDraft,
arXiv 2411.11055), and three terms that the formula leaves out and that small models on a processor cannot: the loop
itself, the second token that a draft reads after a round of which all was accepted, and both caches cut back after one
of which not all was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgewright.errors import RecipeError

Times = tuple[float, ...]
"""Seconds, one number for each repeat of a measurement. What lies at one index was measured side by side."""

LOW, HIGH = 0.1, 0.9
"""Quantiles over the repeats that a range reaches from and to."""

GRID = np.linspace(0.0, 1.0, 1001)
"""Acceptances that are tried when one is asked for: it is found to a thousandth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the parts of plain and of speculative decoding take, in seconds (or in any one unit).

    Args:
        step: one token of plain decoding, with all that a loop does around it.
        verify: of the target, on 1, 2, 3, ... tokens with logits of all of them; so many less one is the longest draft.
        draft: one token of the draft.
        catch_up: what the draft takes longer in the round after one of which all was accepted.
        undo: what a round takes longer of which not all was accepted.
        loop: what the loop takes beside the models, for drafts of 1, 2, 3, ... tokens; nothing where it is empty.
    """

    step: Times
    verify: tuple[Times, ...]
    draft: Times
    catch_up: Times = (0.0,)
    undo: Times = (0.0,)
    loop: tuple[Times, ...] = ()

    @classmethod
    def ratios(cls, draft: float, verify: Sequence[float]) -> Costs:
        """Of the formula alone: c = `draft` and v(n) = `verify[n - 1]`, in units of the target's step."""
        return cls(step=(1.0,), verify=tuple((float(each),) for each in verify), draft=(draft,))

    @property
    def longest(self) -> int:
        """The longest draft whose check was measured."""
        return len(self.verify) - 1

    def round(self, gamma: int, all_accepted: np.ndarray | float) -> np.ndarray:
        """Seconds of a round.

        Args:
            gamma: drafted tokens.
            all_accepted: the probability that all are accepted, `[...]`.

        Returns:
            `[..., repeats]`.
        """
        share = np.asarray(all_accepted)[..., None]
        loop = np.asarray(self.loop[gamma - 1]) if self.loop else 0.0
        fixed = gamma * np.asarray(self.draft) + np.asarray(self.verify[gamma]) + loop
        return np.asarray(fixed + share * np.asarray(self.catch_up) + (1 - share) * np.asarray(self.undo))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Speed against plain decoding, and how sure that is.

    Args:
        speedup: median over the repeats of the measurement.
        low, high: their 10 % and 90 % quantiles; what acceptance may turn out to be is not in them.
        gamma: tokens drafted a round.
        tokens_per_round: tau.
    """

    speedup: float
    low: float
    high: float
    gamma: int
    tokens_per_round: float

    def to_json(self) -> dict[str, object]:
        return {
            "speedup": self.speedup,
            "speedup_range": [self.low, self.high],
            "gamma": self.gamma,
            "block_efficiency": self.tokens_per_round,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """The least acceptance, the same at every position, that reaches a speed-up.

    Args:
        acceptance: where the median speed-up does; None: not even 1 is enough.
        low, high: where the 90 % and the 10 % quantile do; None as above.
        gamma: the best there; None without.
    """

    acceptance: float | None
    low: float | None
    high: float | None
    gamma: int | None

    def to_json(self) -> dict[str, object]:
        return {"acceptance": self.acceptance, "range": [self.low, self.high], "gamma": self.gamma}


def expected_tokens(by_position: Sequence[float]) -> float:
    """Tokens a round, tau, where draft i is accepted with `by_position[i]` once those before it were.

    Raises:
        RecipeError: EW-861, a rate outside 0 to 1.
    """
    return float(1.0 + np.cumprod(check_acceptance(by_position)).sum())


def check_acceptance(by_position: Sequence[float]) -> np.ndarray:
    """The rates as float64 `[positions]`.

    Raises:
        RecipeError: EW-861, one is not from 0 to 1.
    """
    rates = np.asarray(by_position, np.float64)
    wrong = [float(rate) for rate in rates if not 0 <= rate <= 1]
    if wrong:
        raise RecipeError(
            "EW-861",
            "an acceptance is a share of the drafted tokens",
            where="acceptance",
            expected="numbers from 0 to 1",
            found=f"{wrong[0]:g}",
            fix=f"write {wrong[0] / 100:g} for {wrong[0]:g} %" if 1 < wrong[0] <= 100 else "give a share from 0 to 1",
        )
    return rates


def check_gamma(gamma: int, longest: int) -> None:
    """Refuse drafts that nothing is known about.

    Raises:
        RecipeError: EW-860.
    """
    if not 1 <= gamma <= longest:
        raise RecipeError(
            "EW-860",
            "there is no prediction for drafts of this length",
            where="gamma",
            expected=f"1 to {longest} tokens",
            found=gamma,
            fix=f"choose gamma from 1 to {longest}",
        )


def predict(costs: Costs, by_position: Sequence[float], gamma: int, *, plain: Times | None = None) -> Prediction:
    """The speed-up of drafting `gamma` tokens a round.

    Args:
        costs: what the parts take.
        by_position: the acceptance at positions 1, 2, ..., each given that those before it were accepted; those beyond
            `gamma` are not used.
        gamma: tokens drafted a round.
        plain: seconds of a step of what to compare with, where that is another file than the target itself; its
            repeats were taken in turns with those of `costs`.

    Raises:
        RecipeError: EW-860, `gamma` is not from 1 to the longest that both `costs` and `by_position` know; EW-861.
    """
    rates = check_acceptance(by_position)
    check_gamma(gamma, min(costs.longest, len(rates)))
    reached = np.cumprod(rates[:gamma])
    tokens = float(1.0 + reached.sum())
    speedups = tokens * np.asarray(costs.step if plain is None else plain) / costs.round(gamma, reached[-1])
    low, middle, high = (float(value) for value in np.quantile(speedups, (LOW, 0.5, HIGH)))
    return Prediction(speedup=middle, low=low, high=high, gamma=gamma, tokens_per_round=tokens)


def best_gamma(costs: Costs, by_position: Sequence[float], *, plain: Times | None = None) -> Prediction:
    """`predict` at the draft length with the largest median speed-up; the shortest of equals.

    Raises:
        RecipeError: as `predict`.
    """
    longest = min(costs.longest, len(by_position))
    check_gamma(1, longest)
    tried = [predict(costs, by_position, gamma, plain=plain) for gamma in range(1, longest + 1)]
    return max(tried, key=lambda prediction: prediction.speedup)


def needed_acceptance(costs: Costs, speedup: float, *, gamma: int | None = None, plain: Times | None = None) -> Needed:
    """The least acceptance with which a draft length is `speedup` times as fast as plain decoding.

    Args:
        gamma: that length; None: the best.

    Raises:
        RecipeError: EW-860.
    """
    check_gamma(1 if gamma is None else gamma, costs.longest)
    gammas = range(1, costs.longest + 1) if gamma is None else (gamma,)
    quantiles = np.stack([_quantiles(costs, gamma, plain) for gamma in gammas])  # [gamma, quantile, acceptance]
    low, middle, high = quantiles.max(axis=0)
    acceptance = _first(middle >= speedup)
    at = None if acceptance is None else int(round(acceptance * (len(GRID) - 1)))
    return Needed(
        acceptance=acceptance,
        low=_first(high >= speedup),
        high=_first(low >= speedup),
        gamma=None if at is None else gammas[int(quantiles[:, 1, at].argmax())],
    )


def _quantiles(costs: Costs, gamma: int, plain: Times | None) -> np.ndarray:
    """Low, middle and high speed-up `[3, acceptance]` at every acceptance of the grid."""
    powers = GRID[:, None] ** np.arange(1, gamma + 1)
    tokens = 1.0 + powers.sum(axis=1)
    step = np.asarray(costs.step if plain is None else plain)
    return np.quantile(tokens[:, None] * step / costs.round(gamma, powers[:, -1]), (LOW, 0.5, HIGH), axis=1)


def _first(reached: np.ndarray) -> float | None:
    """The least acceptance of the grid from which on all reach it."""
    missed = np.flatnonzero(~reached)
    start = 0 if not len(missed) else int(missed[-1]) + 1
    return None if start == len(GRID) else float(GRID[start])
