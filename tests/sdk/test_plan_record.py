"""The plan that a run keeps, what it is held against, and how wrong plans are said to have been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_recipe

from edgewright.errors import BadInput
from edgewright.plan import Plan, plan, predicted
from edgewright.planner import record
from edgewright.planner.devices import CUDA_CONTEXT, find_device
from edgewright.planner.history import SMALLEST, past
from edgewright.planner.memory import COMPILER, FUSED, LIBRARIES
from edgewright.planner.probe import Probe
from edgewright.planner.record import PLAN, compare, worth_probing
from edgewright.planner.text import as_text, compared_lines
from edgewright.planner.timing import Time
from edgewright.recipe import load_recipe
from edgewright.report import report
from edgewright.run import run
from edgewright.run_directory import MARKER

PLAIN = ("stages.base.training.precision=fp32", "stages.base.training.compile=off")


def silent(line: str) -> None:
    """Nobody reads it."""


def planned(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / PLAN).read_text(encoding="utf-8"))
    return found


def test_a_run_is_held_against_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next plan says how wrong that was."""
    monkeypatch.chdir(tmp_path)
    recipe, said = write_recipe(tmp_path, ternary=True), list[str]()
    before = plan(recipe, probe=False).to_json()
    assert before["past_error"] == {"runs": 0, "unreadable": []}
    assert "past error  unknown" in as_text(before)
    directory = run(recipe, say=said.append).directory
    kept = planned(directory)
    assert kept["disk_parts"] == before["disk_parts"]
    assert [stage["memory"] for stage in kept["stages"]] == [stage["memory"] for stage in before["stages"]]
    done = json.loads((directory / "stages/student/done.json").read_text())
    assert done["peak_memory"] > 10**6
    compared = {(each.stage, each.what): each for each in compare(directory)}
    assert set(compared) == {(s, w) for s in ("base", "student") for w in ("memory", "seconds")} | {(None, "disk")}
    memory = compared["student", "memory"]
    assert (memory.measured, memory.predicted) == (done["peak_memory"], kept["stages"][1]["memory"]["total"])
    assert memory.error == pytest.approx(memory.predicted / done["peak_memory"] - 1)
    assert compared["student", "seconds"].measured == done["seconds"] and not memory.changed
    parts = [
        path for name in ("data", "exports", "stages/*/model", "stages/*/checkpoints") for path in directory.glob(name)
    ]
    left = sum(path.stat().st_size for part in parts for path in part.rglob("*") if path.is_file())
    disk = compared[None, "disk"]
    assert disk.measured is not None and left < disk.measured < 1.3 * left
    assert disk.error is not None and abs(disk.error) < 0.1
    assert any(line.startswith("student: memory ") and "predicted" in line for line in said)
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "Predicted and measured" in page and "student: memory" in page
    assert len(report(directory).to_json()["plan"]) == 5  # type: ignore[arg-type]
    errors = plan(recipe, probe=False).to_json()["past_error"]
    assert isinstance(errors, dict) and errors["runs"] == 1
    assert errors["seconds, table"]["count"] == 2 and errors["disk"]["median"] == disk.error
    assert "memory" not in errors, "so small a process says nothing of a plan"


@pytest.mark.parametrize("method", ["{type: lora, rank: 4, quantize_base: nf4}", "{type: lowrank, rank: 8}"])
def test_disk_of_what_is_written_otherwise_than_it_is_trained(tmp_path: Path, method: str) -> None:
    """Checkpoints hold adapters and a base in 4 bits, or factors; the finished model is whole and in float32."""
    sizes = "hidden_size=256", "intermediate_size=512", "num_hidden_layers=2", "num_attention_heads=4"
    small = "optimizer={type: adamw}", "budget.max_steps=2", "training.save_steps=1"
    changes = [*(f"stages.base.student.{size}" for size in sizes), *(f"stages.base.{each}" for each in small)]
    changes += [f"stages.base.methods=[{method}]", f"output_dir={tmp_path / 'run'}"]
    directory = run(write_recipe(tmp_path), *PLAIN, *changes, say=silent).directory
    used = json.loads((directory / "results.json").read_text())["disk_used"]
    for part in ("checkpoints", "spare", "models"):
        assert planned(directory)["disk_parts"][part] == pytest.approx(used[part], rel=0.06), part
    (disk,) = [each for each in compare(directory) if each.what == "disk"]
    assert disk.error is not None and abs(disk.error) < 0.06


