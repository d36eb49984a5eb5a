"""`doctor`: try every library, runtime and tool on this machine, and say how to fix what does not work."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgewright._verbs import VerbModule
from edgewright.doctor_probes import COMPILER, PROBES, Probe
from edgewright.machine import available_cores, describe_machine, total_memory

SECONDS_PER_PROBE = 120
LEAST_MEMORY = 3 * 10**9
LEAST_DISK = 2 * 10**9
"""What the demo needs."""

Status = Literal["ok", "missing", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was tried.

    Args:
        name: what.
        status: `missing` is an extra that is not installed, and no fault.
        required: whether every run needs it.
        found: version or what went wrong.
        fix: command or advice, None if nothing is to be done.
    """

    name: str
    status: Status
    required: bool
    found: str
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings, and the machine."""

    checks: tuple[Finding, ...]
    machine: dict[str, object]

    @property
    def healthy(self) -> bool:
        """Whether everything works that every run needs."""
        return all(check.status == "ok" for check in self.checks if check.required)

    def to_json(self) -> dict[str, object]:
        names = ("name", "status", "required", "found", "fix")
        checks = [dict(zip(names, (c.name, c.status, c.required, c.found, c.fix), strict=True)) for c in self.checks]
        return {"schema_version": 1, "healthy": self.healthy, "checks": checks, "machine": self.machine}


def doctor() -> Diagnosis:
    """Import and exercise every library in a process of its own; look at compiler, threads, memory and disk."""
    findings = [_python(), *(_try(probe) for probe in PROBES), _compiler(), _threads(), _memory(), _disk()]
    return Diagnosis(checks=tuple(findings), machine=describe_machine())


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    status: Status = "ok" if sys.version_info >= (3, 11) else "failed"
    fix = None if status == "ok" else "make setup PYTHON=python3.12"
    return Finding(name="python", status=status, required=True, found=found, fix=fix)


def _try(probe: Probe) -> Finding:
    """Run a probe in a process of its own."""
    required = probe.extra is None
    missing = [package for package in probe.packages if importlib.util.find_spec(package) is None]
    if missing:
        status: Status = "failed" if required else "missing"
        return Finding(
            name=probe.name,
            status=status,
            required=required,
            found=f"{', '.join(missing)} not installed",
            fix=_install(probe),
        )
    command = [sys.executable, "-P", "-m", "edgewright.doctor_probes", probe.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_PER_PROBE, check=False)
    except subprocess.TimeoutExpired:
        found = f"no answer after {SECONDS_PER_PROBE} seconds"
        return Finding(name=probe.name, status="failed", required=required, found=found, fix=_install(probe))
    if done.returncode == 0:
        return Finding(name=probe.name, status="ok", required=required, found=done.stdout)
    return Finding(name=probe.name, status="failed", required=required, found=_why(done), fix=_install(probe))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it crashes ({signal.Signals(-done.returncode).name})"
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


def _install(probe: Probe) -> str:
    wanted = "edgewright" if probe.extra is None else f"edgewright[{probe.extra}]"
    return f'{sys.executable} -m pip install --upgrade "{wanted}"'


def _compiler() -> Finding:
    tried = _try(COMPILER)
    if tried.status == "ok":
        return Finding(name="compiler", status="ok", required=False, found=tried.found)
    fix = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++ (or your system's package)"
    found = f"{tried.found}; training runs without torch.compile, slower"
    return Finding(name="compiler", status="missing", required=False, found=found, fix=fix)


def _threads() -> Finding:
    return Finding(name="threads", status="ok", required=False, found=f"{available_cores()} usable cores")


def _memory() -> Finding:
    total = total_memory()
    if total is None:
        return Finding(name="memory", status="ok", required=False, found="the system does not tell")
    status: Status = "ok" if total >= LEAST_MEMORY else "failed"
    fix = None if status == "ok" else f"the demo needs {LEAST_MEMORY / 1e9:.0f} GB: use smaller batches and models"
    return Finding(name="memory", status=status, required=False, found=f"{total / 1e9:.1f} GB", fix=fix)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    status: Status = "ok" if free >= LEAST_DISK else "failed"
    fix = None if status == "ok" else f"free {(LEAST_DISK - free) / 1e9:.1f} GB, or set output_dir to another disk"
    return Finding(
        name="disk", status=status, required=False, found=f"{free / 1e9:.1f} GB free in {Path.cwd()}", fix=fix
    )


sys.modules[__name__].__class__ = VerbModule
