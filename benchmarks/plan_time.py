"""Predicted against measured time: what `plan` says after its probe, and what the training then takes.

    python benchmarks/plan_time.py [--only NAME] [--share 1.0]

Every configuration is planned in one process (a probe of a few steps, with random weights and tokens, in another) and
trained in a third, one after the other. Compared is the time of all steps, evaluations and checkpoints aside; what a
table of rates alone would have said is printed beside it. Bar: within 15 % after the probe.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import ROOT, header, worker
from plan_memory import DISTILL, MIDDLE, SMALL, recipe_text

CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "1m fp32": ({"student": SMALL, "steps": 60}, {"per_device_train_batch_size": 16}),
    "4m fp32, accumulated": (
        {"steps": 30},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
    "4m ternary, apollo": ({"methods": "[{type: ternary}]", "optimizer": "{type: apollo}", "steps": 25}, {}),
    "4m distilled": ({"objective": DISTILL, "steps": 20}, {}),
    "20m bf16": ({"student": MIDDLE, "steps": 20}, {"precision": "bf16"}),
}


def write_recipe(folder: Path, name: str, share: float) -> Path:
    own, training = CASES[name]
    steps = own["steps"]
    assert isinstance(steps, int)
    path = folder / "recipe.yaml"
    path.write_text(recipe_text({**own, "steps": max(5, round(share * steps))}, training), encoding="utf-8")
    return path


def plan(recipe: Path, data: Path) -> None:
    """The worker that predicts."""
    from edgewright.plan import predicted
    from edgewright.planner.devices import find_device
    from edgewright.planner.probe import Probe, probe
    from edgewright.planner.stage_plan import StagePlan
    from edgewright.recipe import StageConfig, load_recipe

    tables = []

    def probed(stage: StageConfig, planned: StagePlan) -> Probe:
        tables.append(planned.time.seconds)
        return probe(recipe, [], stage.name, 4096)

    (stage,) = predicted(recipe, load_recipe(recipe), find_device("cpu"), 4096, probed, advice=False).stages
    print(json.dumps({"seconds": stage.time.seconds, "probed": stage.time.source == "probe", "table": tables[0]}))


def train(recipe: Path, data: Path) -> None:
    """The worker that trains."""
    from plan_memory import corpus_of

    from edgewright.recipe import load_recipe
    from edgewright.stage import train_stage
    from edgewright.training import StopRequest

    loaded = load_recipe(recipe)
    corpus, stop = corpus_of(loaded, data), StopRequest()
    stage = train_stage(loaded, loaded.stages[0], corpus, recipe.parent / "stage", {}, say=lambda line: None, stop=stop)
    print(json.dumps({"seconds": stage.seconds, "steps": stage.steps}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--worker", nargs=3)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *paths = arguments.worker
        {"plan": plan, "train": train}[kind](*(Path(path) for path in paths))
        return
    header()
    worst, data = 0.0, ROOT / "build/plan_memory"
    for name in arguments.only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            paths = (str(write_recipe(Path(folder), name, arguments.share)), str(data))
            planned = worker(__file__, "--worker", "plan", *paths)
            assert planned["probed"], "the probe gave no time"
            measured = worker(__file__, "--worker", "train", *paths)
        error = planned["seconds"] / measured["seconds"] - 1
        worst = max(worst, abs(error))
        print(
            f"{name:22} {measured['steps']:3} steps  predicted {planned['seconds']:5.1f} s  measured "
            f"{measured['seconds']:5.1f} s  {error:+.1%}   (by a table alone {planned['table']:5.1f} s, "
            f"{planned['table'] / measured['seconds'] - 1:+.0%})",
            flush=True,
        )
    print(f"largest error {worst:.1%} (bar 15 %)")
    sys.exit(worst > 0.15)


if __name__ == "__main__":
    main()
