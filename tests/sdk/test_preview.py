"""What would stop a later stage is found before the first is trained, by `check` and by `run`, for the same reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tiny_run import write_recipe

import edgewright
from edgewright.check import check
from edgewright.compress.factored_model import empty_model
from edgewright.errors import RecipeError
from edgewright.preview import check_head_of_family, preview, stored_architecture
from edgewright.recipe import load_recipe

LATE = {
    "EW-703": {"type": "ternary", "granularity": "group", "group": 256},
    "EW-704": {"type": "ternary", "exclude": [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]},
    "EW-708": {"type": "ternary", "exclude": ["dwn_proj"]},
    "EW-709": {"type": "ternary", "head": True},
    "EW-720": {"type": "lowrank", "rank": 65},
    "EW-721": {"type": "lowrank", "rank": 8, "restart_every": 7, "rewarm_steps": 1},
    "EW-726": {"type": "sparse", "density": 1e-5},
    "EW-727": {"type": "sparse", "density": 0.01, "mask": {"type": "static", "distribution": "erk_plus"}},
    "EW-728": {"type": "sparse", "mask": {"type": "gradual", "prune_every": 100}},
}


def overrides(folder: Path, *methods: dict[str, object]) -> list[str]:
    return [
        f"stages.student.methods={json.dumps(methods)}",
        "stages.student.objective={type: next_token}",
        f"output_dir={folder / 'run'}",
    ]


def refused(folder: Path, *changes: str) -> RecipeError:
    """The error that `check` and `run` both give; nothing was trained."""
    recipe = write_recipe(folder, ternary=True)
    (found,) = check(recipe, *changes).errors
    with pytest.raises(RecipeError) as raised:
        edgewright.run(recipe, *changes, say=lambda line: None)
    assert raised.value.message() == found.message()
    assert not list((folder / "run").glob("stages/*/checkpoints"))
    return raised.value


@pytest.mark.parametrize("code", LATE)
def test_a_late_stages_method_is_looked_at_before_the_first_stage(tmp_path: Path, code: str) -> None:
    assert refused(tmp_path, *overrides(tmp_path, LATE[code])).code == code


SHAPES = {
    "EW-762": {"type": "pruned", "source": {"type": "stage", "stage": "base"}, "hidden_size": 65},
    "EW-763": {"type": "grown", "source": {"type": "stage", "stage": "base"}, "hidden_size": 65},
}


def test_what_refuses_a_part_of_a_stage_says_which(tmp_path: Path) -> None:
    """The key that stands in the recipe, also where the component does not know its place there."""
    ternary = {"type": "ternary", "layers": ["q_proj"]}
    rank, block = (
        refused(tmp_path / name, *overrides(tmp_path / name, *methods))
        for name, methods in (
            ("rank", [ternary, {**LATE["EW-720"], "exclude": ["q_proj"]}]),
            ("block", [{"type": "lora", "rank": 4, "train_blocks": [7]}]),
        )
    )
    elastic = overrides(tmp_path / "sizes", {"type": "elastic", "hidden_size": [33]})
    sizes = refused(tmp_path / "sizes", *elastic, "stages.student.objective={type: sandwich}")
    assert rank.where == "stages.student.methods.1.rank"
    assert (block.code, block.where) == ("EW-734", "stages.student.methods.0.train_blocks")
    assert (sizes.code, sizes.where) == ("EW-765", "stages.student.methods.0.hidden_size")


@pytest.mark.parametrize("code", SHAPES)
def test_sizes_that_cannot_be_name_their_key(tmp_path: Path, code: str) -> None:
    shape = refused(tmp_path, *overrides(tmp_path), f"stages.student.student={json.dumps(SHAPES[code])}")
    assert (shape.code, shape.where) == (code, "stages.student.student.hidden_size")
    assert shape.message().startswith("stages.student.student.hidden_size: hidden_size cannot be 65")


def test_adapters_without_a_layer_left_say_why(tmp_path: Path) -> None:
    error = refused(tmp_path, *overrides(tmp_path, {"type": "lora", "rank": 4, "train_blocks": [0]}))
    assert (error.code, error.where) == ("EW-704", "stages.student.methods.0.train_blocks")
    assert "trained whole" in error.what and "fewer blocks" in str(error.fix)


def test_a_row_that_2_of_4_does_not_fit(tmp_path: Path) -> None:
    odd = "stages.base.student.intermediate_size=62"
    error = refused(tmp_path, odd, *overrides(tmp_path, {"type": "sparse", "mask": {"type": "2:4"}}))
    assert error.code == "EW-729" and "down_proj" in error.what


def test_two_methods_that_want_one_layer(tmp_path: Path) -> None:
    error = refused(tmp_path, *overrides(tmp_path, {"type": "lowrank", "rank": 8}, {"type": "ternary"}))
    assert error.code == "EW-711"


def test_the_output_head_needs_a_setting_of_its_own(tmp_path: Path) -> None:
    untied = "stages.base.student.tie_word_embeddings=false"
    error = refused(tmp_path, untied, *overrides(tmp_path, {"type": "ternary", "layers": ["lm_head"]}))
    assert error.code == "EW-708" and "head: true" in str(error.fix)
    taken = overrides(tmp_path, {"type": "ternary", "layers": ["lm_head"], "head": True})
    assert check(write_recipe(tmp_path, ternary=True), untied, *taken).ok


@pytest.mark.parametrize("method", [{"type": "lowrank", "rank": 8, "activation": "silu"}, {"type": "lost", "rank": 8}])
def test_factors_that_the_stage_before_leaves_belong_to_no_method(tmp_path: Path, method: dict[str, object]) -> None:
    before = f"stages.base.methods={json.dumps([method])}"
    error = refused(tmp_path, before, *overrides(tmp_path, {"type": "ternary"}))
    assert error.code == "EW-713" and method["type"] in str(error.found) and "merge: true" in str(error.fix)


def test_a_directory_with_factors_is_previewed_as_what_it_is(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    factors = json.dumps([{"type": "lowrank", "rank": 8, "activation": "silu", "layers": ["mlp.up_proj"]}])
    edgewright.run(
        recipe, f"stages.base.methods={factors}", "stages.base.budget.max_steps=1", f"output_dir={tmp_path / 'run'}"
    )
    model = tmp_path / "run/stages/base/model"
    start = [
        f"stages.base.student={{type: checkpoint, model: {model}}}",
        f"data.tokenizer={{type: pretrained, path: {model}}}",
    ]
    (error,) = check(recipe, *start, "stages.base.methods=[{type: ternary}]").errors
    assert error.code == "EW-713" and "mlp.up_proj " in error.message()
    left = [*start, "stages.base.methods=[{type: ternary, exclude: [up_proj]}]"]
    assert check(recipe, *left).ok
    loaded = load_recipe(recipe, left)
    (share,) = preview(loaded, loaded.stages[0], stored_architecture(model)).shares
    assert {name.rpartition(".")[2] for name in share[1]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    }


def test_gpt2s_layers_are_of_another_class(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    recipe = load_recipe(write_recipe(tmp_path), ["stages.base.methods=[{type: sparse}]"])
    with pytest.raises(RecipeError, match="EW-704") as raised:
        preview(recipe, recipe.stages[0], transformers.GPT2LMHeadModel(config))
    assert "Conv1D" in str(raised.value.found)


@pytest.mark.parametrize("place", ["student", "objective.teacher"])
def test_logits_that_training_does_not_know_are_seen_in_the_configuration(tmp_path: Path, place: str) -> None:
    """Of a later stage's student and teacher; the weights of the directory are never read."""
    edgewright.run(
        write_recipe(tmp_path),
        "stages.base.budget.max_steps=1",
        f"output_dir={tmp_path / 'before'}",
        say=lambda line: None,
    )
    made = tmp_path / "before/stages/base/model"
    directory = tmp_path / "scaled"
    shutil.copytree(made, directory)
    config = {**json.loads((made / "config.json").read_text()), "model_type": "hyperclovax", "logits_scaling": 2.0}
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["HyperCLOVAXForCausalLM"]}))
    start = f"{{type: checkpoint, model: {directory}}}"
    error = refused(
        tmp_path,
        f"data.tokenizer={{type: pretrained, path: {made}}}",
        f"stages.student.{place}={start}",
        f"output_dir={tmp_path / 'run'}",
    )
    assert error.code == "EW-712" and place.rpartition(".")[2].replace("student", "start") in str(error.where)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}),
        ("Cohere", {"logit_scale": 0.5}),
        ("Granite", {"logits_scaling": 4.0}),
        ("HyperCLOVAX", {}),
        ("GPT2", {}),
        ("OPT", {}),
    ],
)
def test_families_that_training_knows_pass(family: str, settings: dict[str, object]) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    check_head_of_family(empty_model(config, torch.float32), "start")


@pytest.mark.parametrize(
    ("family", "settings"), [("HyperCLOVAX", {"logits_scaling": 2.0}), ("RecurrentGemma", {"logits_soft_cap": 30.0})]
)
def test_a_factor_and_a_cap_that_training_does_not_know(family: str, settings: dict[str, object]) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    with pytest.raises(RecipeError, match="EW-712"):
        check_head_of_family(empty_model(config, torch.float32), "start")
