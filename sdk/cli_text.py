"""Results of the verbs as text for people: plain tables on standard output, colour only on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from edgewright import report_text as say

SHOWN_DIVERGENCES = 10

Text = Callable[[dict[str, Any]], str]


def print_result(verb: str, result: dict[str, Any]) -> None:
    """Print the `to_json()` object of a verb."""
    print(_TEXTS[verb](result), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; all but the first to the right."""
    widths = [max(len(line[index]) for line in (columns, *rows)) for index in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)


def _check(result: dict[str, Any]) -> str:
    marks = {"ok": "ok  ", "note": "note", "failed": "FAIL"}
    lines = [f"{marks[item['status']]}  {item['what']}: {item['found']}" for item in result["checks"]]
    lines += ["", *(error["message"] for error in result["errors"])] if result["errors"] else []
    verdict = "this recipe can run" if result["ok"] else f"{len(result['errors'])} errors"
    return "\n".join([*lines, "", verdict])


def _plan(result: dict[str, Any]) -> str:
    from edgewright.planner import speculative_text, text

    parts = [text.as_text(result)] if "stages" in result else []
    parts += [speculative_text.as_text(result["speculative"])] if "speculative" in result else []
    return "\n\n".join(parts)


def _run(result: dict[str, Any]) -> str:
    from edgewright.report import format_table

    sample = next((item for item in reversed(result["samples"])), None)
    parts = [format_table(result)] if result["artifacts"] else [_checkpoints(result)]
    if sample is not None:
        parts += [f"{sample['artifact']} continues {sample['prompt']!r}:", sample["prompt"] + sample["text"]]
    parts += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n\n".join([*parts, f"report: {result['report']}"])


def _checkpoints(result: dict[str, Any]) -> str:
    """What a run without exports made."""
    return _facts([(model["name"], _checkpoint(model)) for model in result["checkpoints"]])


def _checkpoint(model: dict[str, Any]) -> str:
    quality = say.bits(model["bits_per_byte"])
    return f"{model['path']}  {model['parameters']:,} parameters  {quality} bits per byte"


def _report(result: dict[str, Any]) -> str:
    from edgewright.report import format_table

    made = format_table(result) if result["artifacts"] else "nothing was exported"
    return "\n\n".join([made, *(f"warning: {text}" for text in result["warnings"]), result["path"]])


def _evaluate(result: dict[str, Any]) -> str:
    interval = "{:.4f} to {:.4f}".format(*result["ci95"]) if result["ci95"] else "unknown for so little text"
    return _facts(
        [
            ("file", f"{result['path']} ({result['runtime']})"),
            ("bits per byte", f"{result['bits_per_byte']:.4f}  (95 % interval {interval})"),
            ("loss", f"{result['loss']:.4f} nats per token"),
            ("perplexity", say.significant(result["perplexity"])),
            ("text", f"{result['tokens']:,} tokens, {result['bytes']:,} bytes"),
        ]
    )


def _export(result: dict[str, Any]) -> str:
    lines = [f"{result['path']}  {say.size(result['bytes'])}  {result['to']} {result['quant']}"]
    lines.append(f"gate {result['gate']}" + (f": {_parity_line(result['parity'])}" if result["parity"] else ""))
    lines += [f"{item['tensor']} is stored as {item['quant']}: {item['reason']}" for item in result["fallbacks"]]
    if result["fallbacks"]:
        lines.append(f"{len(result['fallbacks'])} tensors are stored wider than asked")
    lines += _pair_lines(result.get("pair"))
    lines += [f"note: {note}" for note in result["notes"]]
    if result["candidates"]:
        lines += ["", _candidates(result["candidates"])]
    return "\n".join(lines)


def _pair_lines(pair: dict[str, Any] | None) -> list[str]:
    """What a target and its draft did together; nothing where that was not measured."""
    if pair is None or "acceptance_rate" not in pair:
        return []
    known, trained = pair["checkpoint_acceptance"], pair["trained_agreement"]
    beside = "" if known is None else f" ({say.share(known)} with the checkpoints)"
    agreement = (
        f"pair: on these prompts the checkpoints agree on {say.share(pair['checkpoint_agreement'])} of the tokens, "
        f"at the end of training on {say.share(trained)}"
    )
    return [
        f"pair: gamma {pair['gamma']}, {say.share(pair['acceptance_rate'])} of the drafted tokens accepted{beside}, "
        f"{say.small(pair['block_efficiency'])} tokens per pass of the target",
        f"pair: {pair['tokens_per_s']:,.0f} tokens/s, {pair['plain_tokens_per_s']:,.0f} without the draft "
        f"({pair['speedup']:.2f} times as fast), tokens identical after {say.share(pair['token_identity'])} of "
        f"{pair['prompts']} prompts, peak memory {say.size(pair['peak_memory'])}",
        *([] if trained is None else [agreement]),
    ]


