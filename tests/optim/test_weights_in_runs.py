"""`training.weights` in whole runs: it trains, goes on after a signal with the same bits, and ends as a plain model."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import edgewright
from edgewright.data import Batches
from edgewright.errors import RecipeError
from edgewright.optim.bf16_weight import Bf16Weight
from edgewright.optim.int8_weight import Int8Weight
from edgewright.recipe import load_recipe
from edgewright.student import load_model
from edgewright.training import Interrupted
from edgewright.weights import check_weights, hold_weights_as, plain_state_dict, predicted_bytes, stored_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

RUNS = {
    "q_apollo_mini": ("int8", "{type: apollo_mini, learning_rate: 0.02, update_proj_gap: 5, states: int8}"),
    "adamw_8bit": ("bf16", "{type: adamw_8bit, learning_rate: 5e-3}"),
    "q_galore": ("int8", "{type: q_galore, update_proj_gap: 1, scale: 1.0}"),
    "adamw": ("int8", "{type: adamw, learning_rate: 5e-3}"),
    "muon": ("fp32", "{type: muon, learning_rate: 5e-3}"),
}
FAST = {"q_apollo_mini", "adamw_8bit"}
LAST = "stages/base/checkpoints/step-00000012"


def llama(hidden=64, intermediate=96, tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def recipe_of(name, folder):
    path, (weights, optimizer) = write_recipe(folder), RUNS[name]
    overrides = [f"stages.base.training.weights={weights}", f"stages.base.optimizer={optimizer}"]
    load_recipe(path, overrides).dump_yaml(folder / "narrow.yaml")
    return folder / "narrow.yaml"


def stop_in_step(monkeypatch, step):
    """A signal when the second micro-batch of that step is fetched."""
    original, calls = Batches.batch, []

    def batch(self, position, size):
        calls.append(position)
        if len(calls) == 2 * step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, position, size)

    monkeypatch.setattr(Batches, "batch", batch)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_a_run_that_was_stopped_gives_the_bits_of_one_that_was_not(name, tmp_path, monkeypatch, capsys):
    recipe = recipe_of(name, tmp_path)
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}")
    said = capsys.readouterr().err
    assert ("fp32; " in said) == (RUNS[name][0] != "fp32") and ("several times the time" in said) == ("8bit" in name)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(Interrupted):
            edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    edgewright.run(recipe, f"output_dir={tmp_path / 'stopped'}")
    losses = curve(tmp_path / "whole")
    assert float.fromhex(losses[-1][1]) < float.fromhex(losses[0][1]) - 0.1
    assert curve(tmp_path / "stopped") == losses
    for file in ("weights", "optimizer", "model/model"):
        ours, theirs = (load_file(tmp_path / run / LAST / f"{file}.safetensors") for run in ("stopped", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    check_plain(tmp_path / "whole", RUNS[name][0])


def check_plain(directory, weights):
    """The finished model is one of float32 for anybody, with the very values that were trained."""
    model = load_model(directory / "stages/base/model")
    parts = load_file(directory / LAST / "weights.safetensors")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    key = "model.layers.0.mlp.up_proj.weight"
    assert (f"{key}/codes" in parts) == (weights == "int8")
    if weights == "int8":
        stored = Int8Weight({part: parts[f"{key}/{part}"] for part in Int8Weight.PARTS})
        assert torch.equal(stored.dequantized(), weight)
    if weights != "fp32":
        embeddings = model.get_input_embeddings().weight
        assert torch.equal(embeddings.bfloat16().float(), embeddings)
        assert not torch.equal(weight.bfloat16().float(), weight) or weights == "bf16"


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_matrices_are_narrow_the_function_is_nearly_the_same_and_the_bytes_are_as_predicted(weights, tied):
    model, reference = llama(tied=tied), llama(tied=tied)
    with torch.device("meta"):
        predicted = predicted_bytes(llama(tied=tied), weights)
    note = hold_weights_as(model, weights)
    assert stored_bytes(model) == predicted < 0.55 * stored_bytes(reference)
    assert f"% {weights}" in note and "bytes a parameter" in note
    kind = Int8Weight if weights == "int8" else Bf16Weight
    layer = model.model.layers[0]
    assert type(layer.mlp.down_proj.weight) is kind and type(layer.self_attn.q_proj.weight) is kind
    assert type(model.get_input_embeddings().weight) is Bf16Weight
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert type(layer.input_layernorm.weight) is nn.Parameter
    ids = torch.arange(12)[None]
    ours, theirs = model(ids).logits, reference(ids).logits
    assert 0 < (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_the_plain_state_dict_has_a_tied_weight_once_and_none_is_needed_for_floats():
    model = llama()
    assert hold_weights_as(model, "fp32") is None and plain_state_dict(model) is None
    hold_weights_as(model, "int8")
    state = plain_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    assert all(type(tensor) is torch.Tensor and tensor.dtype == torch.float32 for tensor in state.values())
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_what_cannot_be_stored_narrow_is_refused_by_name():
    with torch.device("meta"):
        odd, other = llama(intermediate=65), nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(RecipeError, match=r"mlp.gate_proj[\s\S]*multiple of 128[\s\S]*4160") as error:
        check_weights(odd, "int8", methods=())
    assert error.value.code == "EW-745"
    check_weights(odd, "bf16", methods=())
    with pytest.raises(RecipeError, match="the method ternary") as error:
        check_weights(odd, "bf16", methods=["ternary"])
    assert error.value.code == "EW-746"
    check_weights(odd, "fp32", methods=["ternary"])
    with pytest.raises(RecipeError, match="no weights that could be stored as int8") as error:
        check_weights(other, "int8", methods=())
    assert error.value.code == "EW-747"


def test_a_run_refuses_a_method_with_narrow_weights_before_it_trains(tmp_path):
    path = write_recipe(tmp_path, ternary=True)
    with pytest.raises(RecipeError, match="the method ternary") as error:
        edgewright.run(path, "stages.student.training.weights=int8", f"output_dir={tmp_path / 'run'}")
    assert error.value.code == "EW-746"
    assert not list((tmp_path / "run").glob("stages/base/checkpoints/step-*"))
