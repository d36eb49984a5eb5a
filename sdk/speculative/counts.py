"""What is counted in speculative decoding, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Rounds of speculative decoding; counts of several texts can be added.

    A round is one pass of the target: it judges the drafted tokens up to the first one that it rejects, and adds one of
    its own. So the new tokens are always `accepted + rounds`. An end-of-text token that was drafted and accepted is the
    round's own token: it ends the text, and nothing follows that the target could add.

    AR = accepted / drafted, tau = (accepted + rounds) / rounds = 1 + AR * drafted / rounds. In FastDraft
    (arXiv:2411.11055) every round has gamma drafts; here some may have fewer: at the end of a text, where the draft's
    context is full, and where prompt lookup finds nothing. `gamma` is therefore the mean.
    """

    drafted: int = 0
    """Tokens proposed."""
    accepted: int = 0
    """Tokens of them that are in the text."""
    rounds: int = 0
    """Passes of the target."""
    tried: list[int] = field(default_factory=list)
    """By position in the draft: how often it was reached, all before it having been accepted."""
    kept: list[int] = field(default_factory=list)
    """By position: how often it was accepted then."""

    def add_round(self, drafted: int, accepted: int) -> None:
        """Count a round that proposed `drafted` tokens, of which the first `accepted` were accepted."""
        self.drafted += drafted
        self.accepted += accepted
        self.rounds += 1
        missing = drafted - len(self.tried)
        if missing > 0:
            self.tried += [0] * missing
            self.kept += [0] * missing
        for position in range(min(accepted + 1, drafted)):
            self.tried[position] += 1
        for position in range(accepted):
            self.kept[position] += 1

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            rounds=self.rounds + other.rounds,
            tried=_sums(self.tried, other.tried),
            kept=_sums(self.kept, other.kept),
        )

    @property
    def tokens(self) -> int:
        """New tokens, the end-of-text token included."""
        return self.accepted + self.rounds

    @property
    def gamma(self) -> float:
        """Drafted tokens per round, the mean."""
        return self.drafted / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were accepted, 0 to 1; it falls with gamma. None: nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def agreement(self) -> float | None:
        """Share accepted of the drafted tokens that the target looked at, 0 to 1: those behind a rejected one do not
        count. None where positions are not told."""
        return sum(self.kept) / sum(self.tried) if sum(self.tried) else None

    @property
    def block_efficiency(self) -> float | None:
        """tau: new tokens per pass of the target, at most gamma + 1. None without a round."""
        return self.tokens / self.rounds if self.rounds else None

    @property
    def by_position(self) -> list[float | None]:
        """For each position the share accepted where all positions before it were; None where that never was so.

        b_1, b_2, ... of tau = 1 + b_1 + b_1 b_2 + ...
        """
        return [kept / tried if tried else None for kept, tried in zip(self.kept, self.tried, strict=True)]

    def mbsu(self, cost_ratio: float) -> float | None:
        """Memory-bound speed-up tau / (c gamma + 1), where c is what one draft pass costs in passes of the target."""
        tau = self.block_efficiency
        return None if tau is None else tau / (cost_ratio * self.gamma + 1)


def _sums(left: list[int], right: list[int]) -> list[int]:
    length = max(len(left), len(right))
    padded = ([*each, *[0] * (length - len(each))] for each in (left, right))
    return [one + other for one, other in zip(*padded, strict=True)]