def _candidates(candidates: list[dict[str, Any]]) -> str:
    """What `--to best` tried: the measured ones as a table, the others with their reasons."""
    measured = [each for each in candidates if each["tokens_per_s"] is not None]
    columns = ("target, width, embedding", "tokens/s", "first token", "size", "peak memory", "KL")
    rows = [
        (
            f"{each['to']} {each['quant']} {each['embedding_quant']}",
            say.rate(each["tokens_per_s"], each["tokens_per_s_sd"]),
            say.milliseconds(each["ttft_ms"]),
            say.size(each["bytes"]),
            say.size(each["peak_memory"]),
            say.small(each["kl"]),
        )
        for each in measured
    ]
    others = [
        f"{each['to']} {each['quant']} {each['embedding_quant']}  {each['status']}: {each['reason']}"
        for each in candidates
        if each["tokens_per_s"] is None
    ]
    return "\n".join([table(columns, rows), "", *others])


def _parity_line(parity: dict[str, Any]) -> str:
    return (
        f"max |logit difference| {say.small(parity['max_abs_diff'])}, KL {say.small(parity['kl'])} "
        f"(allowed {say.small(parity['kl_limit'])}), "
        f"same top token {say.share(parity['top1_agreement'])}"
    )


def _verify(result: dict[str, Any]) -> str:
    kl = say.small(result["kl"])
    if result["kl_ci"] is not None:
        kl += f"  (95 % interval {say.small(result['kl_ci'][0])} to {say.small(result['kl_ci'][1])})"
    facts = [
        ("file", str(result["path"])),
        ("against", str(result["against"])),
        ("max |logit difference|", say.small(result["max_abs_diff"])),
        ("KL, nats per token", f"{kl}  allowed {say.small(result['kl_limit'])}"),
        ("of it the weights", say.small(result["kl_weights"])),
        ("added by the runtime", say.small(result["kl_runtime"])),
        ("perplexity ratio", say.small(result["perplexity_ratio"])),
        ("same top token", say.share(result["top1_agreement"])),
        ("greedy tokens equal", _plain(result["greedy_identity"])),
        ("longest text read", f"{result['longest_text']} of {result['context_length']} tokens of context"),
        ("lattice bit-exact", _plain(result["lattice_identity"])),
        ("gate", result["gate"]),
    ]
    skipped = [f"  not read: {way}, {reason}" for way, reason in result["skipped"].items()]
    pair = _pair_lines(result.get("pair"))
    warnings = [f"warning: {text}" for text in (result.get("pair") or {}).get("warnings", [])]
    return "\n".join([_facts(facts), *skipped, *pair, *warnings, *(f"  {reason}" for reason in result["reasons"])])


