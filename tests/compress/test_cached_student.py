"""Students that learn from a cache: no teacher is there, exact resume, caches of other runs, recipes that cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import edgewright
from edgewright.data import prepare_data
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.recipe import load_recipe
from edgewright.stage import train_stage
from edgewright.trainer import Trainer
from edgewright.training import Interrupted, StopRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

STAGES = """
  - {name: said, type: cache, teacher: {type: stage, stage: base}, targets: {type: sampled, samples: 20}}
  - name: student
    student: {type: preset, preset: llama-1m, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
      intermediate_size: 32}
    objective: {type: distill, teacher: {type: cache, stage: said}, losses: LOSSES}
    optimizer: {type: adamw, learning_rate: 2e-3}
    budget: {max_steps: 6}
    training: {per_device_train_batch_size: 2, gradient_accumulation_steps: 2, save_steps: 2, eval_steps: 0,
      eval_sequences: 4, precision: fp32}
evaluate: null"""
LOSSES = "[{function: rs_kd, weight: 0.5}, {function: cross_entropy, weight: rest}]"


def cache_recipe(folder: Path) -> Path:
    path = write_recipe(folder)
    path.write_text(path.read_text().replace("\nevaluate: null", STAGES.replace("LOSSES", LOSSES)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory."""
    folder = tmp_path_factory.mktemp("student")
    edgewright.run(cache_recipe(folder), f"output_dir={folder / 'run'}", say=lambda line: None)
    return folder / "run"


def copied(run: Path, to: Path) -> Path:
    """A run directory and its recipe, to be changed."""
    shutil.copytree(run.parent, to, dirs_exist_ok=True)
    return to / "run"


def test_no_teacher_is_loaded_and_a_stopped_student_goes_on_with_the_same_bits(finished, tmp_path, monkeypatch) -> None:
    run = copied(finished, tmp_path)
    before = curve(run, "student")
    shutil.rmtree(run / "stages/student")
    shutil.rmtree(run / "stages/base/model")  # the teacher
    (run / "stages/base/model").mkdir()
    step = Trainer._one_step

    def stopping(self: Trainer) -> None:
        step(self)
        if self.state.step == 3 and self.job.directory.name == "student":
            self.stop.join()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stopping)
        with pytest.raises(Interrupted):
            rerun_student(run, tmp_path)
    rerun_student(run, tmp_path)
    assert curve(run, "student") == before


def rerun_student(run: Path, folder: Path) -> None:
    """Only the student's stage, as `run` does it."""
    recipe = load_recipe(folder / "tiny.yaml")
    corpus = prepare_data(recipe.data, run / "data", say=lambda line: None)
    earlier = {"base": run / "stages/base/model", "said": run / "stages/said/cache"}
    stage = recipe.stage("student")
    train_stage(recipe, stage, corpus, run / "stages/student", earlier, say=lambda line: None, stop=StopRequest())


def test_another_run_uses_the_cache_and_one_of_other_text_is_refused(finished, tmp_path) -> None:
    recipe = cache_recipe(tmp_path)
    text = recipe.read_text()
    begin, end = text.index("  - name: base"), text.index("  - name: student")
    folder = finished / "stages/said/cache"
    text = (text[:begin] + text[end:]).replace("{type: cache, stage: said}", f"{{type: cache, path: {folder}}}")
    recipe.write_text(text)
    edgewright.run(recipe, f"output_dir={tmp_path / 'one'}", say=lambda line: None)
    assert curve(tmp_path / "one", "student") == curve(finished, "student")
    broken = shutil.copytree(folder, tmp_path / "broken")
    piece = sorted(broken.glob("*.targets"))[-1]
    piece.write_bytes(piece.read_bytes()[:-1])
    report = edgewright.check(recipe, f"stages.student.objective.teacher.path={broken}")
    assert [error.code for error in report.errors] == ["EW-791"] and piece.name in report.errors[0].message()
    (tmp_path / "corpus/bisect.py").write_text("x = 1\n" * 400)
    with pytest.raises(RecipeError) as raised:
        edgewright.run(recipe, f"output_dir={tmp_path / 'two'}", say=lambda line: None)
    assert raised.value.code == "EW-794" and "training text" in raised.value.what


def refused(folder: Path, *changes: str) -> list[str]:
    with pytest.raises(RecipeErrors) as raised:
        edgewright.run(cache_recipe(folder), f"output_dir={folder / 'run'}", *changes, say=lambda line: None)
    return [error.code for error in raised.value.errors]


def test_recipes_that_cannot_be(tmp_path: Path) -> None:
    assert refused(tmp_path, "stages.said.temperature=0") == ["EW-113"]
    assert refused(tmp_path, "stages.said.targets={type: sampled, samples: 0}") == ["EW-113"]
    assert refused(tmp_path, "stages.said.temperature=2.0") == ["EW-797"]
    assert refused(tmp_path, "stages.said.targets={type: top_k, k: 4}") == ["EW-781"]
    assert refused(tmp_path, "stages.student.objective.losses=[{function: forward_kl}]") == ["EW-781"]
    assert refused(tmp_path, "stages.student.objective.teacher={type: cache, stage: base}") == ["EW-121"]
    assert refused(tmp_path, "stages.student.student={type: stage, stage: said}") == ["EW-121"]
    assert refused(tmp_path, "stages.student.objective.teacher={type: cache}") == ["EW-115"]
    assert refused(tmp_path, "stages.said.type=cahce") == ["EW-121", "EW-114"]


def test_runs_from_before_there_were_types_of_stages_go_on(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    kept = run / "stages/base/stage.json"
    settings = json.loads(kept.read_text())
    for added in ("type", "generated"):
        del settings[added]
    kept.write_text(json.dumps(settings))
    edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", say=lambda line: None)
    kept.write_text(json.dumps({**settings, "methods": [{"type": "ternary"}]}))
    with pytest.raises(RecipeError) as raised:
        edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", say=lambda line: None)
    assert raised.value.code == "EW-705"


def test_a_recipe_may_make_a_cache_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    """On another machine, say."""
    recipe = cache_recipe(tmp_path)
    text, model = recipe.read_text(), finished / "stages/base/model"
    begin, middle, end = (text.index(word) for word in ("  - name: base", "  - {name: said", "  - name: student"))
    text = text[:begin] + text[middle:end].replace(
        "{type: stage, stage: base}", f"{{type: checkpoint, model: {model}}}"
    )
    text = text.replace("{type: train, vocab_size: 300}", f"{{type: pretrained, path: {model}}}")
    recipe.write_text(text + "evaluate: null\nbench: null\n")
    assert edgewright.check(recipe).ok
    found = edgewright.plan(recipe, device="cpu", probe=False).to_json()
    assert found["fits"] and found["stage"] == "said" and found["memory"]["total"] > 0
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", say=lambda line: None)
    one, other = (each / "stages/said/cache/00000.targets" for each in (tmp_path / "run", finished))
    assert one.stat().st_size == pytest.approx(other.stat().st_size, rel=0.02)
    assert (tmp_path / "run/report.html").exists()
