"""How wrong plans have been: those of earlier runs, in this run's directory and in the directories beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.errors import BadInput
from edgewright.planner.record import PLAN, Compared, compare, read_plan
from edgewright.run_directory import MARKER

if TYPE_CHECKING:
    from edgewright.planner.devices import Device

SMALLEST = 128 * 2**20
"""Bytes of the smallest stage whose memory says something of the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastError:
    """How far predictions of one kind were from what was measured; above 0 where the plan said too much.

    Args:
        count: how many there are.
        median, low, high: of the errors, as shares of what was measured.
    """

    count: int
    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        return {"count": self.count, "median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class PastErrors:
    """Of all kinds of predictions that earlier runs can be asked about.

    Args:
        kinds: by `memory`, `seconds, probe`, `seconds, table` and `disk`.
        runs: directories that they are from.
        unreadable: directories whose records cannot be understood.
    """

    kinds: dict[str, PastError]
    runs: int
    unreadable: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {
            **{kind: error.to_json() for kind, error in self.kinds.items()},
            "runs": self.runs,
            "unreadable": [str(path) for path in self.unreadable],
        }


def past(run_directory: Path, device: Device) -> PastErrors:
    """The errors of all runs on that device, in a run's directory and beside it.

    Predictions are left out whose settings the run then changed (a smaller micro-batch, other threads): those were
    of another step. So is the memory of stages that take less than `SMALLEST`, where a process's own decides.
    """
    found: dict[str, list[float]] = {}
    runs, unreadable = 0, []
    for directory in _runs(run_directory):
        try:
            planned = read_plan(directory)
            compared = compare(directory)
        except BadInput:
            unreadable.append(directory)
            continue
        if planned is None or planned.device is None or planned.device.name != device.name:
            continue
        errors = [(_kind(each), each.error) for each in compared if _counts(each) and each.error is not None]
        runs += bool(errors)
        for kind, error in errors:
            found.setdefault(kind, []).append(error)
    return PastErrors(
        kinds={kind: _summed(found[kind]) for kind in sorted(found)}, runs=runs, unreadable=tuple(unreadable)
    )


def _runs(run_directory: Path) -> Iterator[Path]:
    """The run directory and those beside it that have a plan."""
    beside = run_directory.absolute().parent
    for directory in sorted(beside.iterdir()) if beside.is_dir() else []:
        if (directory / MARKER).is_file() and (directory / PLAN).is_file():
            yield directory


def _counts(compared: Compared) -> bool:
    small = compared.what == "memory" and compared.measured is not None and compared.measured < SMALLEST
    return not (compared.changed or small)


def _kind(compared: Compared) -> str:
    return f"seconds, {compared.source}" if compared.what == "seconds" else compared.what


def _summed(errors: Sequence[float]) -> PastError:
    return PastError(count=len(errors), median=statistics.median(errors), low=min(errors), high=max(errors))
