"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgewright import report_text as say

ERRORS = {
    "memory": "memory",
    "seconds, probe": "time by a probe",
    "seconds, table": "time by a table",
    "disk": "disk",
}
"""Kinds of past errors, in words."""
NAMES = {"memory": "memory", "seconds": "time", "disk": "disk"}
SOURCES = {
    "simulation": "by a simulated step",
    "probe": "by a few real steps before the run",
    "table": "by rates of a table",
    "count": "by counting",
    "unknown": "",
}
"""Where predictions come from, in words."""
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "teacher", "other", "total")


def as_text(result: dict[str, Any]) -> str:
    """The `to_json()` object of a plan."""
    from edgewright.cli_text import table

    rows = [
        (
            stage["name"],
            f"{stage['parameters']:,}",
            *(say.size(stage["memory"][part]) for part in PARTS),
            duration(stage["seconds"], stage["seconds_range"]),
        )
        for stage in result["stages"]
    ]
    lines = [table(("stage", "parameters", *PARTS, "time"), rows), ""]
    lines += _ranges(result)
    lines.append(f"disk   {say.size(result['disk'])} of {say.size(result['disk_free'])} free")
    for cache in result["caches"]:
        per_token = f"{cache['bytes_per_token']:.1f} bytes for each of {cache['tokens']:,} tokens"
        lines.append(f"cache  {cache['name']}: {say.size(cache['bytes'])}, {per_token}")
        lines += [f"note: {cache['name']}: {note}" for note in cache["notes"]]
    for each in result["written"]:
        texts = f"{each['texts']:,} texts, {each['tokens']:,} tokens"
        lines.append(f"text   {each['name']}: {say.size(each['bytes'])}, {texts} at most")
    lines.append(f"time   {duration(result['seconds'], result['seconds_range'])}, {result['flops']:.3g} operations")
    lines.append(f"past error  {past_error(result['past_error'])}")
    lines += [f"note: the records of {path} cannot be read" for path in result["past_error"]["unreadable"]]
    lines += [f"note: {stage['name']}: {note}" for stage in result["stages"] for note in stage["notes"]]
    lines += ["", _verdict(result)]
    if result["advice"]:
        lines += ["", f"to make stage {result['stage']} smaller:"]
        lines += [_advice(advice) for advice in result["advice"]]
    return "\n".join(lines)


def _verdict(result: dict[str, Any]) -> str:
    if result["stage"] is None:
        return "this fits: no stage has a model" if result["fits"] else "this DOES NOT FIT: the disk is too small"
    if result["fits"]:
        largest = next(stage for stage in result["stages"] if stage["name"] == result["stage"])
        narrow = largest["memory_limit"] is not None and largest["memory_range"][1] > largest["memory_limit"]
        return f"this fits{', but narrowly' if narrow else ''}: {_needs(largest, result['device'])}"
    short = [_needs(stage, result["device"]) for stage in result["stages"] if not stage["fits"]]
    if result["disk"] > result["disk_free"]:
        short.append(f"{say.size(result['disk'])} of {say.size(result['disk_free'])} of free disk")
    return f"this DOES NOT FIT: {'; '.join(short)}"


def _needs(stage: dict[str, Any], device: dict[str, Any]) -> str:
    limit = "" if stage["memory_limit"] is None else f" of {say.size(stage['memory_limit'])}"
    return f"{say.size(stage['memory']['total'])}{limit} on {device['name']}, in stage {stage['name']}"


def _advice(advice: dict[str, Any]) -> str:
    return f"  saves {say.size(advice['saving']):>9}  {advice['change']}  ({advice['why']})"


def _ranges(result: dict[str, Any]) -> Iterator[str]:
    if result["stage"] is None:
        return
    total, (low, high) = say.size(result["memory"]["total"]), (say.size(size) for size in result["memory_range"])
    yield f"memory {total} ({low} to {high}) in stage {result['stage']}, which needs most"


def past_error(errors: dict[str, Any]) -> str:
    """How wrong plans of earlier runs were, in a line."""
    kinds = [f"{words} {_error(errors[kind])}" for kind, words in ERRORS.items() if kind in errors]
    if not kinds:
        return "unknown: no run of this directory, or beside it, has been held against its plan yet"
    runs = "1 earlier run" if errors["runs"] == 1 else f"{errors['runs']} earlier runs"
    return f"{'; '.join(kinds)}: of what {runs} measured, + where the plan said too much"


def _error(error: dict[str, Any]) -> str:
    median = percent(error["median"])
    if error["count"] == 1:
        return median
    return f"{median} ({percent(error['low'])} to {percent(error['high'])} in {error['count']} stages)"


def percent(error: float) -> str:
    """A signed share: +4 %."""
    return f"{say.signed(100 * error, 0)} %"


def duration(seconds: float | None, spread: list[float] | None) -> str:
    """Hours, minutes or seconds, and from when to when."""
    if seconds is None or spread is None:
        return "unknown"
    unit, name = next(((size, name) for size, name in ((3600, "h"), (60, "min")) if seconds >= size), (1, "s"))
    return f"{seconds / unit:.1f} {name} ({spread[0] / unit:.1f} to {spread[1] / unit:.1f})"


def compared_lines(directory: Path) -> Iterator[str]:
    """Of every prediction of a run that there is a measurement of: both, and how far they are apart."""
    from edgewright.planner.record import compare

    for each in compare(directory):
        if each.error is None:
            continue
        measured, predicted = (amount(each.what, value) for value in (each.measured, each.predicted))
        where = "disk" if each.stage is None else f"{each.stage}: {NAMES[each.what]}"
        changed = f"; planned with {settings(each.changed)}" if each.changed else ""
        yield f"{where} {measured}, predicted {predicted} ({percent(each.error)}){changed}"


def amount(what: str, value: float | None) -> str:
    """Bytes or seconds."""
    return say.duration(value) if what == "seconds" else say.size(value)


def settings(changed: dict[str, tuple[object, object]]) -> str:
    """Decisions that a run took otherwise than its plan: `micro_batch 8, then 4`."""
    return ", ".join(f"{name} {planned}, then {taken}" for name, (planned, taken) in changed.items())
