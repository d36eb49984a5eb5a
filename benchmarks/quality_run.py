"""One run of `quality.py`, in a process of its own: train, evaluate, export, measure the files, write the result."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import ROOT
from filelock import FileLock, Timeout
from quality_runs import BUSY, File, Job, Named, Places, Stage, recipe, row_named
from quality_scales import SEQUENCE

from edgewright import checkpoint
from edgewright.data import Corpus, iterate_documents, prepare_data
from edgewright.errors import EdgewrightError
from edgewright.evaluate import evaluate_session
from edgewright.export.artifact import size_of
from edgewright.export.runtimes.opening import open_session
from edgewright.export.targets import export
from edgewright.files import write_json
from edgewright.machine import describe_machine
from edgewright.recipe import Recipe, load_recipe
from edgewright.stage import StageResult, train_stage
from edgewright.training import Interrupted, StopRequest

CALIBRATION_DOCUMENT = 8_000
"""Characters of a document that calibration may use."""


def run(job: Job, places: Places) -> int:
    """Train and measure, or go on with it; the exit code."""
    return carry_out(job, places, lambda stop: measure(job, places, stop))


def carry_out(job: Named, places: Places, measured: Callable[[StopRequest], dict[str, Any]]) -> int:
    """Write the result of a run, unless another process is at it or it is stopped; the exit code."""
    places.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(places.work / f"{job.name}.lock", timeout=0)
    try:
        with lock, StopRequest().installed() as stop:
            write_json(places.result(job), measured(stop))
    except Timeout:
        return BUSY
    except Interrupted as interrupted:
        say(str(interrupted))
        return interrupted.exit_code
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def measure(job: Job, places: Places, stop: StopRequest) -> dict[str, Any]:
    """The result of a run: what it cost, how well it predicts, and what its files weigh and lose."""
    rate, commit = learning_rate(job, places), commit_of()
    directory = places.run(job)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "recipe.yaml", recipe(job, places, rate))
    loaded = load_recipe(directory / "recipe.yaml")
    with FileLock(places.work / "data.lock"):
        corpus = prepare_data(loaded.data, places.work / "data", say=say)
    stages: dict[str, StageResult] = {}
    for stage in loaded.stages:
        earlier = {name: result.model for name, result in stages.items()}
        folder = directory / "stages" / stage.name
        stages[stage.name] = train_stage(loaded, stage, corpus, folder, earlier, say=say, stop=stop)
    judge = Judge(loaded, corpus, job.scale.judged_tokens)
    quality = {name: judge.quality(result.model) for name, result in stages.items()}
    model = stages["model"].model
    files = (
        []
        if job.factor is not None
        else [measure_file(file, model, directory, loaded, corpus, judge) for file in job.row.files]
    )
    plans = {stage.name: stage for stage in job.stages()}
    return {
        "row": job.row.name,
        "scale": job.scale.name,
        "seed": job.seed,
        "factor": job.factor,
        "rate": rate,
        "control": job.row.control,
        "commit": commit,
        "data": corpus.fingerprint,
        "epochs": sum(result.tokens for result in stages.values()) / len(corpus.train),
        "tokens": sum(result.tokens for result in stages.values()),
        "steps": {name: result.steps for name, result in stages.items()},
        "seconds": sum(result.seconds for result in stages.values()),
        "flops": sum(training_flops(job, plans[name], result) for name, result in stages.items()),
        "costs": {name: costs(job, plans[name], result, directory) for name, result in stages.items()},
        "stages": quality,
        **quality["model"],
        "decisions": stages["model"].decisions,
        "files": files,
        "machine": describe_machine()["cpu"],
    }  # fmt: skip


def learning_rate(job: Job, places: Places) -> float:
    """The best of the sweep that this run goes by.

    Raises:
        SystemExit: the sweep is not there yet.
    """
    if job.row.name == "dense" and job.factor is not None:
        return job.factor
    dense = best_factor(Job(row=row_named("dense"), scale=job.scale), places)
    if job.factor is not None:
        return dense * job.factor
    base = job.row if job.row.factors else row_named(job.row.rate_of)
    return dense if base.name == "dense" else dense * best_factor(Job(row=base, scale=job.scale), places)


def best_factor(job: Job, places: Places) -> float:
    """Of a row's sweep, by held-out loss."""
    factors = job.scale.rates if job.row.name == "dense" else job.row.factors
    losses = {}
    for factor in factors:
        result = places.result(Job(row=job.row, scale=job.scale, factor=factor))
        if not result.exists():
            raise SystemExit(f"{result.name} is not there yet: run --only {job.row.name} first")
        losses[factor] = json.loads(result.read_text(encoding="utf-8"))["loss"]
    return min(losses, key=losses.__getitem__)


