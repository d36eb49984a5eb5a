"""What every benchmark prints: the command, the commit, the machine; medians of interleaved repeats and their ratio."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgewright.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent


def header() -> None:
    """Command, commit and machine."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout
    machine = describe_machine()
    packages = machine["packages"]
    assert isinstance(packages, dict)
    script = os.path.relpath(sys.argv[0], ROOT)
    print(f"command: python {script} {' '.join(sys.argv[1:])}".rstrip() + f"   commit: {commit.strip()}")
    print(
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['os']}, python {machine['python']}, "
        f"torch {packages.get('torch')}, load {os.getloadavg()[0]:.1f}"
    )


def worker(script: str, *arguments: str) -> dict[str, Any]:
    """Run `script` in a process of its own; its last line of output is a JSON object of figures."""
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{result.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def interleaved(
    names: Sequence[str], measure: Callable[[str], dict[str, float]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Measure A B C, A B C, ...; all values by name and figure."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for _ in range(repeats):
        for name in names:
            for figure, value in measure(name).items():
                values[name].setdefault(figure, []).append(value)
    return values


def median_line(values: Sequence[float], unit: str, digits: int = 0) -> str:
    """`median [min - max] unit`."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f} - {high:,.{digits}f}] {unit}"
