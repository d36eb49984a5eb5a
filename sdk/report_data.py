"""Reads a run directory: what was measured, what was trained, from what recipe, on which machine.

A run that is still going, or stopped half way, has only a part of its files: every part is read if it is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edgewright.bench_pack import read_result
from edgewright.errors import BadInput
from edgewright.inventory import describe_model
from edgewright.planner.record import Compared, compare, read_plan

RESULTS = "results.json"
DEVICES = "devices"
"""Folder of a run with what packs measured on other devices (`bench_pack.py`)."""
SCHEMA_VERSION = 1


def _finite(value: object) -> object:
    """Not a number and infinity count as not measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _half_width(value: object) -> object:
    """Half the width of an interval that is given as (low, high), or as its half width already."""
    return (value[1] - value[0]) / 2 if isinstance(value, list | tuple) and len(value) == 2 else value


Number = Annotated[float | None, BeforeValidator(_finite)]
HalfWidth = Annotated[float | None, BeforeValidator(_half_width), BeforeValidator(_finite)]


class Part(BaseModel):
    """A part of `results.json`; what this version does not know is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ArtifactResult(Part):
    """One exported file or folder, and all that was measured on it; None = not measured."""

    name: str
    """The recipe's; else the last part of the path."""
    path: str
    """Relative to the run directory."""
    model: str | None = None
    """The checkpoint that it was made from, by name."""
    to: str
    quant: str | None = None
    bytes: int | None = None
    bits_per_byte: Number = None
    bits_per_byte_ci: HalfWidth = None
    """Half the width of the 95 % interval."""
    kl: Number = None
    kl_ci: HalfWidth = None
    kl_limit: Number = None
    """What the gate allows."""
    kl_weights: Number = None
    """Of the KL what the width costs, computed in float32."""
    kl_runtime: Number = None
    """What the runtime adds to that."""
    perplexity_ratio: Number = None
    """On the gate's real text, over the checkpoint's."""
    max_abs_diff: Number = None
    top1_agreement: Number = None
    """Share of positions, 0 to 1."""
    greedy_identity: bool | float | None = None
    lattice_identity: bool | str | None = None
    ttft_ms: Number = None
    prompt_tokens_per_s: Number = None
    prompt_tokens_per_s_sd: Number = None
    tokens_per_s: Number = None
    tokens_per_s_sd: Number = None
    peak_memory: int | None = None
    baseline_memory: int | None = None
    gate: str | None = None
    reasons: tuple[str, ...] = ()
    fallbacks: tuple[dict[str, object], ...] = ()
    """Tensors that are stored wider than asked: `{tensor, quant, reason}`."""

    @model_validator(mode="before")
    @classmethod
    def _name_from_path(cls, value: object) -> object:
        if isinstance(value, dict) and "name" not in value and isinstance(value.get("path"), str):
            return {**value, "name": PurePath(value["path"]).name}
        return value


class CheckpointResult(Part):
    """A trained (or given) checkpoint, measured in torch."""

    name: str
    path: str | None = None
    bits_per_byte: Number = None
    ci95: HalfWidth = None
    bytes: int | None = None
    parameters: int | None = None


class SampleResult(Part):
    """What one file wrote after a prompt."""

    artifact: str
    prompt: str
    text: str


