"""How tokens are chosen, by target and draft alike, and the rule that makes a draft's tokens the target's own.

Speculative sampling (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318): a token x that was drawn from
q is accepted with probability min(1, p(x) / q(x)); where it is not, the token comes from max(0, p - q), normalized.
What comes out is distributed as p, whatever q is, as long as x was drawn from it. p is the target's distribution after
temperature, top-k and top-p; the draft's is cut the same way, or else q would propose what p excludes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgewright.errors import RecipeError

ROUNDING = 1e-12
"""A residual of so little mass is rounding: p and q are the same, and the token is drawn from p."""
_LIKELY = 256
"""Tokens that top-p sorts at first; all of them only where these do not suffice."""


class Sampler:
    """Chooses tokens from logits.

    Args:
        temperature: 0 is greedy, and then the other settings do nothing.
        top_k: keep the k most likely tokens, and those as likely as the last of them; 0 keeps all.
        top_p: then keep the fewest tokens whose mass reaches top_p; 1 keeps all.
        seed: of the draws.

    Raises:
        RecipeError: EW-801, a setting that makes no sense.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> None:
        _check(0 <= temperature < math.inf, "temperature", "0 (greedy) or more", temperature)
        _check(top_k >= 0, "top_k", "0 (all tokens) or more", top_k)
        _check(0 < top_p <= 1, "top_p", "above 0, at most 1", top_p)
        _check(min([seed] if isinstance(seed, int) else seed) >= 0, "seed", "0 or more", seed)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._chance = np.random.default_rng(seed)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature == 0

    def distribution(self, logits: np.ndarray) -> np.ndarray:
        """The probabilities from which a token is drawn, float64 `[vocabulary]`, of logits `[vocabulary]`.

        Temperature, then top-k, then top-p, as transformers has them. Not for a greedy sampler.

        Raises:
            FloatingPointError: logits that are NaN, or none that is finite.
        """
        peak = float(logits.max())
        if not math.isfinite(peak):
            raise FloatingPointError(f"the largest logit is {peak}")
        if 0 < self.top_k < len(logits):
            kept = (logits >= np.partition(logits, -self.top_k)[-self.top_k]).nonzero()[0]
            mass = np.zeros(len(logits))
            mass[kept] = _softmax(logits[kept], peak, self.temperature)
        else:
            mass = _softmax(logits, peak, self.temperature)
        return mass if self.top_p == 1 else _top_p(mass, self.top_p)

    def draw(self, mass: np.ndarray) -> int:
        """A token from probabilities `[vocabulary]`, which need not sum to 1; never one of probability 0."""
        reached = mass.cumsum()
        token = int(reached.searchsorted(self._chance.random() * reached[-1], side="right"))
        return token if token < len(mass) else int(mass.nonzero()[0][-1])  # the product was rounded up to the sum

    def verify(
        self, rows: np.ndarray, tokens: Sequence[int], probabilities: Sequence[np.ndarray] | None
    ) -> tuple[int, int]:
        """Judge a draft's tokens.

        Args:
            rows: the target's logits, `[len(tokens) + 1, vocabulary]`; row i predicts `tokens[i]`, the last one what
                follows them.
            tokens: what the draft proposes.
            probabilities: for each token the distribution it was drawn from, `[vocabulary]`; None where the draft chose
                without chance. Then q is one-hot, and the rule is to draw from p and to accept what is equal.

        Returns:
            How many tokens are accepted, and the token after them: the target's correction, or behind an accepted draft
            its next token.

        Raises:
            FloatingPointError: logits that are no numbers.
        """
        if self.greedy:
            return _verify_greedy(rows, tokens)
        for place, token in enumerate(tokens):
            mass = self.distribution(rows[place])
            if probabilities is None:
                drawn = self.draw(mass)
                if drawn != token:
                    return place, drawn
            elif not self._chance.random() * probabilities[place][token] < mass[token]:
                return place, self.draw(residual(mass, probabilities[place]))
        return len(tokens), self.draw(self.distribution(rows[len(tokens)]))


def best(row: np.ndarray) -> int:
    """The token of the largest of the logits `[vocabulary]`, the first where several are equal.

    Raises:
        FloatingPointError: logits that are NaN, or none that is finite.
    """
    token = int(row.argmax())
    if not math.isfinite(row[token]):
        raise FloatingPointError(f"the largest logit is {row[token]}")
    return token


def residual(mass: np.ndarray, drafted: np.ndarray) -> np.ndarray:
    """What a rejected token is replaced from, not normalized: max(0, p - q) `[vocabulary]`; p where that is nothing.

    transformers divides by 0 there.
    """
    rest: np.ndarray = np.maximum(mass - drafted, 0)
    return rest if rest.sum() > ROUNDING else mass


def _verify_greedy(rows: np.ndarray, tokens: Sequence[int]) -> tuple[int, int]:
    chosen: list[int] = rows.argmax(axis=1).tolist()
    place = 0
    while place < len(tokens) and chosen[place] == tokens[place]:
        place += 1
    if not math.isfinite(rows[place, chosen[place]]):
        raise FloatingPointError(f"the largest logit is {rows[place, chosen[place]]}")
    return place, chosen[place]


def _softmax(logits: np.ndarray, peak: float, temperature: float) -> np.ndarray:
    """float64, in one array: at this size of vocabularies a second one costs as much as the arithmetic."""
    mass: np.ndarray = logits.astype(np.float64)
    mass -= peak
    if temperature != 1:
        mass *= 1 / temperature
    np.exp(mass, out=mass)
    mass *= 1 / mass.sum()
    return mass


def _top_p(mass: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest tokens that reach the mass, normalized."""
    for count in (min(_LIKELY, len(mass)), len(mass)):
        likely = np.argpartition(mass, -count)[-count:]
        order = likely[np.argsort(-mass[likely], kind="stable")]
        reached = mass[order].cumsum()
        if reached[-1] >= top_p:
            break
    # The token that reaches top_p is in, and so is the first, whatever rounding makes of their sum.
    kept = order[: int(reached.searchsorted(top_p)) + 1]
    cut = np.zeros_like(mass)
    cut[kept] = mass[kept]
    return cut / cut.sum()


def _check(right: bool, name: str, expected: str, found: object) -> None:
    if not right:
        raise RecipeError("EW-801", f"{name} makes no sense", expected=expected, found=found)
