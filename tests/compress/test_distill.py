"""The distill objective: its losses in a recipe, their weights over a run, and what a run refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import edgewright
from edgewright.compress.distill import STEPS_OF_NOTHING, Distill, DistillConfig, in_full
from edgewright.compress.targets import Logits, Sampled, Targets, TargetSource, TopK
from edgewright.errors import BadInput, RecipeError, RecipeErrors
from edgewright.recipe import load_recipe
from edgewright.vocabulary import check_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, weights, write_recipe  # noqa: E402

TEACHER = {"type": "stage", "stage": "base"}
LOSSES = "stages.student.objective.losses"
WITHOUT = ["stages.student.objective.kl_weight=null", "stages.student.methods=[]"]


class Nothing(TargetSource):
    """Gives what no test asks for."""

    gives = Logits

    def targets(self, inputs: Any, dtype: torch.dtype) -> Targets:
        raise AssertionError


def objective(*losses: dict[str, object]) -> Distill:
    config = DistillConfig.model_validate({"teacher": TEACHER, "losses": losses})
    return config.build(Nothing())


def test_weights_follow_their_schedules_and_leave_the_rest() -> None:
    schedule = {"type": "wsd", "warmup_ratio": 0.2, "decay_ratio": 0.3, "final_ratio": 0.1}
    made = objective(
        {"function": "forward_kl", "weight": 0.8, "schedule": schedule}, {"function": "cross_entropy", "weight": "rest"}
    )
    assert made.weights == [0.8, pytest.approx(0.2)]
    table = [made.weights_at(step, 100) for step in range(100)]
    assert table[0] == [pytest.approx(0.04), pytest.approx(0.96)]
    assert table[50] == [pytest.approx(0.8), pytest.approx(0.2)]
    assert table[99] == [pytest.approx(0.08), pytest.approx(0.92)]
    assert all(sum(row) == pytest.approx(1.0) for row in table)
    made.begin_step(0, 100)
    assert made.weights == table[0]


def test_parts_are_named_by_function_and_number() -> None:
    made = objective(
        {"function": "jsd", "weight": 0.4},
        {"function": "jsd", "weight": 0.4, "beta": 0.1},
        {"function": "cross_entropy", "weight": 0.2},
    )
    assert made.parts == ("jsd", "jsd-2", "cross_entropy")


def test_the_short_keys_are_a_list_of_two() -> None:
    short = DistillConfig.model_validate({"teacher": TEACHER, "kl_weight": 0.9, "temperature": 2.0})
    kinds = [(loss.function, loss.weight) for loss in short.weighted()]
    assert kinds == [("forward_kl", 0.9), ("cross_entropy", "rest")]
    assert short.weighted()[0].temperature == 2.0  # type: ignore[union-attr]
    only = DistillConfig.model_validate({"teacher": TEACHER, "kl_weight": 1.0})
    assert [loss.function for loss in only.weighted()] == ["forward_kl"]
    long = DistillConfig.model_validate(
        {"teacher": TEACHER, "losses": [loss.model_dump() for loss in short.weighted()]}
    )
    teacher = {"weights": "fp32", **TEACHER}
    before = {"type": "distill", "teacher": teacher, "kl_weight": 0.9, "temperature": 2.0}  # as older runs kept it
    assert in_full(before) == in_full(short.model_dump(mode="json")) == in_full(long.model_dump(mode="json"))
    assert in_full(before) != in_full({**before, "kl_weight": 0.8})


@pytest.mark.parametrize(
    ("losses", "code", "found"),
    [
        ("[{function: forward_kll}]", "EW-114", "did you mean forward_kl"),
        ("[{weight: 1}]", "EW-111", "function: cross_entropy | forward_kl"),
        ("[{function: forward_kl, temperature: 0}]", "EW-113", "more than 0"),
        ("[{function: forward_kl, weight: 0}]", "EW-113", "more than 0"),
        ("[{function: jsd, beta: 1}]", "EW-113", "less than 1"),
        ("[{function: top_k, k: 0}]", "EW-113", "more than 0"),
        ("[{function: forward_kl, beta: 0.5}]", "EW-110", "unknown key 'beta'"),
        ("[{function: cross_entropy}]", "EW-115", "next_token"),
        ("[{function: forward_kl, weight: 0.7}, {function: jsd, weight: 0.5}, {function: cross_entropy, weight: rest}]",
         "EW-115", "1.2"),
        ("[{function: forward_kl, weight: rest}, {function: cross_entropy, weight: rest}]", "EW-115", "only one"),
        ("[]", "EW-113", "at least 1"),
    ],
)  # fmt: skip
def test_a_list_that_makes_no_sense_is_refused_at_its_place(tmp_path: Path, losses: str, code: str, found: str) -> None:
    recipe = write_recipe(tmp_path, ternary=True)
    with pytest.raises(RecipeErrors) as error:
        load_recipe(recipe, [*WITHOUT, f"{LOSSES}={losses}"])
    assert [one.code for one in error.value.errors] == [code]
    assert found in str(error.value) and "losses" in str(error.value) or code == "EW-115"


def test_short_keys_beside_a_list_are_refused_with_what_they_stand_for(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ternary=True)
    with pytest.raises(RecipeErrors, match="give `losses` or kl_weight, not both.*function: forward_kl"):
        load_recipe(recipe, [f"{LOSSES}=[{{function: forward_kl}}]"])


@pytest.mark.parametrize(
    ("gives", "function", "fits"),
    [
        (TopK, "top_k", True), (Sampled, "rs_kd", True), (Logits, "top_k", True), (Logits, "rs_kd", True),
        (TopK, "forward_kl", False), (Sampled, "top_k", False), (TopK, "rs_kd", False), (Sampled, "reverse_kl", False),
    ],
)  # fmt: skip
def test_a_loss_gets_only_targets_that_it_accepts(gives: Any, function: str, fits: bool) -> None:
    source = Nothing()
    source.gives = gives  # type: ignore[misc]
    config = DistillConfig.model_validate({"teacher": TEACHER, "losses": [{"function": function}]})
    if fits:
        assert config.build(source).parts == (function,)
        return
    with pytest.raises(RecipeError, match="EW-781") as error:
        config.build(source)
    assert gives.kind in str(error.value)


def test_a_divergence_of_exactly_nothing_is_an_error_after_a_hundred_steps() -> None:
    made = objective({"function": "forward_kl", "weight": 0.5}, {"function": "cross_entropy", "weight": 0.5})
    kept: dict[str, Any] = {}
    nothing = {"forward_kl": 0.0, "cross_entropy": 1.0}
    for _ in range(STEPS_OF_NOTHING - 1):
        made.after_step(nothing, kept)
    made.after_step({"forward_kl": 1e-30, "cross_entropy": 1.0}, kept)
    for _ in range(STEPS_OF_NOTHING - 1):
        made.after_step(nothing, kept)
    kept = json.loads(json.dumps(kept))  # a resumed run goes on counting
    with pytest.raises(RecipeError, match="EW-782"):
        made.after_step(nothing, kept)


def test_more_tokens_than_there_are_cannot_be_kept(taught: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = taught
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "stages/student")
    with pytest.raises(RecipeError, match="(?s)EW-780.*k of 1 to 300.*k of 301"):
        edgewright.run(recipe, *WITHOUT, f"{LOSSES}=[{{function: top_k, k: 301}}]", f"output_dir={copy}")


def test_padding_is_left_out_with_a_note_and_missing_tokens_are_refused(tmp_path: Path) -> None:
    assert check_rows(100, 100, 90, role="teacher", where=tmp_path) == []
    (note,) = check_rows(151_936, 152_064, 151_000, role="teacher", where=tmp_path)
    assert "128 rows that only pad the teacher's" in note
    (note,) = check_rows(152_064, 151_936, 151_000, role="teacher", where=tmp_path)
    assert "128 rows that only pad the student's" in note
    with pytest.raises(BadInput, match=r"(?s)EW-702.*the first token without one is 80"):
        check_rows(100, 80, 90, role="teacher", where=tmp_path)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and its finished run, with four losses of which two change their weight."""
    folder = tmp_path_factory.mktemp("taught")
    recipe = write_recipe(folder, ternary=True)
    edgewright.run(recipe, *WITHOUT, FOUR, f"output_dir={folder / 'run'}")
    return recipe, folder / "run"


