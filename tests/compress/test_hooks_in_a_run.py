"""The trainer calls what methods live by: seen from outside, in a whole run of a few steps."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

import edgewright
from edgewright.compress.ternary_linear import TernaryLinear

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import write_recipe  # noqa: E402


def trained(folder, method, *more):
    """The stage directory of a run of a few steps."""
    overrides = [f"stages.base.methods={json.dumps([method])}", "stages.base.budget.max_steps=6", *more]
    edgewright.run(write_recipe(folder), f"output_dir={folder / 'run'}", *overrides, say=lambda line: None)
    return folder / "run/stages/base"


def losses(stage):
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_forwards_see_the_strength_of_the_warm_up(tmp_path, monkeypatch):
    seen = []
    forward = TernaryLinear.forward

    def watched(self, x):
        if self.training and torch.is_grad_enabled() and not isinstance(x, FakeTensor):  # else it is the plan's
            seen.append(self.strength)
        return forward(self, x)

    monkeypatch.setattr(TernaryLinear, "forward", watched)
    trained(tmp_path, {"type": "ternary", "warmup_ratio": 0.7}, "stages.base.training.compile=off")
    assert sorted(set(seen)) == pytest.approx([1 / 4.2, 2 / 4.2, 3 / 4.2, 4 / 4.2, 1.0]) and seen == sorted(seen)


def test_the_first_loss_of_a_warm_up_is_not_that_of_rounded_weights(tmp_path):
    first = {
        ratio: losses(trained(tmp_path / str(ratio), {"type": "ternary", "warmup_ratio": ratio}))[0]
        for ratio in (0.0, 0.7)
    }
    assert first[0.7] != first[0.0]


def test_what_is_masked_gets_neither_gradient_nor_moments(tmp_path):
    stage = trained(tmp_path, {"type": "sparse", "density": 0.5}, "stages.base.optimizer.weight_decay=0.1")
    saved = stage / "checkpoints/step-00000006"
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["stages"][0]["methods"]["sparse"]["density"] == pytest.approx(0.5)
    weights, optimizer = load_file(saved / "model/model.safetensors"), load_file(saved / "optimizer.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    masked = weights[name] == 0
    assert masked.float().mean() == 0.5
    moments = {key: value for key, value in optimizer.items() if key.endswith(name) and value.shape == masked.shape}
    assert len(moments) == 2
    for moment in moments.values():
        assert torch.count_nonzero(moment[masked]) == 0 < torch.count_nonzero(moment[~masked])
