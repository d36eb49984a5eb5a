"""The results of `drafts.py` as a table, and its bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafts_runs import SETS

from edgewright.files import write_text

Results = Sequence[dict[str, Any]]
ALIGNMENT, DOMAIN, TENTH = 1.15, 1.5, 0.1
"""Stage 3 over stage 1 away from the text of stage 1; stage 2 over stage 1 on code; the draft over its target."""
MEASURES = (("acceptance_sampled", "sampled"), ("acceptance_greedy", "greedy draft"), ("agreement", "both greedy"))


def rate(results: Results, draft: str, text: str, measure: str = "acceptance_sampled") -> float | None:
    """A mean over seeds; None where there is no run."""
    values = [r["acceptance"][draft][text][measure] for r in results if draft in r.get("acceptance", {})]
    return statistics.mean(values) if values else None


def drafts(results: Results) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.get("acceptance", {})))


def table(results: Results) -> str:
    """Markdown: a line for each draft, a column for each set of prompts and way of drafting."""
    heads = [f"{text}, {words}" for text in SETS for _, words in MEASURES]
    lines = ["| draft | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in drafts(results):
        cells = [f"{rate(results, name, text, measure):.3f}" for text in SETS for measure, _ in MEASURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over(results: Results, one: str, other: str, text: str, measure: str = "acceptance_sampled") -> float | None:
    first, second = rate(results, one, text, measure), rate(results, other, text, measure)
    return None if first is None or not second else first / second


def bars(results: Results) -> list[tuple[str, bool | None]]:
    """Each bar in words, and whether it is met; None where a run is missing."""
    found: list[tuple[str, bool | None]] = []
    sizes = {row: [r["parameters"] for r in results if r["row"] == row] for row in ("target", "drafts")}
    share = sizes["drafts"][0] / sizes["target"][0] if all(sizes.values()) else None
    found.append(_bar("a draft has", share, "of its target's parameters", TENTH, at_most=True))
    for text in SETS[1:]:
        gain = over(results, "aligned", "pretrained", text)
        found.append(_bar(f"stage 3 over stage 1, {text}", gain, "times the acceptance", ALIGNMENT))
    code = over(results, "domain", "pretrained", "code")
    found.append(_bar("stage 2 over stage 1, code", code, "times the acceptance", DOMAIN))
    return found


def _bar(what: str, value: float | None, unit: str, bar: float, *, at_most: bool = False) -> tuple[str, bool | None]:
    number = "?" if value is None else f"{value:.3f}"
    met = None if value is None else value <= bar if at_most else value >= bar
    return f"{what}: {number} {unit} (bar: {'at most' if at_most else 'at least'} {bar:g})", met


def further(results: Results) -> list[str]:
    """What is no bar: stage 3 by itself, and the two losses each where it counts."""
    lines = []
    for text in SETS:
        alone = over(results, "aligned", "domain", text)
        losses = over(results, "aligned-greedy", "aligned", text, "acceptance_greedy")
        if alone is not None and losses is not None:
            lines.append(
                f"{text}: stage 3 over stage 2 {alone:.3f}; p(argmax q) of cross-entropy over lk_hybrid {losses:.3f}"
            )
    return lines


def print_all(results: Results, folder: Path) -> bool:
    """Print table and bars, keep the table; whether no bar is missed."""
    text = table(results)
    print(text)
    write_text(folder / "table.md", text + "\n")
    for line in further(results):
        print(line)
    met = True
    for line, fine in bars(results):
        print(f"{'missing' if fine is None else 'met' if fine else 'MISSED'}: {line}")
        met &= fine is not False
    return met
