"""A few real steps of a stage, in a process of its own: with the run's settings, random weights and random tokens.

    python -m edgewright.planner.probe '{"recipe": ..., "overrides": [...], "stage": ..., "vocab_size": ...}'

prints one JSON object. Time does not depend on what the weights and tokens are, so nothing has to be trained or
prepared before; nothing is saved.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.compress.cache_config import CacheStageConfig
    from edgewright.compress.generate_config import GenerateStageConfig
    from edgewright.data import Batches
    from edgewright.recipe import Recipe, StageConfig

WARM_UP = 2
"""Steps that are not counted: the first compiles, the second is the first that finds the optimizer's state."""
MEASURED = 3
"""Steps that are counted at least."""
ENOUGH = 4.0
"""Seconds that the counted steps take together at least: a run is made of slow and fast ones."""
MOST = 40
"""Steps of a probe at most."""
LONG_ENOUGH = 60.0
"""Seconds after which one counted step is enough."""
DOCUMENT_TOKENS = 400
"""Between the borders of random documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a few steps took.

    Args:
        seconds: of a step, mean.
        once: seconds that the first steps took longer, mostly compilation.
        memory: peak bytes above the baseline, None where the system does not tell.
        problem: why there is no time, in a line; None where there is.
    """

    seconds: float = 0.0
    once: float = 0.0
    memory: int | None = None
    problem: str | None = None