def _plain(value: object) -> str:
    """A truth value in words, a share in percent."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return say.share(value) if isinstance(value, float) else say.MISSING if value is None else str(value)


def _bench(result: dict[str, Any]) -> str:
    columns = ("file", "width", "size", "first token", "prompt tokens/s", "tokens/s", "peak memory")
    rows = [
        (
            row["path"] + (f" on {row['device']}" if row["device"] else ""),
            f"{row['to']} {row['quant']}",
            say.size(row["bytes"]),
            say.milliseconds(row["ttft_ms"]),
            say.rate(row["prompt_tokens_per_s"], row["prompt_tokens_per_s_sd"]),
            say.rate(row["tokens_per_s"], row["tokens_per_s_sd"]),
            say.size(row["peak_memory"]),
        )
        for row in result["artifacts"]
    ]
    setting = f"prompt {result['prompt']}, generate {result['generate']}, repeats {result['repeats']}, "
    setting += f"threads {result['threads']}, {result['machine']['cpu']}"
    return "\n".join([table(columns, rows), setting, *(f"warning: {text}" for text in result["warnings"])])


def _pack(result: dict[str, Any]) -> str:
    return (
        f"{result['path']}: copy it to the device; there: pip install {' '.join(result['packages'])}; python bench.py\n"
        "then give its result.json to edgewright bench, or to edgewright report --add"
    )


def _speculate(result: dict[str, Any]) -> str:
    columns = (
        "proposer, gamma, prompts",
        "accepted",
        "tokens/pass",
        "MBSU",
        "MBSU measured",
        "speed-up",
        "quartiles",
        "tokens/s",
        "plain",
        "same text",
    )
    rows = [
        (
            f"{row['proposer']} {row['gamma']} {row['prompts']} ({row['texts']})",
            say.share(row["acceptance_rate"]),
            *(_factor(row[name]) for name in ("block_efficiency", "mbsu", "mbsu_measured", "speedup")),
            say.MISSING if row["speedup_quartiles"] is None else "{:.2f} to {:.2f}".format(*row["speedup_quartiles"]),
            say.rate(row["tokens_per_s"]),
            say.rate(row["plain_tokens_per_s"]),
            say.share(row["token_identity"]),
        )
        for row in result["rows"]
    ]
    lines = [table(columns, rows), "", *_pair_facts(result)]
    lines += [_parting(each) for each in result["divergences"][:SHOWN_DIVERGENCES]]
    hidden = len(result["divergences"]) - SHOWN_DIVERGENCES
    lines += [f"and {hidden} more texts that differ: --json lists them"] if hidden > 0 else []
    lines += [f"note: {text}" for text in result["notes"]]
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])


def _pair_facts(result: dict[str, Any]) -> list[str]:
    """What the columns cannot hold."""
    drawn = f"temperature {result['temperature']}, top-k {result['top_k']}, top-p {result['top_p']}"
    how = "greedy" if result["temperature"] == 0 else drawn
    best = f"{result['proposer']}, gamma {result['gamma']}"
    lines = [f"accepted by position ({best}): {', '.join(say.share(rate) for rate in result['by_position'])}"]
    if result["draft"] is not None:
        measured = _factor(result["measured_cost_ratio"])
        lines.append(
            f"cost of a drafted token: {result['cost_ratio']:.3f} of the target's by bytes, {measured} measured"
        )
    runtimes = result["runtime"] + (f", draft in {result['draft_runtime']}" if result["draft_runtime"] else "")
    return [*lines, f"{how}, {result['max_new_tokens']} new tokens, {runtimes}, {result['machine']['cpu']}"]


def _parting(each: dict[str, Any]) -> str:
    verdict = "within" if each["within_noise"] else "OUTSIDE"
    return (
        f"{each['where']} ({each['proposer']} {each['gamma']}): differs from token {each['position']} on; margin "
        f"{say.small(each['margin'])}, {verdict} twice the noise {say.small(each['noise'])}"
    )


def _factor(value: float | None) -> str:
    return say.MISSING if value is None else f"{value:.2f}"


def _generate(result: dict[str, Any]) -> str:
    return str(result["prompt"] + result["text"])


def _ls(result: dict[str, Any]) -> str:
    kind = next(key for key in result if key != "schema_version")
    return "\n".join(line for entry in result[kind] for line in _entry(entry))


def _entry(entry: dict[str, Any]) -> list[str]:
    """A thing to choose, with its widths, options or sizes below it."""
    paper = (
        f" ({entry['paper']})"
        if entry["paper"] and entry["paper"].removeprefix("arXiv:") not in entry["summary"]
        else ""
    )
    lines = [f"{entry['name']}: {entry['summary']}{paper}"]
    for width in entry.get("widths", []):
        lines += [f"  {width['name']}" + (f"  exact for {width['exact'][0]}" if width["exact"] else "")]
        lines += [f"  {' ' * len(width['name'])}         or {text}" for text in width["exact"][1:]]
    for option in entry.get("options", []):
        choices = f"  ({_value(option['choices'])})" if option["choices"] else ""
        lines.append(f"  {option['name']}" + ("" if option["required"] else f" = {option['default']}") + choices)
    hidden = {"name", "summary", "paper", "widths", "options"}
    lines += [f"  {key}: {_value(value)}" for key, value in entry.items() if key not in hidden]
    return lines


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_value(inner)}" for key, inner in value.items()) or "-"
    return (", ".join(map(str, value)) or "-") if isinstance(value, list) else str(value)


def _doctor(result: dict[str, Any]) -> str:
    marks = {"ok": "ok  ", "missing": "--  ", "failed": "FAIL"}
    lines = []
    for item in result["checks"]:
        lines.append(f"{marks[item['status']]}  {item['name']}: {item['found']}")
        if item["fix"]:
            lines.append(f"      fix: {item['fix']}")
    return "\n".join([*lines, "", "healthy" if result["healthy"] else "something that every run needs does not work"])


def _explain(result: dict[str, Any]) -> str:
    text = textwrap.fill(result["text"], width=100, break_long_words=False, break_on_hyphens=False)
    return f"{result['code']}: {result['title']} (exit code {result['exit_code']})\n\n{text}"


_TEXTS: dict[str, Text] = {
    "check": _check,
    "plan": _plan,
    "run": _run,
    "evaluate": _evaluate,
    "export": _export,
    "verify": _verify,
    "bench": _bench,
    "pack": _pack,
    "speculate": _speculate,
    "generate": _generate,
    "report": _report,
    "ls": _ls,
    "doctor": _doctor,
    "explain": _explain,
}
