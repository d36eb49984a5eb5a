"""What the report says about a run: the headline, the rows, the words. The template only lays it out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from edgewright import report_text as say
from edgewright.planner import text as plan_text
from edgewright.report_data import ArtifactResult, CheckpointResult, RunRecord, StageRecord
from edgewright.report_figures import RUNTIME_NAMES, dominates

TERNARY = frozenset({"tq1_0", "tq2_0", "ternary"})
FULL_WIDTHS = ("f16", "bf16", "fp16", "f32", "fp32")
"""Widths that lose nothing worth speaking of, the smaller ones first: what a compressed file is compared with."""

COLUMNS = {
    "size": "The file on disk, or all files of the folder.",
    "bits per byte": "Bits that the file itself needs, in its own runtime, to predict one byte of held-out text, ± "
    "half of the 95 % interval; lower is better. Below: what exporting alone changed, against the checkpoint.",
    "KL": "How far the file's predictions are from its checkpoint's (Kullback-Leibler divergence, nats per token); "
    "0 = the same predictions.",
    "first token": "Time from handing over the prompt to the first new token. Below: prompt tokens per second.",
    "tokens/s": "New tokens per second, one after the other: mean ± standard deviation of the repeats.",
    "peak memory": "The most memory that a process of its own used with this file open, the runtime included.",
    "gate": "Whether the file was proven, in its own runtime, to be the model that it was made from.",
}

GATE_COLUMNS = {
    "max |difference|": "Largest difference between any logit of the file and of its checkpoint.",
    "KL": "Mean Kullback-Leibler divergence from the checkpoint's predictions, nats per token. Below: what the rounded "
    "weights cost of it, computed in float32, and what the runtime's own rounding adds to them.",
    "perplexity": "The file's perplexity over its checkpoint's, on the gate's texts: prose, code, many languages.",
    "same top token": "Share of positions at which both find the same token most likely.",
    "greedy text": "Whether both write the same tokens when each always takes the most likely one.",
    "weights": "Whether the weights read back from the file are, bit for bit, those it is meant to hold: for a model "
    "trained in that width, those of its last training step.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One large number of the headline."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The one comparison that matters: the best compressed file against a full one."""

    best: ArtifactResult
    baseline: ArtifactResult | None
    sentence: str
    tiles: list[Tile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One file in the tables; every cell is text. `*_bar` are shares of the largest, 0 to 100."""

    number: int
    name: str
    detail: str
    best: bool
    size: str
    size_bar: int
    bits_per_byte: str
    against_checkpoint: str
    kl: str
    first_token: str
    prompt: str
    speed: str
    speed_bar: int
    memory: str
    gate: str | None
    kl_limit: str
    kl_parts: str
    perplexity: str
    max_difference: str
    top1: str
    greedy: str
    lattice: str
    reasons: tuple[str, ...]
    proved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one kind of number comes from."""

    number: str
    how: str
    command: str


def headline(run: RunRecord) -> Headline | None:
    """Compare the best compressed file with a full-width one of the same runtime; None when nothing is compressed."""
    files = [each for each in run.results.artifacts if each.gate != "failed"]
    best = _best(files)
    if best is None:
        return None
    baseline = _baseline(best, files)
    tiles = [*_tiles(best, baseline), *_certified(run.results.artifacts)]
    return Headline(best=best, baseline=baseline, sentence=_sentence(best, baseline), tiles=tiles)


def _best(files: Sequence[ArtifactResult]) -> ArtifactResult | None:
    """The fastest of the ternary files that no other file beats in size, quality and speed; else of all narrow ones."""
    narrow = [each for each in files if each.quant not in FULL_WIDTHS]
    ternary = [each for each in narrow if each.quant in TERNARY]
    candidates = ternary or narrow
    unbeaten = [each for each in candidates if not any(dominates(other, each) for other in files)]
    return max(unbeaten or candidates, key=lambda each: each.tokens_per_s or 0.0, default=None)


def _baseline(best: ArtifactResult, files: Sequence[ArtifactResult]) -> ArtifactResult | None:
    """A full-width file, best of another model (the teacher) and in the same runtime, the smallest width there is."""
    full = [each for each in files if each.quant in FULL_WIDTHS]
    return min(
        full,
        key=lambda each: (each.to != best.to, each.model == best.model, FULL_WIDTHS.index(str(each.quant))),
        default=None,
    )


def _tiles(best: ArtifactResult, baseline: ArtifactResult | None) -> list[Tile]:
    tiles = []
    if baseline is None:
        tiles.append(Tile(value=say.size(best.bytes), label="on disk", detail=best.name))
        tiles.append(Tile(value=say.rate(best.tokens_per_s), label="tokens per second", detail="generation"))
        tiles.append(Tile(value=say.bits(best.bits_per_byte), label="bits per byte", detail="held-out text"))
        return tiles
    if best.bytes and baseline.bytes:
        tiles.append(
            Tile(
                value=_factor(baseline.bytes / best.bytes),
                label="smaller" if best.bytes <= baseline.bytes else "larger",
                detail=f"{say.size(baseline.bytes)} → {say.size(best.bytes)}",
            )
        )
    if best.tokens_per_s and baseline.tokens_per_s:
        tiles.append(
            Tile(
                value=_factor(best.tokens_per_s / baseline.tokens_per_s),
                label="faster" if best.tokens_per_s >= baseline.tokens_per_s else "slower",
                detail=f"{say.rate(baseline.tokens_per_s)} → {say.rate(best.tokens_per_s)} tokens/s",
            )
        )
    if best.bits_per_byte is not None and baseline.bits_per_byte is not None:
        relative = say.signed(100 * (best.bits_per_byte / baseline.bits_per_byte - 1), 1)
        tiles.append(
            Tile(
                value=f"{relative} %",
                label="bits per byte",
                detail=f"quality: {say.bits(baseline.bits_per_byte)} → {say.bits(best.bits_per_byte)}, lower is better",
            )
        )
    return tiles


def _certified(artifacts: Sequence[ArtifactResult]) -> list[Tile]:
    passed = sum(each.gate == "passed" for each in artifacts)
    detail = "proven in their own runtimes" if passed == len(artifacts) else f"{len(artifacts) - passed} not proven"
    return [Tile(value=f"{passed}/{len(artifacts)}", label="files passed the gate", detail=detail)]


def _factor(ratio: float) -> str:
    return say.ratio(max(ratio, 1 / ratio))


def _sentence(best: ArtifactResult, baseline: ArtifactResult | None) -> str:
    if baseline is None:
        return f"The best compressed file of this run is {_named(best)}."
    return f"The best compressed file, {_named(best)}, compared with {_named(baseline)}:"


def _named(artifact: ArtifactResult) -> str:
    return f"{artifact.name} ({RUNTIME_NAMES.get(artifact.to, artifact.to)} {artifact.quant or ''})"


def rows(run: RunRecord) -> list[Row]:
    """One row for each exported file, in the order of the recipe."""
    files = run.results.artifacts
    checkpoints = {each.name: each for each in run.results.checkpoints}
    first = headline(run)
    largest = max((each.bytes or 0 for each in files), default=0)
    fastest = max((each.tokens_per_s or 0.0 for each in files), default=0.0)
    return [
        Row(
            number=number,
            name=each.name,
            detail=_detail(each),
            best=first is not None and each.name == first.best.name,
            size=say.size(each.bytes),
            size_bar=_percent(each.bytes, largest),
            bits_per_byte=say.bits_with_interval(each.bits_per_byte, each.bits_per_byte_ci),
            against_checkpoint=_against(each, checkpoints.get(each.model or "")),
            kl=say.small(each.kl),
            first_token=say.milliseconds(each.ttft_ms),
            prompt="" if each.prompt_tokens_per_s is None else f"prompt {say.rate(each.prompt_tokens_per_s)}/s",
            speed=say.rate(each.tokens_per_s, each.tokens_per_s_sd),
            speed_bar=_percent(each.tokens_per_s, fastest),
            memory=say.size(each.peak_memory),
            gate=each.gate,
            kl_limit="" if each.kl_limit is None else f"allowed {say.small(each.kl_limit)}",
            kl_parts=_kl_parts(each),
            perplexity=say.MISSING if each.perplexity_ratio is None else f"{each.perplexity_ratio:.4f}×",
            max_difference=say.small(each.max_abs_diff),
            top1=say.share(each.top1_agreement),
            greedy=_verdict(each.greedy_identity, "identical", "differs"),
            lattice=_verdict(each.lattice_identity, "bit-exact", "differ"),
            reasons=each.reasons,
            proved=any(value is not None for value in (each.max_abs_diff, each.kl, each.lattice_identity)),
        )
        for number, each in enumerate(files, 1)
    ]


def _detail(artifact: ArtifactResult) -> str:
    parts = [RUNTIME_NAMES.get(artifact.to, artifact.to), artifact.quant, artifact.model and f"from {artifact.model}"]
    return " · ".join(part for part in parts if part)


def _kl_parts(artifact: ArtifactResult) -> str:
    """Apart what the width costs and what the runtime adds; empty where that was not measured."""
    if artifact.kl_weights is None or artifact.kl_runtime is None:
        return ""
    return f"weights {say.small(artifact.kl_weights)}, runtime {say.small(artifact.kl_runtime)}"


def _against(artifact: ArtifactResult, checkpoint: CheckpointResult | None) -> str:
    if checkpoint is None or checkpoint.bits_per_byte is None or artifact.bits_per_byte is None:
        return ""
    return f"{say.signed(artifact.bits_per_byte - checkpoint.bits_per_byte, 3)} by exporting"


def _percent(value: float | None, largest: float) -> int:
    return round(100 * value / largest) if value and largest else 0


def _verdict(value: bool | float | str | None, yes: str, no: str) -> str:
    """A finding that is either a verdict, a share or already a word."""
    if value is None:
        return say.MISSING
    if isinstance(value, str):
        return value
    if value in (0, 1):
        return yes if value else no
    return say.share(value)


def checkpoints(run: RunRecord) -> list[dict[str, str]]:
    """What torch measured on the checkpoints that the files were made from."""
    return [
        {
            "name": each.name,
            "quality": say.bits_with_interval(each.bits_per_byte, each.ci95),
            "parameters": say.count(each.parameters) if each.parameters else "",
            "size": say.size(each.bytes) if each.bytes else "",
        }
        for each in run.results.checkpoints
        if each.bits_per_byte is not None
    ]


def drafts(run: RunRecord) -> list[dict[str, str]]:
    """How much the targets would accept of drafts that were aligned."""
    return [
        {
            "name": stage.name,
            "runtime": str(found["runtime"]),
            "sampled": say.share(found["acceptance_sampled"]),
            "greedy": say.share(found["acceptance_greedy"]),
            "agreement": say.share(found["agreement"]),
            "tokens": f"{found['tokens']:,}",
        }
        for stage in run.results.stages
        if (found := stage.draft) is not None
    ]


def devices(run: RunRecord) -> list[dict[str, str]]:
    """One row for each file that was measured on another device."""
    return [
        {
            "device": str(result["device"]),
            "name": PurePath(row["path"]).name,
            "detail": f"{RUNTIME_NAMES.get(row['to'], row['to'])} · {row['quant']} · {result['threads']} threads",
            "size": say.size(row["bytes"]),
            "first_token": say.milliseconds(row["ttft_ms"]),
            "prompt": say.rate(row["prompt_tokens_per_s"]),
            "speed": say.rate(row["tokens_per_s"], row["tokens_per_s_sd"]),
            "memory": say.size(row["peak_memory"]),
        }
        for result in run.devices
        for row in result["artifacts"]
    ]


def chips(run: RunRecord) -> list[str]:
    """What the model is, in a few words: size, methods, objective, data."""
    words: list[str] = []
    sizes = [each.parameters for each in run.results.checkpoints if each.parameters]
    if sizes:
        words.append(f"{say.count(sizes[-1])} parameters")
    stages = run.recipe.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        words += [*_kinds(stage.get("methods")), *_kinds([stage.get("objective")])]
    data = run.recipe.get("data")
    words += [f"data: {kind}" for kind in _kinds([data])]
    return list(dict.fromkeys(words))


def _kinds(components: object) -> list[str]:
    """The `type` of each component of the recipe, in words."""
    found = [each for each in components if isinstance(each, dict)] if isinstance(components, list) else []
    return [str(each["type"]).replace("_", " ") for each in found if each.get("type")]


def status(run: RunRecord) -> str | None:
    """What is still going on; None when the run is finished."""
    if run.finished:
        return None
    unfinished = [stage for stage in run.stages if not stage.done]
    if not unfinished:
        return "not finished: no results yet"
    stage = unfinished[-1]
    total = f" of {stage.total_steps:,}" if stage.total_steps else ""
    return f"not finished: stage {stage.name}, step {stage.last_step:,}{total}"


def stage_facts(stage: StageRecord) -> list[tuple[str, str]]:
    """What a stage took."""
    rate = stage.tokens / stage.seconds if stage.tokens and stage.seconds else None
    planned = f" of {stage.total_steps:,}" if not stage.done and stage.total_steps else ""
    facts = [
        ("steps", f"{stage.last_step:,}{planned}"),
        ("tokens", say.count(stage.tokens)),
        ("time", say.duration(stage.seconds)),
        ("speed", f"{say.rate(rate)} tokens/s" if rate else say.MISSING),
        ("peak memory", say.size(stage.memory)),
        ("last loss", say.bits(stage.loss[-1]) if stage.loss else say.MISSING),
        ("held-out", f"{say.bits(stage.bits_per_byte[-1])} bits per byte" if stage.bits_per_byte else say.MISSING),
        *((method, say.figures(numbers)) for method, numbers in stage.methods.items()),
    ]
    return [(name, value) for name, value in facts if value != say.MISSING]


def compared(run: RunRecord) -> list[dict[str, str]]:
    """Every prediction with what came of it, in words."""
    return [
        {
            "what": plan_text.NAMES[each.what] if each.stage is None else f"{each.stage}: {plan_text.NAMES[each.what]}",
            "source": plan_text.SOURCES[each.source],
            "predicted": plan_text.amount(each.what, each.predicted),
            "spread": ""
            if each.spread is None
            else " to ".join(plan_text.amount(each.what, value) for value in each.spread),
            "measured": plan_text.amount(each.what, each.measured),
            "error": say.MISSING if each.error is None else plan_text.percent(each.error),
            "changed": f"other settings: {plan_text.settings(each.changed)}" if each.changed else "",
        }
        for each in run.compared
    ]


def stage_events(stage: StageRecord) -> list[str]:
    """Events as one line each: `skipped_batch (step 41, index 1203)`."""
    lines = []
    for event in stage.events:
        details = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("event", "time"))
        lines.append(f"{event['event']}" + (f" ({details})" if details else ""))
    return lines