class StageResult(Part):
    """The sums of one finished stage."""

    name: str
    steps: int | None = None
    tokens: int | None = None
    seconds: Number = None
    methods: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What each method changed, in numbers."""
    draft: dict[str, Any] | None = None
    """What `draft.json` says, of a stage that aligned a draft."""


class Results(Part):
    """`results.json`, as `run` writes it."""

    schema_version: int = SCHEMA_VERSION
    name: str | None = None
    machine: dict[str, object] = Field(default_factory=dict)
    artifacts: tuple[ArtifactResult, ...] = ()
    checkpoints: tuple[CheckpointResult, ...] = ()
    samples: tuple[SampleResult, ...] = ()
    warnings: tuple[str, ...] = ()
    data: dict[str, object] = Field(default_factory=dict)
    stages: tuple[StageResult, ...] = ()
    commands: dict[str, str] = Field(default_factory=dict)
    """By kind of number (`evaluate`, `verify`, `bench`): the command that measured it, if it was another than usual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One stage's curve: its measurements by step, from `metrics.jsonl`."""

    name: str
    done: bool
    steps: list[int]
    loss: list[float]
    """Training loss of the stage's objective, nats per token, for each of `steps`."""
    evaluated_steps: list[int]
    bits_per_byte: list[float]
    """On held-out text, for each of `evaluated_steps`."""
    teacher_bits_per_byte: float | None
    """The teacher's, on the same text; None where there is no teacher."""
    tokens: int | None
    seconds: float | None
    last_step: int
    total_steps: int | None
    memory: int | None
    """The most bytes that a step saw in use."""
    events: list[dict[str, object]]
    unreadable_lines: int
    methods: dict[str, dict[str, float]]
    """What each method changed, in numbers; empty until the run is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run directory, read."""

    directory: Path
    name: str
    finished: bool
    results: Results
    stages: list[StageRecord]
    recipe_text: str | None
    recipe: dict[str, object]
    environment: dict[str, object]
    compared: tuple[Compared, ...] = ()
    """What was planned of the run, each with what came of it."""
    devices: list[dict[str, Any]] = field(default_factory=list)
    """Results of other devices, by their names."""
    problems: list[str] = field(default_factory=list)
    """What could not be read; the page says so."""


def read_run(directory: Path) -> RunRecord:
    """Read what is there of a run.

    Raises:
        BadInput: EW-392 when it is no run directory, EW-393 when a file of it cannot be understood.
    """
    if not directory.is_dir():
        fix = "start one: edgewright run RECIPE"
        raise BadInput("EW-392", "there is no such run directory", where=directory, fix=fix)
    recipe_file = directory / "recipe.resolved.yaml"
    if not any(path.exists() for path in (recipe_file, directory / RESULTS, directory / "stages")):
        raise BadInput(
            "EW-392",
            "this is no run directory",
            where=directory,
            expected=f"recipe.resolved.yaml, stages/ or {RESULTS}",
            found=", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing",
            fix="give the directory that `edgewright run` wrote to",
        )
    recipe_text = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else None
    recipe = _parse_recipe(recipe_file, recipe_text) if recipe_text is not None else {}
    finished = (directory / RESULTS).is_file()
    results = _read_results(directory / RESULTS) if finished else Results(artifacts=tuple(_exported(directory)))
    stages = _read_stages(directory, recipe, results)
    return RunRecord(
        directory=directory,
        name=str(results.name or recipe.get("name") or directory.name),
        finished=finished,
        results=results,
        stages=stages,
        recipe_text=recipe_text,
        recipe=recipe,
        environment=_read_object(directory / "env.json"),
        compared=compare(directory),
        devices=[read_result(path) for path in sorted((directory / DEVICES).glob("*.json"))],
        problems=[
            f"{stage.unreadable_lines} lines of the metrics of stage {stage.name} could not be read."
            for stage in stages
            if stage.unreadable_lines
        ]
        + [f"The run was not predicted: {plan.problem}" for plan in [read_plan(directory)] if plan and plan.problem],
    )


def _read_results(path: Path) -> Results:
    value = _read_object(path)
    try:
        results = Results.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise _unreadable(path, f"{key}: {first['msg']}", f"{first['input']!r}"[:80]) from None
    if results.schema_version != SCHEMA_VERSION:
        raise _unreadable(path, f"schema_version {SCHEMA_VERSION}", results.schema_version)
    return results


def _read_object(path: Path) -> dict[str, object]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(path, "JSON", str(error)) from None
    if not isinstance(value, dict):
        raise _unreadable(path, "a JSON object", type(value).__name__)
    return value


def _unreadable(path: Path, expected: str, found: object) -> BadInput:
    return BadInput(
        "EW-393",
        "this file of the run cannot be understood",
        where=path,
        expected=expected,
        found=found,
        fix="run the recipe again: it keeps what is finished and writes this file anew",
    )


