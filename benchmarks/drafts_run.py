"""One run of `drafts.py`, in a process of its own: its stages, then the acceptance of every draft by set of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distill_run import stages
from drafts_runs import SETS, Job, write_prompts
from filelock import FileLock
from quality_run import carry_out, commit_of, say
from quality_runs import Places

from edgewright.compress.acceptance import Acceptance, measure_acceptance, not_trained_on, read_written
from edgewright.data import prepare_data
from edgewright.files import write_json
from edgewright.machine import describe_machine
from edgewright.recipe import load_recipe
from edgewright.student import load_model
from edgewright.training import StopRequest

DRAFTS = ("pretrained", "domain", "aligned", "aligned-greedy", "lora", "ternary", "int4")


def run(job: Job, places: Places) -> int:
    """Carry out the stages and measure, or go on with them; the exit code."""
    return carry_out(job, places, lambda stop: measure(job, places, stop))


def measure(job: Job, places: Places, stop: StopRequest) -> dict[str, Any]:
    """The result of a run; of the drafts' run with their acceptance."""
    directory, commit = places.run(job), commit_of()
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(places.work / "prompts.lock"):
        write_prompts(job.scale, places.work / "prompts")
    write_json(directory / "recipe.yaml", job.recipe(job, places))
    loaded = load_recipe(directory / "recipe.yaml")
    corpus = prepare_data(loaded.data, directory / "data", say=say)
    outputs, trained = stages(loaded, corpus, directory, stop)
    result: dict[str, Any] = {
        "row": job.name.rpartition("-s")[0],
        "what": job.what,
        "scale": job.scale.name,
        "seed": job.seed,
        "commit": commit,
        "data": corpus.fingerprint,
        "parameters": trained.parameters,
        "machine": describe_machine()["cpu"],
    }
    if "answers" in outputs:
        result["acceptance"] = acceptances(job, places, outputs, corpus.start_id)
    return result


def acceptances(job: Job, places: Places, outputs: dict[str, Path], start_id: int) -> dict[str, Any]:
    """By draft and set of prompts, all on the same held-out text of the target's."""
    trained = read_written(outputs["answers"])
    texts = {name: not_trained_on(read_written(outputs[name]), trained) for name in SETS}
    target = load_model(places.model(job.sibling("target"))).eval()
    found: dict[str, Any] = {}
    for name in DRAFTS:
        draft = load_model(outputs[name]).eval()
        found[name] = {text: of(draft, target, written, start_id).to_json() for text, written in texts.items()}
        shares = {text: round(each["acceptance_sampled"], 4) for text, each in found[name].items()}
        say(f"{name}: accepted {shares}")
    return found


def of(draft: Any, target: Any, written: list[Any], start_id: int) -> Acceptance:
    with torch.no_grad():
        return measure_acceptance(draft, target, written, start_id)
