"""Stages that train nothing are planned as well: what their teachers compute and hold, what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import write_recipe
from transformers import LlamaConfig, LlamaForCausalLM

import edgewright
from edgewright.compress.cache_config import CacheStageConfig
from edgewright.plan import Plan, plan
from edgewright.planner.cases import stage_models
from edgewright.planner.devices import find_device
from edgewright.planner.making import MakingPlan, plan_generate_stage
from edgewright.planner.passes import Pass, reading, weight_bytes, writing
from edgewright.planner.probe import Probe, probe
from edgewright.planner.record import PLAN, compare
from edgewright.planner.text import as_text
from edgewright.planner.written import plan_written
from edgewright.recipe import load_recipe
from edgewright.report import report
from edgewright.stage_cost import COST, StageCost

VOCABULARY, LAYERS, HEADS, PAIRS, SIZE, INNER = 512, 3, 4, 2, 16, 96
HIDDEN = HEADS * SIZE
STAGES = """
  - {name: drawn, type: cache, teacher: {type: stage, stage: base}, targets: {type: sampled, samples: 20}}
  - name: written
    type: generate
    teacher: {type: stage, stage: base}
    prompts: {type: corpus, prompts: 9, tokens: 8}
    max_new_tokens: 40
    per_device_batch_size: 4
evaluate: null"""
MADE = ("drawn", "written")
PLAIN = ("stages.base.training.precision=fp32", "stages.drawn.precision=fp32")


def teacher() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=PAIRS, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def in_blocks() -> int:
    """Weights of matrices that every token is multiplied with."""
    return LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * PAIRS * SIZE + 3 * HIDDEN * INNER)


def attention(queries: int, keys: int) -> int:
    """Two products of every query with every key; masked ones are computed, too."""
    return 4 * queries * keys * HEADS * SIZE * LAYERS


def cache_stage(targets: str = "sampled", **teacher: object) -> CacheStageConfig:
    section = {"name": "drawn", "teacher": {"type": "checkpoint", "model": "x"}, "targets": {"type": targets}}
    return CacheStageConfig.model_validate({**section, "per_device_batch_size": 3, **teacher})


def read(length: int, models: int = 1, stage: CacheStageConfig | None = None) -> Pass:
    return reading(stage or cache_stage(), [teacher() for _ in range(models)], length, False, "float32")


@pytest.mark.parametrize("length", [64, 512])
def test_reading_computes_what_the_architecture_says(length: int) -> None:
    tokens = 3 * length
    expected = tokens * 2 * (in_blocks() + VOCABULARY * HIDDEN) + 3 * attention(length, length)
    assert read(length).flops == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("prompt", "new"), [(1, 200), (30, 1), (17, 64)])
def test_writing_computes_what_the_architecture_says(prompt: int, new: int) -> None:
    """With keys and values kept: every token goes through the blocks once, and the head once for each that is new."""
    rows = 5
    body = 2 * in_blocks() * (prompt + new - 1) + attention(prompt, prompt)
    body += sum(attention(1, prompt + number) for number in range(1, new))
    expected = rows * (body + 2 * VOCABULARY * HIDDEN * new)
    assert writing([teacher()], rows, prompt, new, "float32").flops == pytest.approx(expected, rel=1e-12)


def test_what_is_held_while_text_is_written_is_keys_and_values() -> None:
    rows = 8
    kept = [2 * 4 * LAYERS * rows * (4 + new - 1) * PAIRS * SIZE for new in (100, 2000)]
    found = [writing([teacher()], rows, 4, new, "float32") for new in (100, 2000)]
    assert [each.memory["teacher"] for each in found] == [weight_bytes([teacher()])] * 2
    assert found[1].memory["activations"] >= kept[1]
    grown = found[1].memory["activations"] - found[0].memory["activations"]
    assert grown == pytest.approx(kept[1] - kept[0], rel=0.6)  # a layer's are there twice while they get longer
    assert grown >= kept[1] - kept[0]


def test_memory_of_reading_is_the_teacher_and_a_chunk_of_logits() -> None:
    found = read(64)
    assert found.memory["teacher"] == weight_bytes([teacher()])
    assert found.memory["logits"] >= 4 * VOCABULARY * 3 * 64
    longer = read(4096)
    assert longer.memory["logits"] < 10 * 24 * 2**20, "chunks, and not whole"


def test_members_that_take_turns_are_held_one_at_a_time() -> None:
    one = {"type": "checkpoint", "model": "x"}
    sections = [{"teacher": {"type": "ensemble", "members": [one] * 3, "resident": way}} for way in ("all", "one")]
    together, in_turn = (read(64, 3, cache_stage(**section)) for section in sections)
    assert together.memory["teacher"] == 3 * weight_bytes([teacher()])
    assert in_turn.heap < together.heap - 1.5 * in_blocks() * 4, "only the tables stay, for their heads"
    assert in_turn.flops == together.flops == pytest.approx(3 * read(64).flops)


def test_narrow_weights_are_read_wide_before_they_are_narrow() -> None:
    from edgewright.planner.teachers import as_held, loading_bytes, parameter_count

    wide = teacher()
    parameters = sum(parameter.numel() for parameter in wide.parameters())
    narrow = as_held(teacher(), "nf4")
    assert parameter_count(wide) == parameter_count(narrow) == parameters
    assert loading_bytes(narrow) == pytest.approx(2 * parameters, rel=0.02)
    assert weight_bytes([narrow]) < 0.6 * loading_bytes(narrow)


def recipe_in(folder: Path) -> Path:
    path = write_recipe(folder)
    path.write_text(path.read_text().replace("\nevaluate: null", STAGES))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A run, and the plan that was made before it."""
    folder = tmp_path_factory.mktemp("made")
    where = f"output_dir={folder / 'run'}"
    before = plan(recipe_in(folder), where, *PLAIN, probe=False, device="cpu")
    edgewright.run(folder / "tiny.yaml", where, *PLAIN, say=lambda line: None)
    return folder / "run", before


