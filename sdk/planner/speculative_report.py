"""Will a draft pay? What the probe measured, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgewright.compress.draft_record import read_draft_record
from edgewright.planner.speculative import (
    HIGH,
    LOW,
    Costs,
    Needed,
    Prediction,
    Times,
    best_gamma,
    needed_acceptance,
    predict,
)

if TYPE_CHECKING:
    from edgewright.plan import Plan
    from edgewright.planner.draft_cost import DraftFit
    from edgewright.planner.speculative_files import Skipped, TargetFile

WANTED = (1.0, 1.2, 1.5)
"""Speed-ups whose acceptance is told."""
EXPECTED = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Acceptances whose speed-up is told."""
SURE = 0.3
"""Acceptance that hardly any trained draft stays below: FastDraft's lowest is 0.23 of three drafted tokens, which is
0.44 at each position."""
RARE = 0.95
"""Acceptance that hardly any draft goes beyond."""

Answer = Literal["yes", "no", "above"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft for one file of the target, and what it costs there.

    Args:
        kind: `random`, `recipe` or `given`: measured; `fitted`: between those that were.
        layers, hidden_size, parameters, read: as in `speculative_files.DraftFile`.
    """

    kind: str
    layers: int | None
    hidden_size: int | None
    parameters: int | None
    read: int | None
    costs: Costs

    @property
    def name(self) -> str:
        """`1 layer of 64`."""
        if self.kind == "given" or self.layers is None:
            return "the draft"
        return f"{self.layers} layer{'s' if self.layers > 1 else ''} of {self.hidden_size}"

    @property
    def known(self) -> bool:
        """Whether it is a draft that there is or will be, and not one of several to choose from."""
        return self.kind in ("given", "recipe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A file of the target with its drafts."""

    file: TargetFile
    context: int
    drafts: tuple[Draft, ...]
    fit: DraftFit | None
    """None where fewer than three sizes were measured."""

    @property
    def step(self) -> Times:
        """Seconds of a plain step, by repeat."""
        return self.drafts[0].costs.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer, for the best of all files and drafts that were probed, against the fastest plain file.

    Args:
        answer: `yes`, `no`, or `above`: only above an acceptance.
        probed, draft: of which it holds.
        needed: to be as fast as the fastest plain file.
        prediction: against that file, where an acceptance is known.
    """

    answer: Answer
    probed: Probed
    draft: Draft
    needed: Needed
    prediction: Prediction | None

    def to_json(self) -> dict[str, object]:
        return {
            "answer": self.answer,
            "to": self.probed.file.to,
            "quant": self.probed.file.quant,
            "draft": self.draft.name,
            "needed": self.needed.to_json(),
            "prediction": None if self.prediction is None else self.prediction.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativePlan:
    """What `plan --speculative` found.

    Args:
        acceptance: by position, each given that those before were accepted; the last one holds for all that follow.
            Empty: not known.
        source: where it comes from: `given`, or `draft.json`.
        gamma: the length of drafts that was asked for; None: the best each time.
        recipe: the plan of the recipe that was given in the place of a target.
    """

    target: Path
    machine: dict[str, object]
    threads: int
    repeats: int
    files: tuple[Probed, ...]
    skipped: tuple[Skipped, ...]
    acceptance: tuple[float, ...]
    source: str | None
    gamma: int | None
    warnings: tuple[str, ...]
    recipe: Plan | None = None

    @property
    def fastest(self) -> Probed:
        """The file that is fastest without a draft."""
        return min(self.files, key=lambda probed: statistics.median(probed.step))

    def predicted(self, draft: Draft, acceptance: Sequence[float], *, plain: Times | None = None) -> Prediction:
        """At the length that was asked for, or the best."""
        rates = [*acceptance, *[acceptance[-1]] * (draft.costs.longest - len(acceptance))]
        if self.gamma is not None:
            return predict(draft.costs, rates, self.gamma, plain=plain)
        return best_gamma(draft.costs, rates, plain=plain)

    @property
    def verdict(self) -> Verdict:
        """The best that there is: by its prediction where an acceptance is known, else by the acceptance it needs."""
        plain = self.fastest.step
        every = [
            (probed, draft) for probed in self.files for draft in probed.drafts if draft.known or not self.acceptance
        ]
        found = [
            (
                probed,
                draft,
                needed_acceptance(draft.costs, 1.0, gamma=self.gamma, plain=plain),
                self.predicted(draft, self.acceptance, plain=plain) if self.acceptance else None,
            )
            for probed, draft in every
        ]

        def rank(each: tuple[Probed, Draft, Needed, Prediction | None]) -> tuple[float, float]:
            _, draft, needed, prediction = each
            most = self.predicted(draft, (1.0,), plain=plain).speedup
            if prediction is not None:
                return -prediction.speedup, -most
            return (2.0 if needed.acceptance is None else needed.acceptance), -most

        probed, draft, needed, prediction = min(found, key=rank)
        return Verdict(
            answer=_answer(needed, prediction), probed=probed, draft=draft, needed=needed, prediction=prediction
        )

    def to_json(self) -> dict[str, object]:
        plan: dict[str, object] = {"schema_version": 1} if self.recipe is None else self.recipe.to_json()
        return {**plan, "speculative": self.section()}

    def section(self) -> dict[str, object]:
        """The object `speculative` of `plan --json`."""
        return {
            "target": str(self.target),
            "machine": self.machine,
            "threads": self.threads,
            "repeats": self.repeats,
            "gamma": self.gamma,
            "acceptance": list(self.acceptance) or None,
            "acceptance_source": self.source,
            "verdict": self.verdict.to_json(),
            "files": [self._file(probed) for probed in self.files],
            "skipped": [{"name": each.name, "reason": each.reason} for each in self.skipped],
            "warnings": list(self.warnings),
        }

    def _file(self, probed: Probed) -> dict[str, object]:
        costs = probed.drafts[0].costs
        milliseconds = 1000 * np.asarray(costs.step)
        return {
            "to": probed.file.to,
            "quant": probed.file.quant,
            "bytes": probed.file.bytes,
            "bytes_per_token": probed.file.read,
            "context": probed.context,
            "fastest": probed is self.fastest,
            "tokens_per_s": 1000 / float(np.median(milliseconds)),
            "step_ms": float(np.median(milliseconds)),
            "step_ms_range": _range(milliseconds),
            "verify": [_median_ratio(each, costs.verify[0]) for each in costs.verify],
            "verify_range": [_range(np.asarray(each) / np.asarray(costs.verify[0])) for each in costs.verify],
            "loop_ms": [1000 * statistics.median(each) for each in costs.loop],
            "fit": None if probed.fit is None else probed.fit.to_json(),
            "drafts": [self._draft(draft) for draft in probed.drafts],
        }

    def _draft(self, draft: Draft) -> dict[str, object]:
        costs, plain = draft.costs, self.fastest.step
        ratio = np.asarray(costs.draft) / np.asarray(costs.verify[0])

        def needed(against: Times | None) -> dict[str, object]:
            each = {wanted: needed_acceptance(costs, wanted, gamma=self.gamma, plain=against) for wanted in WANTED}
            return {f"{wanted:g}": found.to_json() for wanted, found in each.items()}

        def both(acceptance: Sequence[float]) -> dict[str, object]:
            own = self.predicted(draft, acceptance).to_json()
            return {**own, "against_fastest": self.predicted(draft, acceptance, plain=plain).to_json()}

        return {
            "kind": draft.kind,
            "name": draft.name,
            "layers": draft.layers,
            "hidden_size": draft.hidden_size,
            "parameters": draft.parameters,
            "bytes_per_token": draft.read,
            "step_ms": 1000 * statistics.median(costs.draft),
            "cost_ratio": float(np.median(ratio)),
            "cost_ratio_range": _range(ratio),
            "catch_up_ms": 1000 * statistics.median(costs.catch_up),
            "undo_ms": 1000 * statistics.median(costs.undo),
            "needed": {**needed(None), "against_fastest": needed(plain)},
            "expected": [{"acceptance": each, **both((each,))} for each in EXPECTED],
            "prediction": both(self.acceptance) if self.acceptance and draft.known else None,
        }


def _answer(needed: Needed, prediction: Prediction | None) -> Answer:
    if prediction is not None:
        return "yes" if prediction.speedup > 1 else "no"
    if needed.acceptance is None or needed.acceptance > RARE:
        return "no"
    return "yes" if needed.acceptance <= SURE else "above"


def acceptance_of(draft: Path, target: Path) -> tuple[tuple[float, ...], str | None]:
    """What `draft.json` beside a finished draft says of greedy decoding, which the loop's predictions are for.

    Args:
        target: a model directory, or what was exported.

    Returns:
        The first position's acceptance, to which later ones are taken to be alike; nothing where there is none, or
        where it is that of another target, which is then said.

    Raises:
        BadInput: EW-864, it says what cannot be.
    """
    record = read_draft_record(draft)
    if record is None or record.agreement is None:
        return (), None
    if record.of_another(target):
        return (), (
            f"draft.json says {record.agreement:.3f}, but of another target than this one: its acceptance here is not "
            "known; measure it with `edgewright speculate`, and give --acceptance"
        )
    return (record.agreement,), None


def _range(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, (LOW, HIGH))]


def _median_ratio(one: Times, other: Times) -> float:
    return float(np.median(np.asarray(one) / np.asarray(other)))