def _parse_recipe(path: Path, text: str) -> dict[str, object]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        recipe = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise _unreadable(path, "YAML", str(error).replace("\n", " ")[:200]) from None
    if not isinstance(recipe, dict):
        raise _unreadable(path, "a YAML mapping", type(recipe).__name__)
    return recipe


def _exported(directory: Path) -> Iterator[ArtifactResult]:
    """What already lies in `exports/` of a run that has no results yet."""
    files = {*directory.glob("exports/**/*.gguf"), *(p.parent for p in directory.glob("exports/**/genai_config.json"))}
    for path in sorted(file for file in files if not file.name.startswith(".")):
        known = describe_model(path)
        yield ArtifactResult(
            name=path.stem if path.is_file() else path.name,
            path=path.relative_to(directory).as_posix(),
            to=known.to,
            quant=known.quant,
            bytes=known.bytes,
            gate=known.gate,
        )


def _read_stages(directory: Path, recipe: dict[str, object], results: Results) -> list[StageRecord]:
    """Every stage that has measurements, in the recipe's order."""
    planned = recipe.get("stages")
    plans = [plan for plan in planned if isinstance(plan, dict)] if isinstance(planned, list) else []
    order = [str(plan.get("name")) for plan in plans]
    folders = {path.parent.name: path.parent for path in directory.glob("stages/*/metrics.jsonl")}
    names = [name for name in order if name in folders] + sorted(set(folders) - set(order))
    sums = {stage.name: stage for stage in results.stages}
    budgets = {str(plan.get("name")): plan.get("budget") for plan in plans}
    return [_read_stage(folders[name], sums.get(name), budgets.get(name)) for name in names]


def _read_stage(folder: Path, sums: StageResult | None, budget: object) -> StageRecord:
    lines, unreadable = _read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if _is_number(line.get("loss")) and "step" in line]
    evaluated = [line for line in lines if _is_number(line.get("eval_bits_per_byte")) and "step" in line]
    planned = budget.get("max_steps") if isinstance(budget, dict) else None
    last = steps[-1] if steps else {}
    teacher = [line["teacher_bits_per_byte"] for line in lines if _is_number(line.get("teacher_bits_per_byte"))]
    memory = [int(line["memory"]) for line in steps if _is_number(line.get("memory"))]
    return StageRecord(
        name=folder.name,
        done=(folder / "done.json").is_file(),
        steps=[int(line["step"]) for line in steps],
        loss=[float(line["loss"]) for line in steps],
        evaluated_steps=[int(line["step"]) for line in evaluated],
        bits_per_byte=[float(line["eval_bits_per_byte"]) for line in evaluated],
        teacher_bits_per_byte=float(teacher[-1]) if teacher else None,
        tokens=sums.tokens if sums and sums.tokens else last.get("tokens"),
        seconds=sums.seconds if sums and sums.seconds else _training_seconds(steps),
        last_step=int(last.get("step", 0)),
        total_steps=sums.steps if sums and sums.steps else planned,
        memory=max(memory, default=None),
        events=[line for line in lines if line.get("event", "teacher") != "teacher"],
        unreadable_lines=unreadable,
        methods=sums.methods if sums else {},
    )


def _training_seconds(steps: list[dict]) -> float | None:
    """Seconds spent in steps: each step's tokens over its rate, so that pauses between two starts do not count."""
    seconds, before = 0.0, 0
    for line in steps:
        if not (_is_number(line.get("tokens")) and _is_number(line.get("tokens_per_s")) and line["tokens_per_s"] > 0):
            return None
        seconds += (line["tokens"] - before) / line["tokens_per_s"]
        before = line["tokens"]
    return seconds if steps else None


def _read_lines(path: Path) -> tuple[list[dict], int]:
    """The objects of a JSON-lines file and the number of lines that are none.

    The last line may be cut off by a kill or be half written right now; that one is not counted.
    """
    objects, bad = [], []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts):
        try:
            value = json.loads(text)
        except ValueError:
            bad.append(number)
            continue
        if isinstance(value, dict):
            objects.append(value)
        else:
            bad.append(number)
    return objects, len([number for number in bad if number != len(texts) - 1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