def test_a_stage_that_has_begun_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, ternary=True)
    directory = run(recipe, *PLAIN, "stages.student.budget.max_steps=2", say=silent).directory
    kept = planned(directory)
    kept["stages"][0]["memory"]["total"] = 123
    (directory / PLAN).write_text(json.dumps(kept))
    for path in (directory / "stages/student/done.json", directory / "results.json"):
        path.unlink()
    run(recipe, *PLAIN, "stages.student.budget.max_steps=2", say=silent)
    assert planned(directory) == kept, "both stages have begun"
    import shutil

    shutil.rmtree(directory / "stages/student")
    run(recipe, *PLAIN, "stages.student.budget.max_steps=3", say=silent)
    again = planned(directory)
    assert again["stages"][0] == kept["stages"][0]
    assert (kept["stages"][1]["steps"], again["stages"][1]["steps"]) == (2, 3)
    run(recipe, *PLAIN, "stages.student.budget.max_steps=3", fresh=True, say=silent)
    assert planned(directory)["stages"][0]["memory"]["total"] != 123


def test_what_cannot_be_predicted_is_trained_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fails(*_: object) -> None:
        raise RuntimeError("this architecture looks at its data\nat length")

    monkeypatch.setattr(record, "_predict", fails)
    said = list[str]()
    result = run(write_recipe(tmp_path), "stages.base.budget.max_steps=1", say=said.append)
    assert "note: this run is not predicted: RuntimeError: this architecture looks at its data" in said
    assert compare(result.directory) == ()
    (warning,) = report(result.directory).warnings
    assert warning == "The run was not predicted: RuntimeError: this architecture looks at its data"


def test_a_probe_is_taken_where_it_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(seconds: float | None) -> Time:
        return Time(seconds=seconds, low=seconds, high=seconds, tokens_per_s=1.0, source="table")

    plain, compiled = {"compile": False}, {"compile": True}
    assert not worth_probing(takes(600.0), 1000, plain) and worth_probing(takes(1500.0), 1000, plain)
    assert not worth_probing(takes(1500.0), 1000, compiled) and worth_probing(takes(6000.0), 1000, compiled)
    assert not worth_probing(takes(1500.0), 10, plain), "five steps of ten are no probe"
    assert worth_probing(takes(None), 2000, plain) and not worth_probing(takes(None), 20, plain)

    monkeypatch.chdir(tmp_path)
    asked = list[str]()

    def probe(recipe: Path, overrides: list[str], stage: str, vocab_size: int) -> Probe:
        asked.append(stage)
        return Probe(seconds=0.5, once=2.0, memory=10**6)

    monkeypatch.setattr(record, "worth_probing", lambda *_: True)
    monkeypatch.setattr("edgewright.planner.probe.probe", probe)
    directory = run(write_recipe(tmp_path, ternary=True), "stages.student.budget.max_steps=1", say=silent).directory
    base, student = planned(directory)["stages"]
    assert asked == ["base"], "the teacher of the other is not there before the run"
    assert (base["source"], base["seconds"], student["source"]) == ("probe", 12 * 0.5 + 2.0, "table")


def made(folder: Path, name: str, *, device: str = "cpu", **measured: Any) -> Path:
    """A run directory as far as a plan is concerned."""
    directory = folder / name
    (directory / "stages/base").mkdir(parents=True)
    (directory / MARKER).touch()
    decisions = {"micro_batch": 8, "threads": 2}
    stage = {
        "name": "base",
        "memory": {"total": 10 * SMALLEST},
        "memory_range": [9 * SMALLEST, 11 * SMALLEST],
        "seconds": 100.0,
        "seconds_range": [50.0, 150.0],
        "source": measured.pop("source", "probe"),
        "decisions": decisions,
    }
    kind = "cpu" if device == "cpu" else "cuda"
    content = {"schema_version": 1, "device": {"name": device, "kind": kind}, "disk_parts": {}, "stages": [stage]}
    (directory / PLAN).write_text(json.dumps(content))
    done = {"seconds": 80.0, "peak_memory": 8 * SMALLEST, "decisions": decisions} | measured
    (directory / "stages/base/done.json").write_text(json.dumps(done))
    return directory


