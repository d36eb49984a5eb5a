"""The results of `distill.py` as a table, and its bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewright.files import write_text

Results = Sequence[dict[str, Any]]


def of_row(results: Results, row: str, key: str) -> dict[int, float]:
    """A figure of a row's runs, by seed."""
    return {result["seed"]: result[key] for result in results if result["row"] == row and key in result}


def difference(results: Results, one: str, other: str) -> list[float]:
    """Loss of one row less that of another, for the seeds that both have."""
    first, second = of_row(results, one, "loss"), of_row(results, other, "loss")
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def table(results: Results) -> str:
    """Markdown: a line for each row, means over seeds."""
    lines = ["| run | what | seeds | loss | below scratch | bytes a token | s |", "|---|---|---|---|---|---|---|"]
    for row in dict.fromkeys(result["row"] for result in results):
        losses = list(of_row(results, row, "loss").values())
        gain = difference(results, "scratch", row)
        size = list(of_row(results, row, "bytes_per_token").values())
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        what = next(result["what"] for result in results if result["row"] == row)
        seconds = statistics.mean(of_row(results, row, "seconds").values())
        cells = [
            row,
            what,
            str(len(losses)),
            f"{statistics.mean(losses):.4f}{spread}",
            f"{statistics.mean(gain):+.4f}" if gain else "",
            f"{statistics.mean(size):.1f}" if size else "",
            f"{seconds:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(results: Results) -> list[tuple[str, bool | None]]:
    """Each bar in words, and whether it is met; None where a run is missing."""
    found: list[tuple[str, bool | None]] = []
    gain = difference(results, "scratch", "online")
    mean = statistics.mean(gain) if gain else None
    found.append(
        (f"distilled is {_number(mean)} nats below scratch (bar: 0.03)", None if mean is None else mean >= 0.03)
    )
    cached, sizes = difference(results, "scratch", "sampled"), of_row(results, "sampled", "bytes_per_token").values()
    if mean and cached and sizes:
        share, size = statistics.mean(cached) / mean, statistics.mean(sizes)
        text = (
            f"sampled targets, {size:.1f} bytes a token, reach {100 * share:.0f} % of the online gain (bar: 95 %, 40)"
        )
        found.append((text, share >= 0.95 and size <= 40))
    else:
        found.append(("sampled targets: runs are missing", None))
    narrow = difference(results, "online-nf4", "online-bf16")
    worst = max(map(abs, narrow)) if narrow else None
    found.append(
        (
            f"nf4 teacher: loss within {_number(worst)} nats of bf16's (bar: 0.01)",
            None if worst is None else worst <= 0.01,
        )
    )
    kept = [
        (result["gain"]["scratch"] - result["gain"]["student"])
        / (result["gain"]["scratch"] - result["gain"]["teacher"])
        for result in results
        if "gain" in result
    ]
    share = statistics.mean(kept) if kept else None
    found.append(
        (
            f"the student keeps {_number(share)} of the ensemble's gain (bar: 0.83)",
            None if share is None else share >= 0.83,
        )
    )
    return found


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def print_all(results: Results, folder: Path) -> bool:
    """Print and keep the table; whether no bar is missed."""
    if not results:
        print("no results yet")
        return True
    text = table(results)
    print(text + "\n")
    write_text(folder / "table.md", text + "\n")
    met = True
    for what, fine in bars(results):
        print(f"{'missing' if fine is None else 'met    ' if fine else 'MISSED '} {what}")
        met = met and fine is not False
    return met
