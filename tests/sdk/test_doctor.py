"""`doctor`: each library is tried in a process of its own; what is broken is named with the line that repairs it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from edgewright import doctor as doctor_module
from edgewright.doctor import doctor
from edgewright.doctor_probes import PROBES, Probe


def finish(code: int, out: str = "", err: str = "") -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda command, **_: subprocess.CompletedProcess(command, code, out, err)


def probe(*, extra: str | None = None, package: str = "json") -> Probe:
    return Probe(name="thing", packages=(package,), extra=extra, run=lambda: "1.0")


def diagnose(monkeypatch: pytest.MonkeyPatch, tried: Probe, process: Callable[..., object]) -> doctor_module.Diagnosis:
    monkeypatch.setattr("edgewright.doctor.PROBES", (tried,))
    monkeypatch.setattr("edgewright.doctor.subprocess.run", process)
    return doctor()


def test_what_works_is_said_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = diagnose(monkeypatch, probe(), finish(0, "1.0"))
    found = {check.name: check for check in diagnosis.checks}
    assert (found["thing"].status, found["thing"].found, found["thing"].fix) == ("ok", "1.0", None)
    assert {"python", "compiler", "threads", "memory", "disk"} <= found.keys()
    assert diagnosis.healthy
    shown = json.loads(json.dumps(diagnosis.to_json()))
    assert shown["schema_version"] == 1 and shown["healthy"] is True and shown["machine"]["cores"] >= 1


def test_a_missing_extra_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = diagnose(monkeypatch, probe(extra="genai", package="no_such_package"), finish(0))
    found = next(check for check in diagnosis.checks if check.name == "thing")
    assert found.status == "missing" and diagnosis.healthy
    assert found.fix is not None and "edgewright[genai]" in found.fix and "pip install" in found.fix


def test_a_missing_requirement_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = diagnose(monkeypatch, probe(package="no_such_package"), finish(0))
    assert not diagnosis.healthy


@pytest.mark.parametrize(
    ("process", "words"),
    [
        (finish(1, err="Traceback ...\nImportError: libx.so is missing\n"), "ImportError: libx.so is missing"),
        (finish(-4), "it crashes (SIGILL)"),
        (finish(3), "exit code 3"),
    ],
)
def test_what_breaks_is_said_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, process: Callable[..., object], words: str
) -> None:
    diagnosis = diagnose(monkeypatch, probe(extra="genai"), process)
    found = next(check for check in diagnosis.checks if check.name == "thing")
    assert (found.status, found.found) == ("failed", words) and found.fix is not None
    assert diagnosis.healthy, "an extra is not required"


def test_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: object) -> object:
        raise subprocess.TimeoutExpired(command, 1)

    diagnosis = diagnose(monkeypatch, probe(), hang)
    assert not diagnosis.healthy
    assert "no answer" in next(check.found for check in diagnosis.checks if check.name == "thing")


@pytest.mark.parametrize("name", ["tokenizers", "onnxruntime", "gguf"])
def test_real_probes_find_real_libraries(name: str) -> None:
    (real,) = [probe for probe in PROBES if probe.name == name]
    finding = doctor_module._try(real)
    assert finding.status == "ok" and finding.found[0].isdigit(), finding


def test_every_extra_has_a_probe() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"dev"}
    assert {probe.extra for probe in PROBES if probe.extra} == extras
