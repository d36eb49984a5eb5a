"""What a stage takes that trains nothing, measured while it goes on and kept beside what it makes: `cost.json`.

A training keeps the same in `done.json`. Seconds of a run that was killed count up to its last finished piece, those of
the one that goes on from there are added; the peak of memory is the largest of all.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from edgewright.files import write_json
from edgewright.planner.peak import PeakMemory

COST = "cost.json"


class StageCost:
    """A measurement that begins with the object.

    Args:
        directory: the stage's own.
        decisions: how it is carried out: device, precision, threads, batch.
    """

    def __init__(self, directory: Path, decisions: dict[str, Any]) -> None:
        self._path = directory / COST
        self._decisions = decisions
        before = _read(self._path)
        self._seconds: float = before.get("seconds", 0.0)
        self._memory: int | None = before.get("peak_memory")
        self._peak = PeakMemory.begin(decisions["device"])
        self._started = time.perf_counter()
        self.keep()

    def keep(self, *, done: bool = False) -> None:
        """Write down what it has taken so far."""
        now = None if self._peak is None else self._peak.bytes()
        measured = [size for size in (self._memory, now) if size is not None]
        write_json(
            self._path,
            {
                "seconds": self._seconds + time.perf_counter() - self._started,
                "peak_memory": max(measured, default=None),
                "decisions": self._decisions,
                "done": done,
            },
        )


def _read(path: Path) -> dict[str, Any]:
    """Of an earlier run that did not come to its end; empty where there is none, or it is finished or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(value, dict) and isinstance(value.get("seconds"), float) and not value.get("done")
    return value if known else {}