RAMP = "schedule: {type: cosine, warmup_ratio: 0.5, final_ratio: 0.2}"
FOUR = (
    f"{LOSSES}=[{{function: jsd, weight: 0.4, beta: 0.3, temperature: 2, {RAMP}}}, {{function: rs_kd, weight: 0.2}}, "
    "{function: top_k, weight: 0.2, k: 5}, {function: cross_entropy, weight: rest}]"
)


def test_a_run_sums_its_losses_and_says_so(taught: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in (taught[1] / "stages/student/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert len(steps) == 8
    for line in steps:
        parts = [line[name] for name in ("jsd", "rs_kd", "top_k", "cross_entropy")]
        assert all(part > 0 for part in parts) and line["loss"] == pytest.approx(sum(parts), rel=1e-5)
    written = taught[1] / "recipe.resolved.yaml"
    assert "function: rs_kd" in written.read_text()
    assert load_recipe(written).stages[1].objective.weighted()[0].beta == 0.3  # type: ignore[union-attr]


def test_scheduled_and_sampled_losses_resume_with_the_same_bits(taught: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = taught
    copy = shutil.copytree(run, tmp_path / "run")
    stage = copy / "stages/student"
    shutil.rmtree(stage / "model")
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "checkpoints/step-00000008")
    assert (stage / "checkpoints/step-00000006").exists()
    edgewright.run(recipe, *WITHOUT, FOUR, f"output_dir={copy}")
    assert curve(copy, "student") == curve(run, "student")
    assert weights(copy, "student") == weights(run, "student")
    with pytest.raises(RecipeError, match="EW-705"):
        edgewright.run(recipe, *WITHOUT, FOUR.replace("k: 5", "k: 6"), f"output_dir={copy}")


def test_a_teacher_that_says_nan_is_refused_with_the_document(
    taught: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished base stage teaches; a row of its embedding is NaN, so only texts with that token are bad."""
    from edgewright.compress.teacher import OnlineTeacher

    recipe, run = taught
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "stages/student")
    prepare = OnlineTeacher.prepare

    def spoilt(self: OnlineTeacher, *arguments: Any) -> None:
        prepare(self, *arguments)
        model = self.model()
        assert model is not None
        with torch.no_grad():
            model.get_input_embeddings().weight[40] = torch.nan

    monkeypatch.setattr(OnlineTeacher, "prepare", spoilt)
    with pytest.raises(BadInput, match=r"document \d+ of the training text"):
        edgewright.run(recipe, *WITHOUT, f"{LOSSES}=[{{function: forward_kl}}]", f"output_dir={copy}")
