"""Models that keep their factors: what their directory says, who opens it, and what damage is found."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from families import save_byte_tokenizer, save_family
from methods import prepared, small_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import edgewright
from edgewright.compress.factor_format import factored_layers, marked, unmarked
from edgewright.compress.factor_mark import KIND
from edgewright.compress.factored_model import mark
from edgewright.compress.factors import FactoredLinear
from edgewright.compress.lost import LostConfig
from edgewright.compress.lowrank import LowRankConfig
from edgewright.errors import BadInput, RecipeError
from edgewright.recipe import load_recipe
from edgewright.student import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import write_recipe  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory, model) of LOST with its activation; a test must not change it."""
    directory = tmp_path_factory.mktemp("factored")
    model, method = prepared(LostConfig(rank=32, columns=0.1, gamma=0.6))
    finished, _ = method.finish(model)
    finished.generation_config = GenerationConfig(temperature=0.3, do_sample=True)
    finished.save_pretrained(directory)
    mark(finished, directory)
    save_byte_tokenizer(directory, bos=True)
    return directory, finished.eval()


@pytest.fixture
def copied(saved, tmp_path):
    """A directory that may be changed."""
    return Path(shutil.copytree(saved[0], tmp_path / "model"))


def change(directory, edit):
    """Edit config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


def test_it_opens_as_the_model_that_was_saved(saved):
    directory, model = saved
    opened = load_model(directory)
    assert torch.equal(logits(opened), logits(model))
    assert opened.state_dict().keys() == model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in opened.parameters())
    layer = opened.model.layers[0].mlp.up_proj
    assert isinstance(layer, FactoredLinear)
    assert (layer.method, layer.activation, layer.mix, layer.rank) == ("lost", "silu", 0.6, 32)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert opened.generation_config.temperature == 0.3
    assert {p.dtype for p in load_model(directory, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_it_says_what_it_is_and_transformers_refuses_it_by_name(saved):
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "edgewright_factors" and config["architectures"] == ["edgewright_factors"]
    assert config[KIND]["of"] == "llama" and len(config[KIND]["layers"]) == 14
    with pytest.raises(ValueError, match="edgewright_factors"):
        AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)


def test_saved_again_it_is_the_same(saved, tmp_path):
    directory, _ = saved
    opened = load_model(directory)
    opened.save_pretrained(tmp_path)
    mark(opened, tmp_path)
    first, second = (json.loads((place / "config.json").read_text()) for place in (directory, tmp_path))
    assert first[KIND] == second[KIND]
    assert unmarked(first) == unmarked(second)


def test_a_plain_model_gets_no_mark(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    mark(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert not factored_layers(json.loads(before))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_other_families_biases_and_some_layers_only(family, tmp_path):
    model = load_model(save_family(family, tmp_path / "plain"))
    method = LowRankConfig(rank=8, activation="silu", layers=("q_proj", "down_proj")).build()
    method.prepare(model)
    model.save_pretrained(tmp_path / "factored")
    mark(model, tmp_path / "factored")
    save_byte_tokenizer(tmp_path / "factored", bos=True)
    opened = load_model(tmp_path / "factored")
    assert opened.config._attn_implementation == model.config._attn_implementation
    assert (opened.model.layers[0].self_attn.q_proj.bias is not None) == (family == "qwen2")
    assert torch.equal(logits(opened), logits(model.eval()))


def test_marking_is_undone_whole():
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    layers = {"a": {"method": "lowrank", "rank": 2, "activation": "none", "columns": None, "mix": 1.0}}
    section = {**config, "model_type": KIND, KIND: {"of": "llama", "layers": layers}}
    assert unmarked(marked(config, factored_layers(section))) == config


# ---------------------------------------------------------------- damage

Q = "model.layers.0.self_attn.q_proj"


def _layer(key, value):
    return lambda config: config[KIND]["layers"][Q].update({key: value})


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.pop(KIND),
        lambda config: config.update({"model_type": "llama"}),
        lambda config: config[KIND].update({"of": KIND}),
        lambda config: config[KIND].update({"layers": {}}),
        lambda config: config[KIND].update({"more": 1}),
        lambda config: config[KIND].update({"layers": ["a"]}),
        _layer("rank", 0),
        _layer("rank", "32"),
        _layer("rank", 2**40),
        _layer("rank", 300),
        _layer("activation", "exec"),
        _layer("columns", "zz"),
        _layer("columns", "00" * 32),
        _layer("columns", "ff"),
        _layer("columns", None),
        _layer("mix", 1.5),
        _layer("mix", float("nan")),
        lambda config: config[KIND]["layers"].update({"model.nothing": config[KIND]["layers"][Q]}),
        lambda config: config[KIND]["layers"].update({"model.norm": config[KIND]["layers"][Q]}),
    ],
)
def test_a_damaged_section_is_refused(copied, edit):
    change(copied, edit)
    with pytest.raises(BadInput) as error:
        load_model(copied)
    assert error.value.code == "EW-722"


@pytest.mark.parametrize("name", [f"{Q}.up.weight", f"{Q}.columns.weight", "model.norm.weight"])
def test_missing_weights_are_never_made_up(copied, name):
    weights = load_file(copied / "model.safetensors")
    del weights[name]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=name.replace(".", r"\.")) as error:
        load_model(copied)
    assert error.value.code == "EW-324"


def test_weights_beyond_the_model_and_of_other_shapes_are_refused(copied):
    weights = load_file(copied / "model.safetensors")
    save_file({**weights, f"{Q}.weight": torch.ones(2, 2)}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="EW-324"):
        load_model(copied)
    save_file({**weights, f"{Q}.up.weight": torch.ones(2, 2)}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="EW-324"):
        load_model(copied)


# ---------------------------------------------------------------- in a run

STAGES = """
  - name: further
    student: {type: stage, stage: base}
    budget: {max_steps: 3}
    training: {per_device_train_batch_size: 2}
  - name: pupil
    student: {type: preset, preset: llama-1m, hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
    objective: {type: distill, teacher: {type: stage, stage: further}, kl_weight: 0.5}
    budget: {max_steps: 2}
    training: {per_device_train_batch_size: 2}
evaluate: {max_tokens: 500}
"""


def test_it_is_trained_further_teaches_and_is_evaluated(tmp_path):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("evaluate: null", STAGES.strip("\n")))
    methods = "stages.base.methods=[{type: lost, rank_fraction: 0.25}]"
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", methods)
    base, further = (tmp_path / "run/stages" / name / "model" for name in ("base", "further"))
    first, second = (json.loads((place / "config.json").read_text()) for place in (base, further))
    assert first[KIND] == second[KIND]
    ours, theirs = load_file(further / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if "mlp" in name)
    results = json.loads((tmp_path / "run/results.json").read_text())
    scores = {row["name"]: row["bits_per_byte"] for row in results["checkpoints"]}
    assert 1 < scores["further"] < scores["base"] + 0.1


def test_an_export_that_cannot_hold_the_factors_is_refused_with_the_recipe(tmp_path):
    recipe = write_recipe(tmp_path)
    stages = STAGES.split("evaluate")[0].strip("\n")
    export = "exports: [{name: file, model: further, to: gguf, quant: f16}]"
    recipe.write_text(recipe.read_text().replace("evaluate: null", f"{stages}\n{export}\nevaluate: null"))
    load_recipe(recipe, ["stages.base.methods=[{type: lost, rank: 8, activation: none}]"])
    for methods in ("{type: lost, rank: 8}", "{type: lowrank, rank: 8, merge: false}"):
        with pytest.raises(RecipeError) as error:
            load_recipe(recipe, [f"stages.base.methods=[{methods}]"])
        assert error.value.code == "EW-724"
        assert "further" in str(error.value)


def test_weights_that_a_method_would_not_use_are_spoken_of(tmp_path):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("evaluate: null", STAGES.split("evaluate")[0].strip("\n")))

    def notes(methods):
        further = f"stages.further.methods=[{methods}]"
        return [each.found for each in edgewright.check(recipe, further).checks if each.status == "note"]

    assert any("sltrain draws new weights" in note for note in notes("{type: sltrain, rank: 8}"))
    assert any("lowrank draws new weights" in note for note in notes("{type: lowrank, rank: 8, init: cola}"))
    assert not notes("{type: sltrain, rank: 8, init: spectral}")
    assert not notes("{type: lowrank, rank: 8}")
