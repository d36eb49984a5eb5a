"""`plan --speculative` as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgewright import report_text as say

SHOWN = (0.5, 0.7, 0.9)
"""Acceptances whose speed-up is in the table; `--json` has more."""
CHECKED = (2, 3, 5, 9)
"""Numbers of tokens whose check is in the table."""
HEADS = {"yes": "YES", "no": "NO", "above": "ONLY ABOVE"}


def as_text(section: dict[str, Any]) -> str:
    """The object `speculative` of a plan."""
    from edgewright.cli_text import table

    files = section["files"]
    context = "/".join(sorted({str(file["context"]) for file in files}))
    lines = [
        f"{section['target']} on {section['machine']['cpu']}, {section['threads']} threads, "
        f"{context} tokens of context, {section['repeats']} repeats",
        "",
        table(
            ("target", "read a token", "a token", "tokens/s", *(f"{count} at once" for count in CHECKED)),
            [_file(file) for file in files],
        ),
    ]
    for file in files:
        lines += ["", f"drafts for {_name(file)}, against it without a draft:", "", _drafts(file)]
        lines += [f"  {line}" for line in _fit(file["fit"])]
    lines += ["", *(f"not probed: {each['name']}: {each['reason']}" for each in section["skipped"])]
    lines += [f"warning: {warning}" for warning in section["warnings"]]
    if section["acceptance"]:
        source = "" if section["acceptance_source"] == "given" else f" ({section['acceptance_source']})"
        lines.append(f"acceptance {', '.join(_number(each) for each in section['acceptance'])}{source}")
    return "\n".join([*lines, f"will it pay? {verdict(section)}"])


def verdict(section: dict[str, Any]) -> str:
    """The answer in a sentence."""
    found = section["verdict"]
    fastest = next(file for file in section["files"] if file["fastest"])
    where = f"{found['draft']} for {found['to']} {found['quant'] or ''}".rstrip()
    against = f"against {_name(fastest)} without a draft, the fastest file that was probed"
    head, needed, prediction = HEADS[found["answer"]], found["needed"], found["prediction"]
    if prediction is not None:
        low, high = prediction["speedup_range"]
        sure = "" if low > 1 or high <= 1 else "; too close to be sure"
        return (
            f"{head}: {prediction['speedup']:.2f}× ({low:.2f} to {high:.2f}) with {where}, "
            f"gamma {prediction['gamma']}, {against}{sure}"
        )
    if needed["acceptance"] is None:
        return f"{head}: not even if every drafted token is accepted is {where}, the best of them, faster {against}"
    if found["answer"] == "no":
        return f"{head}: it would take an acceptance of {_needed(needed)} with {where}, {against}; drafts miss that"
    if found["answer"] == "yes":
        return f"{head}: from an acceptance of {_needed(needed)} on, with {where}, {against}"
    return f"{head} an acceptance of {_needed(needed)}: {where}, {against}"


def _file(file: dict[str, Any]) -> tuple[str, ...]:
    return (
        _name(file) + (" *" if file["fastest"] else ""),
        say.size(file["bytes_per_token"]),
        say.milliseconds(file["step_ms"]),
        say.rate(file["tokens_per_s"]),
        *(f"{file['verify'][count - 1]:.2f}" for count in CHECKED),
    )


def _name(file: dict[str, Any]) -> str:
    return f"{file['to']} {file['quant'] or ''}".rstrip()


def _drafts(file: dict[str, Any]) -> str:
    from edgewright.cli_text import table

    columns = ("draft", "read a token", "cost", "1x needs", "1.2x", "1.5x", *(f"at {_number(each)}" for each in SHOWN))
    return table(columns, [_draft(draft) for draft in file["drafts"]])


def _draft(draft: dict[str, Any]) -> tuple[str, ...]:
    by_acceptance = {each["acceptance"]: each for each in draft["expected"]}
    low, high = draft["cost_ratio_range"]
    return (
        draft["name"] + (f" ({draft['kind']})" if draft["kind"] in ("fitted", "recipe") else ""),
        say.size(draft["bytes_per_token"]),
        f"{draft['cost_ratio']:.2f} ({low:.2f}-{high:.2f})",
        *(_needed(draft["needed"][wanted]) for wanted in ("1", "1.2", "1.5")),
        *(_speedup(by_acceptance[each]) for each in SHOWN),
    )


def _needed(needed: dict[str, Any]) -> str:
    """An acceptance, and from where to where it may be."""
    if needed["acceptance"] is None:
        return "never"
    low, high = needed["range"]
    return f"{needed['acceptance']:.2f} ({_bound(low)}-{_bound(high)})"


def _bound(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"


def _speedup(prediction: dict[str, Any]) -> str:
    return f"{prediction['speedup']:.2f}× γ{prediction['gamma']}"


def _fit(fit: dict[str, Any] | None) -> Iterator[str]:
    if fit is None:
        return
    traffic = "" if fit["bytes_per_s"] is None else f" and {say.size(fit['bytes_per_s'])}/s"
    yield (
        f"a step of a draft: {say.milliseconds(fit['step_ms'])} and {say.milliseconds(fit['layer_ms'])} a layer"
        f"{traffic}; off by at most {say.share(fit['error'])} of those measured"
    )


def _number(value: float) -> str:
    return f"{value:g}"