def probe(recipe: Path, overrides: Sequence[str], stage: str, vocab_size: int) -> Probe:
    """Run the probe of a stage in a process of its own; what stops it is told and not raised."""
    request = {"recipe": str(recipe), "overrides": list(overrides), "stage": stage, "vocab_size": vocab_size}
    command = [sys.executable, "-m", "edgewright.planner.probe", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return Probe(problem=f"the probe ended with {done.returncode}" + (f": {lines[-1]}" if lines else ""))
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def _measure(recipe: Recipe, stage: StageConfig, vocab_size: int, folder: Path) -> Probe:
    """In the process of the probe."""
    import torch

    from edgewright.checkpoint import TrainState
    from edgewright.compress.cache import CacheKey
    from edgewright.compress.sandwich import SandwichConfig
    from edgewright.metrics import Metrics
    from edgewright.objective import NextTokenConfig
    from edgewright.planner.cases import case, stage_models
    from edgewright.planner.devices import find_device
    from edgewright.planner.peak import PeakMemory
    from edgewright.trainer import Job, Trainer, TrainingModule
    from edgewright.training import StopRequest
    from edgewright.weights import hold_weights_as
    from edgewright.world import ALONE

    models = next(found for config, found in stage_models(recipe, vocab_size) if config.name == stage.name)
    assert models.student is not None, "the stage trains"
    decisions = case(stage, models, recipe, find_device(None)).decisions
    measured = PeakMemory.begin(decisions["device"], compiled=decisions["compile"])
    torch.manual_seed(recipe.seed)
    model = _random(models.student)
    hold_weights_as(model, decisions["weights"])
    model.to(decisions["device"])
    methods = [config.build() for config in stage.methods]
    for method in methods:
        method.prepare(model)
    lesson = stage.lesson
    if isinstance(lesson, NextTokenConfig | SandwichConfig):
        objective: Any = lesson.build()
    else:
        key = CacheKey(tokens="", tokenizer="", sequence_length=0, restart_at_documents=True)  # of no cache
        objective = lesson.build(lesson.teacher.build({}, key))
    objective.attach(model)
    settings = stage.training
    module = TrainingModule(model, objective, getattr(torch, decisions["precision"]))
    job = Job(
        model=model,
        replica=ALONE.replicate(module, "none"),
        objective=objective,
        methods=list(methods),
        optimizer=stage.optimizer.build(model),
        learning_rate=stage.optimizer.learning_rate,
        schedule=stage.schedule,
        batches=random_batches(recipe, vocab_size, settings.global_batch),
        held_out=None,
        bytes_per_token=1.0,
        total_steps=10**6,
        settings=settings,
        directory=folder,
        extra_files=lambda target: None,
    )
    metrics = Metrics(folder / "metrics.jsonl", name="probe", logging_steps=10**6, save_steps=10**6, say=_quiet)
    trainer = Trainer(job, TrainState(decisions=decisions), metrics, StopRequest())
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < WARM_UP + MEASURED or (sum(seconds[WARM_UP:]) < ENOUGH and len(seconds) < MOST):
        seconds.append(trainer.rehearse())
        if len(seconds) > WARM_UP and time.perf_counter() - started > LONG_ENOUGH:
            break
    typical = statistics.fmean(seconds[WARM_UP:])
    return Probe(
        seconds=typical,
        once=max(0.0, sum(seconds[:WARM_UP]) - WARM_UP * typical),
        memory=None if measured is None else measured.bytes(),
    )


def _measure_making(recipe: Recipe, stage: CacheStageConfig | GenerateStageConfig, vocab_size: int) -> Probe:
    """In the process of the probe: seconds of a batch of a stage that trains nothing."""
    from edgewright.planner.devices import find_device
    from edgewright.planner.making import decisions_of
    from edgewright.planner.peak import PeakMemory
    from edgewright.planner.rehearsal import rehearsal_of

    decisions = decisions_of(stage, find_device(None))
    measured = PeakMemory.begin(decisions["device"])
    started = time.perf_counter()
    batch = rehearsal_of(recipe, stage, vocab_size, decisions)
    batch()
    once = time.perf_counter() - started
    seconds: list[float] = []
    while len(seconds) < MEASURED or (sum(seconds) < ENOUGH and len(seconds) < MOST):
        seconds.append(batch())
        if time.perf_counter() - started > LONG_ENOUGH:
            break
    typical = statistics.fmean(seconds)
    memory = None if measured is None else measured.bytes()
    return Probe(seconds=typical, once=max(0.0, once - typical), memory=memory)


def _random(model: PreTrainedModel) -> PreTrainedModel:
    """The architecture with small random weights."""
    import torch
    from torch import nn

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        filled = torch.empty(parameter.shape, dtype=parameter.dtype)
        filled = filled.normal_(std=0.02) if filled.ndim > 1 else filled.fill_(1.0)
        memo[id(parameter)] = nn.Parameter(filled, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def random_batches(recipe: Recipe, vocab_size: int, global_batch: int) -> Batches:
    """Enough sequences for a step, with borders of documents; token 0 starts them."""
    import numpy as np

    from edgewright.data import Batches, TokenStream

    length = recipe.data.sequence_length
    tokens = np.random.default_rng(recipe.seed).integers(1, vocab_size, length * (global_batch + 1) + 1)
    tokens[::DOCUMENT_TOKENS] = 0
    stream = TokenStream(tokens=tokens, documents=len(tokens) // DOCUMENT_TOKENS + 1, bytes=4 * len(tokens))
    return Batches(
        stream,
        sequence_length=length,
        seed=recipe.seed,
        restart_at_documents=recipe.data.restart_at_documents,
        start_id=0,
        eos_id=0,
    )


def _quiet(line: str) -> None:
    """Nobody reads the progress of a probe."""


def main() -> None:
    """Entry point of the process."""
    from dataclasses import asdict

    from edgewright.recipe import load_recipe

    request = json.loads(sys.argv[1])
    recipe = load_recipe(request["recipe"], request["overrides"])
    stage = next(stage for stage in recipe.stages if stage.name == request["stage"])
    if stage.type == "train":
        with tempfile.TemporaryDirectory() as folder:
            found = _measure(recipe, stage, request["vocab_size"], Path(folder))
    else:
        assert stage.type != "text", "no model reads there"
        found = _measure_making(recipe, stage, request["vocab_size"])
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