def test_past_errors(tmp_path: Path) -> None:
    cpu = find_device("cpu")
    here = made(tmp_path, "here")
    made(tmp_path, "beside", peak_memory=20 * SMALLEST, source="table")
    made(tmp_path, "smaller", peak_memory=SMALLEST - 1, seconds=100.0)
    made(tmp_path, "elsewhere", device="Some GPU")
    made(tmp_path, "changed", decisions={"micro_batch": 4, "threads": 2})
    (made(tmp_path, "broken") / PLAN).write_text("{")
    (made(tmp_path, "stranger") / MARKER).unlink()
    found = past(here, cpu)
    assert found.runs == 3 and [path.name for path in found.unreadable] == ["broken"]
    memory, probe, table = (found.kinds[kind] for kind in ("memory", "seconds, probe", "seconds, table"))
    assert (memory.count, memory.low, memory.high, memory.median) == (2, -0.5, 0.25, -0.125)
    assert (probe.count, probe.median, table.median) == (2, 0.125, 0.25)
    assert past(tmp_path / "not there yet", cpu) == found
    assert past(tmp_path / "nowhere" / "at all", cpu).runs == 0


def test_what_the_lines_say(tmp_path: Path) -> None:
    (line, other) = compared_lines(made(tmp_path, "changed", decisions={"micro_batch": 4, "threads": 2}))
    assert line == "base: memory 1.07 GB, predicted 1.34 GB (+25 %); planned with micro_batch 8, then 4"
    assert other.startswith("base: time 1 min 20 s, predicted 1 min 40 s (+25 %)")
    on_gpu = compare(made(tmp_path, "gpu", device="Some GPU"))[0]
    assert on_gpu.predicted == 10 * SMALLEST - CUDA_CONTEXT, "the allocator does not see the context"
    assert compare(tmp_path) == ()


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    directory = made(tmp_path, "broken")
    (directory / PLAN).write_text('{"stages": [{"name": 1}]}')
    with pytest.raises(BadInput, match="EW-393") as raised:
        report(directory)
    assert str(raised.value.where).endswith(PLAN) and "stages.0" in str(raised.value.expected)


@pytest.mark.slow
def test_a_budget_is_heeded_as_the_run_heeds_it(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    wide = "stages.base.student={type: preset, preset: llama-1m, hidden_size: 256, num_hidden_layers: 1}"
    large = [*PLAIN, wide, "data.sequence_length=512"]

    def without_advice(*overrides: str) -> Plan:
        recipe = load_recipe(path, [*large, *overrides])
        return predicted(path, recipe, find_device("cpu"), 300, lambda *_: None, advice=False)

    whole = without_advice()
    limit = round(0.9 * whole.largest.memory.total / 1e6)
    within = plan(path, *large, f"stages.base.budget={{max_steps: 12, memory: {limit}MB}}", probe=False)
    decided = within.largest.case.decisions
    assert whole.fits and within.fits and within.largest.memory.total <= limit * 10**6 < whole.largest.memory.total
    assert decided["micro_batch"] < 2 or decided["gradient_checkpointing"]
    assert any(note.startswith("budget.memory") for note in within.largest.notes)
    assert not [advice for advice in within.advice if advice.memory >= within.largest.memory.total]
    hopeless = without_advice("stages.base.budget={max_steps: 12, memory: 35MB}")
    text = as_text(hopeless.to_json())
    assert not hopeless.fits and "at the least" in text
    assert "DOES NOT FIT" in text and "of 35.0 MB on cpu, in stage base" in text


@pytest.mark.slow
def test_compiled_steps_are_within_a_range(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    compiled = plan(recipe, PLAIN[0], "stages.base.training.compile=on", probe=False)
    whole = plan(recipe, PLAIN[0], "stages.base.training.compile=off", probe=False).largest.memory
    memory, (low, high) = compiled.largest.memory, compiled.largest.memory_range
    assert memory.activations == whole.activations - int(FUSED * whole.activations) > 0
    assert memory.total == whole.total + COMPILER - int(FUSED * whole.activations)
    assert high == pytest.approx(1.15 * (whole.total + COMPILER), abs=4)
    assert low == pytest.approx(0.85 * (memory.total - LIBRARIES - FUSED * memory.logits), abs=4)
    assert "note: base: compiled steps are taken to keep half of the activations" in as_text(compiled.to_json())
