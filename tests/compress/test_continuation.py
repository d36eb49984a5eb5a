"""Ternary training that goes on from a dense stage: the same weights, a schedule of its own, exact exports."""

import json
import sys
from pathlib import Path

import pytest
import torch
from methods import logits
from safetensors.torch import load_file

import edgewright
from edgewright.compress.ternary import TernaryConfig
from edgewright.student import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import write_recipe  # noqa: E402

LONGER = """
  - name: longer
    student: {type: stage, stage: student}
    methods: [{type: ternary, quantizer: seq_ternary}]
    budget: {max_steps: 1}
    training: {per_device_train_batch_size: 4, eval_steps: 0, eval_sequences: 4}
evaluate: null"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuation")
    overrides = [
        "data.sequence_length=32",
        "stages.student.objective={type: next_token}",
        'stages.student.methods=[{"type": "ternary", "quantizer": "seq_ternary", "warmup_ratio": 0.5}]',
        "stages.student.schedule={type: cosine, warmup_ratio: 0.5}",
        "stages.student.training.save_steps=100",
        "stages.student.training.logging_steps=1",
    ]
    recipe = write_recipe(folder, ternary=True)
    recipe.write_text(recipe.read_text().replace("evaluate: null", LONGER))
    edgewright.run(recipe, f"output_dir={folder / 'run'}", *overrides)
    return folder / "run" / "stages"


def test_the_second_stage_starts_from_the_very_weights_of_the_first(finished):
    dense = load_file(finished / "base/model/model.safetensors")
    first = load_file(finished / "student/checkpoints/step-00000000/model/model.safetensors")
    assert dense.keys() <= first.keys()
    assert all(torch.equal(first[name], dense[name]) for name in dense)
    assert {name.rpartition(".")[2] for name in first.keys() - dense.keys()} == {"scale"}


def test_its_first_forward_without_rounding_is_the_dense_model_bit_for_bit(finished):
    model, dense = load_model(finished / "base/model"), load_model(finished / "base/model")
    method = TernaryConfig(quantizer="seq_ternary").build()
    method.prepare(model)
    for module in method._layers.values():
        module.strength = 0.0
    assert torch.equal(logits(model), logits(dense))


def test_its_learning_rate_warms_up_again(finished):
    lines = [json.loads(line) for line in (finished / "student/metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[0] < rates[1] < rates[2] < max(rates) == pytest.approx(2e-3)
    assert rates[-1] < 0.5 * max(rates)


def test_it_ends_on_the_lattice(finished):
    from edgewright.export.source import load_source

    source = load_source(finished / "student/model")
    assert len(source.lattice) == 7
    trained = load_file(finished / "student/checkpoints/step-00000008/model/model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    steps = trained[f"{name}.scale"] * (2 / 3)
    scales = torch.from_numpy(source.lattice[f"{name}.weight"].scales[:, 0])
    torch.testing.assert_close(scales, steps, rtol=2**-8, atol=0)
    assert not torch.equal(trained[f"{name}.scale"], load_scale(finished, name)), "scales are trained"


def test_learned_scales_go_on_to_a_stage_of_the_same_rule(finished):
    ended = load_file(finished / "student/checkpoints/step-00000008/model/model.safetensors")
    began = load_file(finished / "longer/checkpoints/step-00000000/model/model.safetensors")
    assert began.keys() == ended.keys()
    assert all(torch.equal(began[name], ended[name]) for name in ended)


@pytest.mark.parametrize("changes", [{"quantizer": "seq_2bit"}, {"granularity": "tensor"}, {"exclude": ["up_proj"]}])
def test_learned_scales_of_another_meaning_are_not_taken(finished, changes):
    """Layers that had another rule, other groups, or none, start from their weights."""
    before = TernaryConfig.model_validate({"quantizer": "seq_ternary"} | changes)
    trained = load_file(finished / "student/checkpoints/step-00000008/model/model.safetensors")
    model = load_model(finished / "base/model")
    method = TernaryConfig(quantizer="seq_ternary").build()
    method.prepare(model)
    layers = {name: layer for name, layer in method._layers.items() if name.endswith("up_proj")}
    own = {name: layer.scale.detach().clone() for name, layer in layers.items()}
    method.go_on([before], trained)
    assert own and all(torch.equal(layers[name].scale, own[name]) for name in own)
    method.go_on([method.config], trained)
    assert all(torch.equal(layers[name].scale, trained[f"{name}.scale"]) for name in own)


def load_scale(stages, name):
    return load_file(stages / "student/checkpoints/step-00000000/model/model.safetensors")[f"{name}.scale"]