def facts(values: dict[str, object]) -> list[tuple[str, str]]:
    """A (nested) object as label and text, for data counts and environment."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            lines += [(f"{label}: {inner}" if label != "packages" else inner, text) for inner, text in facts(value)]
        elif value is not None and value != [] and name != "schema_version":
            lines.append((label, _plain(name, value)))
    return lines


def _plain(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if name in ("memory", "bytes") or name.endswith("_bytes"):
        return say.size(value)
    return f"{value:,}" if isinstance(value, int) else say.significant(value)


def sources(run: RunRecord) -> list[Source]:
    """Each kind of number with the command that measures it, the best file as the example; run in the run directory."""
    files = run.results.artifacts
    if not files:
        return []
    first = headline(run)
    file = first.best if first else files[0]
    checkpoint = next((each.path for each in run.results.checkpoints if each.name == file.model), None) or "MODEL"
    out = file.path if file.to == "genai" else file.path.rpartition("/")[0] or "."
    export = f"edgewright export {checkpoint} --to {file.to} --quant {file.quant} --out {out}"
    text = "" if _kinds([run.recipe.get("data")]) == ["stdlib"] else " --data FILES"
    given = run.results.commands
    bench = run.recipe.get("bench")
    flags = [f"--{name} {value}" for name, value in bench.items()] if isinstance(bench, dict) else []
    return [
        Source(
            number="size",
            how="bytes of the file that the exporter wrote, counted on disk",
            command=given.get("export", export),
        ),
        Source(
            number="bits per byte",
            how="the file itself, in its own runtime; the run takes documents that were kept out of training",
            command=given.get("evaluate", f"edgewright evaluate {file.path}{text}"),
        ),
        Source(
            number="KL, differences, greedy text, weights, gate",
            how="the file against its checkpoint, in one go and token by token",
            command=given.get("verify", f"edgewright verify {file.path} --against {checkpoint}"),
        ),
        Source(
            number="first token, tokens/s, peak memory",
            how="all files in processes of their own, taking turns, after a warm-up round",
            command=given.get("bench", " ".join(["edgewright bench", *(each.path for each in files), *flags])),
        ),
        Source(
            number="everything",
            how="from the recipe to this page",
            command="edgewright run recipe.resolved.yaml",
        ),
    ]
