"""The size of a cache is known before it is written; teachers are planned as narrow as they are held."""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import pytest

import edgewright
from edgewright.compress.cache import read_manifest
from edgewright.plan import plan
from edgewright.planner.cached import plan_cache
from edgewright.planner.cases import case, stage_models
from edgewright.planner.devices import find_device
from edgewright.planner.disk import _shards
from edgewright.planner.memory import predict
from edgewright.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import write_recipe  # noqa: E402

CACHES = """
  - {name: drawn, type: cache, teacher: {type: checkpoint, model: TEACHER}, targets: {type: sampled, samples: 30}}
  - {name: most, type: cache, teacher: {type: checkpoint, model: TEACHER}, targets: {type: top_k, k: 5}}
evaluate: null"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose tokenizer and teacher are there."""
    folder = tmp_path_factory.mktemp("taught")
    edgewright.run(write_recipe(folder), f"output_dir={folder / 'before'}", say=lambda line: None)
    model = folder / "before/stages/base/model"
    recipe = folder / "tiny.yaml"
    text = recipe.read_text().replace("\nevaluate: null", CACHES.replace("TEACHER", str(model)))
    recipe.write_text(text.replace("{type: train, vocab_size: 300}", f"{{type: pretrained, path: {model}}}"))
    return folder


def test_planned_sizes_are_those_that_are_written(taught: Path) -> None:
    """From the text, and again from what was prepared of it."""
    where = f"output_dir={taught / 'run'}"
    recipe = load_recipe(taught / "tiny.yaml", [where])
    before = {name: plan_cache(recipe, stage, 300) for name, stage in caches(recipe).items()}
    edgewright.run(taught / "tiny.yaml", where, say=lambda line: None)
    after = {name: plan_cache(recipe, stage, 300) for name, stage in caches(recipe).items()}
    for name in before:
        manifest = read_manifest(taught / "run/stages" / name / "cache")
        assert after[name].tokens == manifest["tokens"]
        for planned in (before[name], after[name]):
            assert planned.tokens == pytest.approx(manifest["tokens"], rel=0.02)
            assert planned.bytes == pytest.approx(manifest["bytes"], rel=0.05)
    assert after["most"].bytes_per_token == 5 * 4 + 2


def caches(recipe):
    return {stage.name: stage for stage in recipe.stages if stage.type == "cache"}


def test_the_plan_of_a_recipe_tells_them_and_counts_them(taught: Path) -> None:
    found = plan(taught / "tiny.yaml", device="cpu", probe=False).to_json()
    assert [cache["name"] for cache in found["caches"]] == ["drawn", "most"]
    assert found["disk_parts"]["caches"] == sum(cache["bytes"] for cache in found["caches"])
    assert "different tokens in 30 draws, by the teacher" in found["caches"][0]["notes"][-1]


def test_compressed_text_is_planned_as_the_text_that_it_holds(taught: Path) -> None:
    sizes = []
    for suffix, compress in (("", bytes), (".xz", lzma.compress)):
        file = taught / f"whole.py{suffix}"
        file.write_bytes(compress(b"".join(path.read_bytes() for path in sorted((taught / "corpus").glob("*.py")))))
        recipe = load_recipe(
            taught / "tiny.yaml", [f"data.files={file}", "data.tokenizer={type: train, vocab_size: 300}"]
        )
        sizes.append((plan_cache(recipe, caches(recipe)["drawn"], 300).tokens, _shards(recipe, 300)))
    assert sizes[0] == sizes[1] and min(sizes[0]) > 10_000


def test_what_is_not_known_is_said(taught: Path) -> None:
    stage = "{type: stage, stage: base}"
    recipe = load_recipe(
        taught / "tiny.yaml", [f"stages.drawn.teacher={stage}", "data.tokenizer={type: train, vocab_size: 300}"]
    )
    planned = plan_cache(recipe, caches(recipe)["drawn"], 300)
    assert len(planned.notes) == 2 and planned.bytes > 0
    assert "guessed" in planned.notes[0] and "assumed" in planned.notes[1]


def test_narrow_teachers_are_planned_narrow(taught: Path) -> None:
    """Against what a teacher of that kind holds."""
    import torch

    from edgewright.compress.teacher import open_frozen

    model = taught / "before/stages/base/model"
    seen = {}
    for weights in ("fp32", "bf16", "int8", "nf4"):
        teacher = f"{{type: checkpoint, model: {model}, weights: {weights}}}"
        objective = f"stages.base.objective={{type: distill, teacher: {teacher}}}"
        recipe = load_recipe(taught / "tiny.yaml", [objective, "stages.base.training.precision=fp32"])
        stage, models = next(iter(stage_models(recipe, 300)))
        cpu = find_device("cpu")
        _, step = predict(case(stage, models, recipe, cpu), cpu)
        named = dict(models.teachers[0].named_parameters())  # bitsandbytes keeps its scales elsewhere
        planned = sum(p.numel() * p.element_size() for name, p in named.items() if not name.endswith("scales"))
        held = open_frozen(model, weights, torch.device("cpu"))
        real = sum(parameter.numel() * parameter.element_size() for parameter in held.parameters())
        assert planned == pytest.approx(real, rel=0.02)
        assert step.memory["teacher"] >= planned
        seen[weights] = step.memory["teacher"]
    assert seen["nf4"] < seen["int8"] < seen["bf16"] < seen["fp32"]