def test_the_plan_counts_them_like_all_others(finished: tuple[Path, Plan]) -> None:
    found = finished[1].to_json()
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert [(name, stages[name]["type"]) for name in stages] == [
        ("base", "train"), ("drawn", "cache"), ("written", "generate"),
    ]  # fmt: skip
    assert found["flops"] == sum(stage["flops"] for stage in stages.values())
    assert found["seconds"] == sum(stage["seconds"] for stage in stages.values()) and stages["drawn"]["seconds"] > 0
    assert found["disk_parts"]["generated"] == found["written"][0]["bytes"] > 0
    assert found["written"][0]["texts"] == 9 and found["written"][0]["tokens"] == 9 * (9 + 40)
    words = as_text(found)
    assert "text   written: " in words and all(f"\n{name} " in words for name in MADE)


def test_the_largest_stage_may_be_one_that_trains_nothing(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    found = plan(recipe, "stages.drawn.per_device_batch_size=2000", probe=False, device="4MB").to_json()
    assert found["stage"] == "drawn" and not found["fits"] and found["advice"] == []
    assert "in stage drawn" in as_text(found)


def test_a_run_is_held_against_what_was_predicted_of_them(finished: tuple[Path, Plan]) -> None:
    directory, before = finished
    kept = json.loads((directory / PLAN).read_text())
    assert [stage["name"] for stage in kept["stages"]] == ["base", *MADE]
    compared = {(each.stage, each.what): each for each in compare(directory)}
    for name in MADE:
        cost = json.loads((directory / "stages" / name / COST).read_text())
        assert cost["done"] and cost["decisions"]["device"] == kept["stages"][1]["decisions"]["device"]
        assert compared[name, "seconds"].measured == cost["seconds"] > 0
        assert compared[name, "memory"].measured == cost["peak_memory"]
        assert not compared[name, "memory"].changed
    disk = compared[None, "disk"]
    assert disk.measured is not None and disk.error is not None and abs(disk.error) < 0.12
    used = json.loads((directory / "results.json").read_text())["disk_used"]
    assert used["caches"] > 10_000 and used["generated"] > 1000
    assert used["generated"] <= kept["disk_parts"]["generated"] < 2 * used["generated"]
    page = report(directory).path.read_text(encoding="utf-8")
    assert "drawn: memory" in page and "written: time" in page
    assert before.caches[0].tokens == pytest.approx(kept["caches"][0]["tokens"], rel=0.1)


def test_a_stage_that_has_begun_keeps_its_plan_and_its_seconds(finished: tuple[Path, Plan], tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished[0].parent, tmp_path, dirs_exist_ok=True)
    kept = json.loads((run / PLAN).read_text())
    kept["stages"][1]["memory"]["total"] = 123
    (run / PLAN).write_text(json.dumps(kept))
    cost = json.loads((run / "stages/drawn" / COST).read_text())
    (run / "stages/drawn" / COST).write_text(json.dumps(cost | {"seconds": 1000.0, "done": False}))
    (run / "stages/drawn/cache/00000.targets").unlink()
    shutil.rmtree(run / "stages/written")
    edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", *PLAIN, say=lambda line: None)
    compared = {(each.stage, each.what): each for each in compare(run)}
    assert compared["drawn", "memory"].predicted == 123 and compared["written", "memory"].predicted != 123
    assert 1000 < float(compared["drawn", "seconds"].measured or 0) < 1900


def test_cost_of_what_is_not_finished_is_nothing_to_compare_with(tmp_path: Path) -> None:
    decisions = {"device": "cpu", "precision": "float32"}
    cost = StageCost(tmp_path, decisions)
    assert json.loads((tmp_path / COST).read_text())["done"] is False
    cost.keep(done=True)
    (tmp_path / COST).write_text(json.dumps(json.loads((tmp_path / COST).read_text()) | {"seconds": 50.0}))
    StageCost(tmp_path, decisions)
    assert json.loads((tmp_path / COST).read_text())["seconds"] < 50, "a finished stage that is made anew begins anew"
    (tmp_path / COST).write_text("{")
    StageCost(tmp_path, decisions)


def test_prompts_of_files_are_counted_or_guessed(finished: tuple[Path, Plan], tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    (tmp_path / "prompts.txt").write_text("import os\nclass A\n" + "x" * 120)
    files = f"stages.written.prompts={{type: files, files: {tmp_path / 'prompts.txt'}}}"
    both = "stages.written.temperatures=[0.0, 1.0]", "stages.written.samples=3"
    known = f"data.tokenizer={{type: pretrained, path: {finished[0] / 'stages/base/model'}}}"
    guessed, counted = (load_recipe(recipe, [files, *both, *more]) for more in ((), (known,)))
    one, other = (plan_written(each, each.stages[2], 300) for each in (guessed, counted))  # type: ignore[arg-type]
    assert one.texts == other.texts == 3 * (1 + 3)
    assert "guessed" in one.notes[0] and "guessed" not in " ".join(other.notes)
    assert other.longest_prompt > 30 and one.prompt_tokens > 1


def made_plan(recipe: Path, name: str = "written", **changes: object) -> MakingPlan:
    loaded = load_recipe(recipe, [f"stages.{name}.{key}={value}" for key, value in changes.items()])
    models = {stage.name: found for stage, found in stage_models(loaded, 300)}
    stage = next(stage for stage in loaded.stages if stage.name == name)
    assert stage.type == "generate"
    return plan_generate_stage(stage, models[name], plan_written(loaded, stage, 300), find_device("cpu"))


def test_seconds_follow_the_work_and_a_probe_takes_the_place_of_the_table(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    one, many = made_plan(recipe), made_plan(recipe, **{"prompts.prompts": 900})
    assert many.flops == pytest.approx(100 * one.flops)
    assert many.time.seconds == pytest.approx(100 * float(one.time.seconds or 0))
    probed = many.with_probe(Probe(seconds=2.0, once=5.0, memory=10**9))
    assert probed.time.seconds == pytest.approx(2.0 * 900 / 4 + 5.0) and probed.time.source == "probe"
    assert many.with_probe(Probe(problem="no")).notes[-1] == "no"


def test_a_probe_carries_out_real_batches(finished: tuple[Path, Plan], tmp_path: Path) -> None:
    """In a process of its own, of teachers that are there."""
    recipe, model = recipe_in(tmp_path), finished[0] / "stages/base/model"
    teachers = [f"stages.{name}.teacher={{type: checkpoint, model: {model}}}" for name in MADE]
    for name in MADE:
        found = probe(recipe, teachers, name, 300)
        assert found.problem is None and found.seconds > 0, found.problem