class Judge:
    """The held-out text, and how well a model or file predicts it in its own runtime."""

    def __init__(self, loaded: Recipe, corpus: Corpus, tokens: int) -> None:
        self.tokens = tokens
        texts: Iterable[tuple[str, str]] = iterate_documents(loaded.data, split="held_out", rule=corpus.split)
        self.texts = [text for _, text in texts]

    def quality(self, path: Path) -> dict[str, float]:
        """Nats per token, perplexity, bits per byte."""
        with open_session(path) as session:
            documents = ((session.tokenize(text), len(text.encode())) for text in self.texts)
            found = evaluate_session(session, documents, max_tokens=self.tokens, window=SEQUENCE, seed=0)
        say(f"{path.name}: {found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.3f}")
        return {"loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}


def measure_file(
    file: File, model: Path, directory: Path, loaded: Recipe, corpus: Corpus, judge: Judge
) -> dict[str, Any]:
    """Export, certify, weigh and evaluate one file; what the target refuses is written down as such."""
    row: dict[str, Any] = {"name": file.name, "to": file.to, "quant": file.quant, "embedding": file.embedding}
    row["calibrated"] = file.calibrated
    out = directory / "files" / file.name
    try:
        artifact = export(
            model, to=file.to, quant=file.quant, embedding_quant=file.embedding, out=out,
            calibrate=[calibration_text(loaded, corpus, directory.parent)] if file.calibrated else None,
        )  # fmt: skip
    except EdgewrightError as error:
        say(f"{file.name}: {error}")
        return row | {"refused": f"{error.code} {error.what}"}
    kl = (artifact.parity or {}).get("kl")
    return row | {"bytes": size_of(artifact.path), "gate": artifact.gate, "kl": kl, **judge.quality(artifact.path)}


def calibration_text(loaded: Recipe, corpus: Corpus, work: Path) -> Path:
    """The heads of the training documents, in a file of their own: never the text that is judged on."""
    target = work / "calibration.jsonl"
    if not target.exists():
        texts = iterate_documents(loaded.data, split="train", rule=corpus.split)
        lines = [json.dumps({"text": text[:CALIBRATION_DOCUMENT]}) + "\n" for _, text in texts]
        temporary = target.with_suffix(".tmp.jsonl")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(target)
    return target


def costs(job: Job, stage: Stage, result: StageResult, directory: Path) -> dict[str, float]:
    """Of a stage: weights in linear layers, numbers trained for them, all numbers trained, bytes while training.

    `bytes` is the formula for weights and gradients in float32, and what the optimizer's state weighs in a checkpoint.
    """
    linear = job.scale.linear(stage.width)
    owned = sum(numbers["weights"] for numbers in result.methods.values())
    trained_linear = linear - owned + sum(numbers["parameters"] for numbers in result.methods.values())
    trained = result.parameters - linear + trained_linear
    last = checkpoint.directory_of(directory / "stages" / stage.name / "checkpoints", result.steps)
    state = (last / "optimizer.safetensors").stat().st_size
    return {"linear": linear, "trained_linear": trained_linear, "trained": trained, "bytes": 8 * trained + state}


def training_flops(job: Job, stage: Stage, result: StageResult) -> float:
    """Three times the forward (the backward costs two), a multiply-add as two; a teacher's forward once.

    Forward of a token: linear layers as the methods count them (masked weights left out), head and attention.
    """
    scale = job.scale
    owned = sum(numbers["weights"] for numbers in result.methods.values())
    products = sum(numbers["flops"] for numbers in result.methods.values())
    products += 2 * (scale.linear(stage.width) - owned)
    rest = 2 * (scale.embedding(stage.width) + scale.attention(stage.width))
    teacher = 2 * (scale.linear() + scale.embedding() + scale.attention()) if stage.teacher else 0.0
    return (3 * (products * stage.active + rest) + teacher) * result.steps * scale.step_tokens


def commit_of() -> str:
    """What the code of this run is."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return described.stdout.strip()
