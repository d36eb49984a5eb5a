"""Every optimizer over projected gradients in a whole run: killed and gone on with, it gives the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import edgewright
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, weights, write_recipe  # noqa: E402

SECTIONS = {
    "apollo": "{type: apollo, rank: 0.25, update_proj_gap: 5, states: int8}",
    "apollo_mini": "{type: apollo_mini, learning_rate: 0.02, update_proj_gap: 5, states: bf16}",
    "galore": "{type: galore, rank: 16, update_proj_gap: 5, roles: [mlp]}",
    "fira": "{type: fira, update_proj_gap: 5, states: bf16, exclude: [k_proj]}",
    "gradnorm_lorp": "{type: gradnorm_lorp, update_proj_gap: 5, weight_decay: 0.1}",
}
KILLED = """
import os, sys
import edgewright
from edgewright.data import Batches
original, left = Batches.batch, int(sys.argv[3])
def batch(self, position, size):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return original(self, position, size)
Batches.batch = batch
edgewright.run(sys.argv[1], f"output_dir={sys.argv[2]}")
"""


def recipe_with(section, folder):
    path = write_recipe(folder)
    path.write_text(path.read_text().replace("{type: adamw, learning_rate: 5e-3}", section))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_kill_9_and_the_same_command_again_gives_the_same_bits(name, tmp_path):
    """Killed in step 7: it goes on from the checkpoint of step 4, over the change of the projection at 5 and at 10."""
    recipe = recipe_with(SECTIONS[name], tmp_path)
    edgewright.run(recipe, f"output_dir={tmp_path / 'whole'}")
    command = [sys.executable, "-c", KILLED, recipe, tmp_path / "killed", "14"]
    assert subprocess.run(command, capture_output=True).returncode == -9
    edgewright.run(recipe, f"output_dir={tmp_path / 'killed'}")
    steps = curve(tmp_path / "whole")
    assert float.fromhex(steps[-1][1]) < float.fromhex(steps[0][1]) - 0.05
    assert curve(tmp_path / "killed") == steps
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    state = load_file(tmp_path / "whole/stages/base/checkpoints/step-00000012/optimizer.safetensors")
    assert {"exp_avg/model.layers.0.mlp.up_proj.weight", "exp_avg/model.embed_tokens.weight"} <= state.keys()
    assert ("seed/model.layers.0.mlp.up_proj.weight" in state) == name.startswith("apollo")


@pytest.mark.parametrize(
    ("section", "code", "found"),
    [
        ("{type: apolo}", "EW-114", "apollo"),
        ("{type: apollo, roles: [attention, router]}", "EW-113", "'attention' or 'mlp'"),
        ("{type: galore, rank: 1.5}", "EW-112", "a whole number or at most 1"),
        ("{type: galore, rank: 0}", "EW-113", "more than 0"),
        ("{type: fira, states: fp8}", "EW-113", "int8"),
        ("{type: apollo_mini, proj: svd}", "EW-110", "proj"),
        ("{learning_rate: 1.0}", "EW-111", "adamw"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_its_place(section, code, found, tmp_path):
    with pytest.raises(RecipeErrors) as refused:
        load_recipe(recipe_with(section, tmp_path))
    assert code in refused.value.message() and found in refused.value.message()
    assert "tiny.yaml:" in refused.value.message()


def test_a_rank_above_a_matrix_stops_the_run_before_it_trains(tmp_path):
    """Also in a later stage, before the first one, and also in one whose weights a method represents."""
    recipe = recipe_with(SECTIONS["apollo"], tmp_path)
    later = """
  - name: second
    student: {type: stage, stage: base}
    methods: [{type: ternary, granularity: row}]
    optimizer: {type: galore, rank: 65}
    budget: {max_steps: 2}
"""
    recipe.write_text(recipe.read_text().replace("evaluate: null", later.strip("\n") + "\nevaluate: null"))
    with pytest.raises(RecipeError, match=r"(?s)model.layers.0.self_attn.q_proj.weight.*EW-741.*65"):
        edgewright.run(recipe, f"output_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run/stages/base/checkpoints").exists()


def test_check_finds_a_rank_above_a_matrix(tmp_path):
    recipe = recipe_with("{type: apollo, rank: 65}", tmp_path)
    assert [error.code for error in edgewright.check(recipe).errors] == ["EW-741"]
    assert edgewright.check(recipe, "stages.base.optimizer.rank=64").ok


def test_recipes_without_an_optimizer_get_adamw(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("    optimizer: {type: adamw, learning_rate: 5e-3}\n", ""))
    assert load_recipe(path).stages[0].optimizer.type == "adamw"
