"""Predicted against measured peak memory.

    python benchmarks/plan_memory.py [--only NAME]

Every configuration trains a few steps, checkpoints and all, in a process of its own; measured is the peak resident size
less the baseline (after imports, before the model is built), as every run measures it. Bar: within 15 % each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common import ROOT, header, worker

if TYPE_CHECKING:
    from edgewright.data import Corpus
    from edgewright.recipe import Recipe

RECIPE = """
version: 1
name: plan
data: {{type: stdlib, tokenizer: {{type: train, vocab_size: 4096}}, sequence_length: {sequence}, held_out: 0.04}}
stages:
  - name: base
    student: {student}
    objective: {objective}
    methods: {methods}
    optimizer: {optimizer}
    budget: {{max_steps: {steps}}}
    training: {training}
"""
DEFAULTS = {
    "student": "{type: preset, preset: llama-4m}",
    "sequence": 256,
    "objective": "{type: next_token}",
    "methods": "[]",
    "optimizer": "{type: adamw}",
    "steps": 3,
}
SMALL = "{type: preset, preset: llama-1m}"
MIDDLE = "{type: preset, preset: llama-20m}"
LARGE = "{type: preset, preset: llama-60m, num_hidden_layers: 12}"
TEACHER = ROOT / "examples/teacher"
DISTILL = f"{{type: distill, teacher: {{type: checkpoint, model: {TEACHER}}}}}"
BASE = {"per_device_train_batch_size": 8, "precision": "fp32", "compile": "off", "eval_steps": 0, "eval_sequences": 8}

CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "1m fp32": ({"student": SMALL}, {"per_device_train_batch_size": 16}),
    "4m fp32": ({}, {}),
    "4m fp32 1024": ({"sequence": 1024}, {"per_device_train_batch_size": 4}),
    "4m bf16": ({}, {"precision": "bf16"}),
    "20m fp32": ({"student": MIDDLE}, {}),
    "20m bf16 accumulated": (
        {"student": MIDDLE, "sequence": 512},
        {"precision": "bf16", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
    "50m fp32": ({"student": LARGE}, {"per_device_train_batch_size": 2}),
    "4m ternary": ({"methods": "[{type: ternary}]"}, {}),
    "20m lowrank": ({"student": MIDDLE, "methods": "[{type: lowrank, rank_fraction: 0.25}]"}, {}),
    "4m distilled": ({"objective": DISTILL}, {}),
    "20m ternary bf16": ({"student": MIDDLE, "methods": "[{type: ternary}]"}, {"precision": "bf16"}),
    "4m compiled": ({}, {"compile": "on"}),
    "20m compiled bf16": ({"student": MIDDLE}, {"compile": "on", "precision": "bf16"}),
    "20m checkpointed": ({"student": MIDDLE}, {"gradient_checkpointing": True}),
}


def recipe_text(own: dict[str, object], training: dict[str, object]) -> str:
    """A recipe of one stage with all defaults, but for these values."""
    values = {**DEFAULTS, **own, "training": json.dumps({**BASE, **training})}
    text = RECIPE
    if values["objective"] == DISTILL:
        text = text.replace("type: train, vocab_size: 4096", f"type: pretrained, path: {TEACHER}")
    return text.format(**values)


def corpus_of(recipe: Recipe, data: Path) -> Corpus:
    """Of one of those recipes; prepared once for all."""
    from edgewright.data import prepare_data

    kind = "teacher" if recipe.data.tokenizer.type == "pretrained" else "own"
    return prepare_data(recipe.data, data / kind, say=lambda line: None)


def measure(recipe: Path, data: Path) -> None:
    """The worker: train the stage, and print what it takes above the process that it begins in."""
    from edgewright.recipe import load_recipe
    from edgewright.stage import train_stage
    from edgewright.training import StopRequest

    loaded = load_recipe(recipe)
    corpus, stop = corpus_of(loaded, data), StopRequest()
    stage = train_stage(loaded, loaded.stages[0], corpus, recipe.parent / "stage", {}, say=lambda line: None, stop=stop)
    assert stage.peak_memory is not None, "this system does not tell a process's peak memory"
    print(json.dumps({"memory": stage.peak_memory}))


def predict(recipe: Path) -> None:
    """The worker that plans; without advice, which simulates every change by itself."""
    from edgewright.plan import predicted
    from edgewright.planner.devices import find_device
    from edgewright.recipe import load_recipe

    found = predicted(recipe, load_recipe(recipe), find_device("cpu"), 4096, lambda *_: None, advice=False)
    print(json.dumps(found.to_json()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append")
    parser.add_argument("--worker", nargs=2, type=Path)
    parser.add_argument("--predict", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(*arguments.worker)
        return
    if arguments.predict:
        predict(arguments.predict)
        return
    header()
    worst = 0.0
    data = ROOT / "build/plan_memory"
    for name in arguments.only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(recipe_text(*CASES[name]), encoding="utf-8")
            plan = worker(__file__, "--predict", str(recipe))
            predicted, (low, high) = plan["memory"], plan["memory_range"]
            measured = worker(__file__, "--worker", str(recipe), str(data))["memory"]
        error = predicted["total"] / measured - 1
        worst = max(worst, abs(error))
        parts = "  ".join(f"{part} {size / 2**20:,.0f}" for part, size in predicted.items() if size and part != "total")
        print(
            f"{name:24} predicted {predicted['total'] / 2**20:7,.0f} MiB  measured {measured / 2**20:7,.0f} MiB  "
            f"{error:+.1%}   range {low / 2**20:,.0f} to {high / 2**20:,.0f}   ({parts})",
            flush=True,
        )
    print(f"largest error {worst:.1%} (bar 15 %)")
    sys.exit(worst > 0.15)


if __name__ == "__main__":
    main()
