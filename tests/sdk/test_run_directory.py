"""One directory, one run: another recipe, another process, a fresh start, and what is never removed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgewright
from edgewright.errors import Locked, OutOfResources, RecipeError, Unsafe

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import weights  # noqa: E402


def test_another_recipe_in_the_same_directory_is_refused(finished):
    recipe, run = finished
    with pytest.raises(RecipeError, match="EW-705") as refused:
        edgewright.run(recipe, f"output_dir={run}", "stages.base.optimizer.learning_rate=1e-3")
    assert "optimizer" in str(refused.value)


def test_a_stage_that_has_not_begun_may_change(finished, tmp_path):
    """A run that was refused can be mended, and one that was stopped can have another end."""
    recipe, _ = finished
    nothing = ["stages.base.budget.max_steps=1", "stages.base.training.eval_steps=0", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(RecipeError, match="EW-720"):
        edgewright.run(recipe, *nothing, "stages.base.methods=[{type: lora, rank: 999}]")
    assert [path.name for path in (tmp_path / "run/stages/base").iterdir()] == ["stage.json"]
    edgewright.run(recipe, *nothing, "stages.base.methods=[{type: lora, rank: 2}]")
    with pytest.raises(RecipeError, match="EW-705"):
        edgewright.run(recipe, *nothing, "stages.base.methods=[{type: lora, rank: 3}]")


def test_settings_that_change_no_bits_may_change(finished):
    recipe, run = finished
    edgewright.run(
        recipe, f"output_dir={run}", "stages.base.training.save_steps=5", "stages.base.training.logging_steps=1"
    )


def test_fresh_starts_again(finished, tmp_path):
    recipe, run = finished
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", "stages.base.budget.max_steps=2")
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", fresh=True)
    assert weights(tmp_path / "run") == weights(run)


HOLDER = """
import sys, time
from pathlib import Path
from edgewright.run_directory import _locked
with _locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_directory_is_refused_with_the_pid(finished, tmp_path):
    recipe, _ = finished
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(Locked, match=f"process {holder.pid}") as refused:
            edgewright.run(recipe, f"output_dir={folder}")
        assert refused.value.exit_code == 6
    finally:
        holder.kill()
        holder.communicate()
    time.sleep(0.1)
    edgewright.run(recipe, f"output_dir={folder}", "stages.base.budget.max_steps=1")  # the lock of the dead is free


def test_fresh_removes_nothing_that_is_not_the_runs(finished, tmp_path):
    recipe, run = finished
    mine = tmp_path / "data"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(Unsafe, match="EW-405") as refused:
            edgewright.run(recipe, f"output_dir={tmp_path}", fresh=fresh)
        assert refused.value.exit_code == 8
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "precious.txt"]


def test_fresh_keeps_what_the_recipe_reads(finished, tmp_path):
    recipe, run = finished
    edgewright.run(recipe, f"output_dir={tmp_path}", "stages.base.budget.max_steps=1")
    start = f"stages.base.student={{type: checkpoint, model: {tmp_path / 'stages/base/model'}}}"
    with pytest.raises(Unsafe, match="EW-405"):
        edgewright.run(recipe, f"output_dir={tmp_path}", start, fresh=True)
    assert (tmp_path / "stages/base/model/model.safetensors").exists()


def test_a_file_where_the_run_should_be(finished, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutOfResources, match="EW-406"):
        edgewright.run(finished[0], f"output_dir={tmp_path / 'run'}")


def test_a_refused_recipe_leaves_the_provenance_of_the_run(finished):
    recipe, run = finished
    before = (run / "recipe.resolved.yaml").read_bytes()
    with pytest.raises(RecipeError, match="EW-705"):
        edgewright.run(recipe, f"output_dir={run}", "stages.base.optimizer.weight_decay=0.5")
    assert (run / "recipe.resolved.yaml").read_bytes() == before
