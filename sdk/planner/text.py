"""A plan as text for people."""

from __future__ import annotations

from typing import Any

from edgewright import report_text as say

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
    lines.append(f"disk   {say.size(result['disk'])} of {say.size(result['disk_free'])} free")
    lines.append(f"time   {duration(result['seconds'], result['seconds_range'])}, {result['flops']:.3g} operations")
    lines += [f"note: {stage['name']}: {note}" for stage in result["stages"] for note in stage["notes"]]
    lines += ["", _verdict(result)]
    if result["advice"]:
        lines += ["", f"to make stage {result['stage']} smaller:"]
        lines += [_advice(advice) for advice in result["advice"]]
    return "\n".join(lines)


def _verdict(result: dict[str, Any]) -> str:
    device, needed = result["device"], result["memory"]["total"]
    memory = "" if device["memory"] is None else f" of its {say.size(device['memory'])}"
    what = f"{say.size(needed)}{memory} on {device['name']}, in stage {result['stage']}"
    if result["fits"]:
        return f"this fits: {what}"
    short = [] if device["memory"] is None or needed <= device["memory"] else [what]
    if result["disk"] > result["disk_free"]:
        short.append(f"{say.size(result['disk'])} of {say.size(result['disk_free'])} of free disk")
    return f"this DOES NOT FIT: {'; '.join(short)}"


def _advice(advice: dict[str, Any]) -> str:
    return f"  saves {say.size(advice['saving']):>9}  {advice['change']}  ({advice['why']})"


def duration(seconds: float | None, spread: list[float] | None) -> str:
    """Hours, minutes or seconds, and from when to when."""
    if seconds is None or spread is None:
        return "unknown"
    unit, name = next(((size, name) for size, name in ((3600, "h"), (60, "min")) if seconds >= size), (1, "s"))
    return f"{seconds / unit:.1f} {name} ({spread[0] / unit:.1f} to {spread[1] / unit:.1f})"
