"""Every method in a whole run: stopped by a signal between micro-batches and gone on with, it gives the same bits."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from methods import CASES, Case
from safetensors.torch import load_file

import edgewright
from edgewright.compress.granet import GranetConfig
from edgewright.data import Batches
from edgewright.recipe import load_recipe
from edgewright.training import Interrupted

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def one_of_each():
    """All cases; but for the first of its method, each is slow."""
    seen: set[str] = set()
    for case in CASES:
        marks = [pytest.mark.slow] if case.config.type in seen else []
        seen.add(case.config.type)
        yield pytest.param(case, id=case.name, marks=marks)


def recipe_of(case, folder, *more):
    """12 steps of two micro-batches each, in bf16."""
    path = write_recipe(folder)
    overrides = [
        "data.sequence_length=32",
        "stages.base.training.precision=bf16",
        f"stages.base.methods={json.dumps([each.model_dump(mode='json') for each in (case.config, *more)])}",
        *(f"stages.base.student.{key}={value}" for key, value in SIZES.items()),
    ]
    load_recipe(path, overrides).dump_yaml(folder / "method.yaml")
    return folder / "method.yaml"


def stop_in_step(monkeypatch, step):
    """Send this process a signal when the second micro-batch of that step, the sixth for one, is fetched."""
    original, calls = Batches.batch, []

    def batch(self, position, size):
        calls.append(position)
        if len(calls) == 2 * step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, position, size)

    monkeypatch.setattr(Batches, "batch", batch)


def test_two_methods_of_a_type_keep_their_states_and_results_apart(tmp_path, monkeypatch):
    case = Case(name="two", config=GranetConfig(density=0.5, update_every=2, layers=("up_proj",)))
    second = GranetConfig(density=0.25, update_every=3, layers=("gate_proj",))
    recipe = recipe_of(case, tmp_path, second)
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(Interrupted):
            edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    results = json.loads((tmp_path / "stopped/results.json").read_text())["stages"][0]["methods"]
    assert {key: numbers["density"] for key, numbers in results.items()} == {
        "granet": pytest.approx(0.5, abs=0.01),
        "granet-2": pytest.approx(0.25, abs=0.01),
    }


@pytest.mark.parametrize("case", list(one_of_each()))
def test_a_run_that_was_stopped_gives_the_bits_of_one_that_was_not(case, tmp_path, monkeypatch):
    recipe = recipe_of(case, tmp_path)
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(Interrupted):
            edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    for kind in ("model", "checkpoints/step-00000012/model"):
        ours, theirs = (
            load_file(tmp_path / name / "stages/base" / kind / "model.safetensors") for name in ("stopped", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
