"""One run of `distill.py`, in a process of its own: its stages, then how well the model predicts held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_runs import MEMBERS, Job, recipe
from filelock import FileLock
from quality_run import Judge, carry_out, commit_of, say
from quality_runs import Places

from edgewright.compress.cache import read_manifest
from edgewright.data import Corpus, prepare_data
from edgewright.files import write_json
from edgewright.machine import describe_machine
from edgewright.recipe import Recipe, load_recipe
from edgewright.resume import check_same_recipe
from edgewright.stage import StageResult
from edgewright.stage_work import StageWork
from edgewright.training import StopRequest
from edgewright.world import ALONE


def run(job: Job, places: Places) -> int:
    """Carry out the stages and measure, or go on with them; the exit code."""
    return carry_out(job, places, lambda stop: measure(job, places, stop))


def measure(job: Job, places: Places, stop: StopRequest) -> dict[str, Any]:
    """The result of a run."""
    directory, commit = places.run(job), commit_of()
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "recipe.yaml", recipe(job, places))
    loaded = load_recipe(directory / "recipe.yaml")
    with FileLock(places.work / "data.lock"):
        corpus = prepare_data(loaded.data, places.work / "data", say=say)
    outputs, trained = stages(loaded, corpus, directory, stop)
    judge = Judge(loaded, corpus, job.scale.judged_tokens)
    row = job.name.rpartition("-s")[0]
    result: dict[str, Any] = {
        "row": row,
        "what": job.what,
        "scale": job.scale.name,
        "seed": job.seed,
        "commit": commit,
        "data": corpus.fingerprint,
        "epochs": trained.tokens / len(corpus.train),
        "tokens": trained.tokens,
        "parameters": trained.parameters,
        "steps": trained.steps,
        "seconds": trained.seconds,
        **judge.quality(trained.model),
        "decisions": trained.decisions,
        "machine": describe_machine()["cpu"],
    }
    if "targets" in outputs:
        manifest = read_manifest(outputs["targets"])
        result["bytes_per_token"] = manifest["bytes"] / manifest["tokens"]
    if row == "ensemble":
        members = [places.model(job.sibling(f"member{number}")) for number in range(MEMBERS)]
        asked = {"scratch": [places.model(job.sibling("scratch"))], "teacher": members, "student": [trained.model]}
        result["gain"] = {
            name: mean_loss(loaded, corpus, models, job.scale.judged_tokens) for name, models in asked.items()
        }
    return result


def stages(loaded: Recipe, corpus: Corpus, directory: Path, stop: StopRequest) -> tuple[dict[str, Path], StageResult]:
    """Carry them out in order: what each leaves, and the last training."""
    outputs: dict[str, Path] = {}
    trained = None
    for stage in loaded.stages:
        folder = directory / "stages" / stage.name
        check_same_recipe(loaded, stage, corpus, folder)
        work = StageWork(
            recipe=loaded, corpus=corpus, directory=folder, earlier=dict(outputs), say=say, stop=stop, world=ALONE
        )
        result = stage.carry_out(work)
        outputs[stage.name] = result.output
        if isinstance(result, StageResult):
            trained = result
    assert trained is not None, "every run trains"
    return outputs, trained


def mean_loss(loaded: Recipe, corpus: Corpus, models: list[Path], tokens: int) -> float:
    """Nats per held-out token of the mean of some models' logits, on the first sequences of the held-out text."""
    import torch

    from edgewright.compress.teacher import Ensemble, OnlineTeacher
    from edgewright.data import Batches
    from edgewright.trainer import model_inputs

    ensemble = Ensemble([OnlineTeacher(model) for model in models])
    ensemble.prepare(None, torch.device("cpu"))
    data = loaded.data
    batches = Batches(
        corpus.held_out, sequence_length=data.sequence_length, seed=0,
        restart_at_documents=data.restart_at_documents, start_id=corpus.start_id, eos_id=corpus.eos_id,
    )  # fmt: skip
    total, counted = 0.0, 0
    for index in range(min(len(batches), max(1, tokens // data.sequence_length))):
        inputs = model_inputs(batches.rows([index]), torch.device("cpu"))
        logits = ensemble.targets(inputs, torch.float32).rows(slice(0, data.sequence_length)).values
        total += float(torch.nn.functional.cross_entropy(logits, inputs.labels[0], reduction="sum"))
        counted += int((inputs.labels != -100).sum())
    return total / counted
