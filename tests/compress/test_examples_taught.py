"""Teachers of instruction data: a cache has targets for every packed example, a NaN names it, no text is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from overflow import overflow_at

import edgewright
from edgewright.compress.cache import CacheKey, open_cache
from edgewright.data import Corpus, prepare_data
from edgewright.data.packing import PackedBatches
from edgewright.errors import BadInput, RecipeErrors
from edgewright.recipe import Recipe, load_recipe
from edgewright.student import load_model
from edgewright.trainer import model_inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve  # noqa: E402

LENGTH = 48
RECIPE = """
version: 1
name: tiny
data:
  type: instruct
  files: rows.jsonl
  tokenizer: {type: train, vocab_size: 300}
  sequence_length: 48
  held_out: 0.25
stages:
  - name: base
    student: &small {type: preset, preset: llama-1m, hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
      intermediate_size: 32}
    optimizer: {type: adamw, learning_rate: 5e-3}
    budget: {max_steps: 10}
    training: {per_device_train_batch_size: 4, save_steps: 100, eval_steps: 0, precision: fp32}
  - {name: said, type: cache, teacher: {type: stage, stage: base}, targets: {type: top_k, k: 8}, precision: fp32}
  - name: live
    student: *small
    objective: {type: distill, teacher: {type: stage, stage: base}, losses: &losses [{function: top_k, k: 8}]}
    budget: {max_steps: 8}
    training: &settings {per_device_train_batch_size: 2, save_steps: 100, eval_steps: 0, precision: fp32}
  - name: cached
    student: *small
    objective: {type: distill, teacher: {type: cache, stage: said}, losses: [{function: top_k}]}
    budget: {max_steps: 8}
    training: *settings
evaluate: null
bench: null
"""
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")


def write_recipe(folder: Path) -> Path:
    """Examples of different lengths, so that sequences hold several, and padding."""
    rows = [
        {"prompt": f"What is {n} of {WORDS[n % 5]}? ", "completion": "It is " + "x" * (n % 7) + f" {2 * n}."}
        for n in range(60)
    ]
    for n, letter in enumerate("JKQRUVXYZ"):  # some of them in the training text, each once
        rows[6 * n]["prompt"] += letter
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, the recipe beside it."""
    folder = tmp_path_factory.mktemp("taught")
    edgewright.run(write_recipe(folder), f"output_dir={folder / 'run'}", say=lambda line: None)
    return folder / "run"


def opened(run: Path) -> tuple[Recipe, Corpus, PackedBatches]:
    recipe = load_recipe(run.parent / "tiny.yaml")
    corpus = prepare_data(recipe.data, run / "data", say=lambda line: None)
    batches = corpus.train.batches(
        sequence_length=LENGTH, seed=5, restart_at_documents=True, start_id=corpus.start_id, eos_id=corpus.eos_id
    )
    assert isinstance(batches, PackedBatches)
    return recipe, corpus, batches


@torch.no_grad()
def test_targets_are_the_teachers_of_every_example_alone(finished: Path) -> None:
    """Against a forward of each example by itself, which knows nothing of packing."""
    recipe, corpus, batches = opened(finished)
    source = open_cache(finished / "stages/said/cache", CacheKey.of(recipe.data, corpus))
    model = load_model(finished / "stages/base/model").eval()
    examples = [tokens for tokens, _ in corpus.train.examples()]
    assert any(len(together) > 1 for together in batches.packed), "sequences hold several examples"
    order = list(range(len(batches)))[::-1]
    found = source.targets(model_inputs(batches.rows(order), torch.device("cpu")), torch.float32)
    seen = 0
    for row, sequence in enumerate(order):
        place = row * LENGTH
        for number in batches.packed[sequence]:
            inputs = examples[number][:-1]
            expected = model(torch.tensor([inputs])).logits[0].double().softmax(-1)
            rows = slice(place, place + len(inputs))
            torch.testing.assert_close(
                expected.gather(-1, found.ids[rows]), found.log_probs[rows].exp().double(), rtol=2e-3, atol=1e-6
            )
            assert torch.equal(found.ids[rows, 0], expected.argmax(-1))
            place, seen = place + len(inputs), seen + 1
    assert seen == len(examples)


def test_a_student_of_the_cache_learns_what_one_of_the_teacher_learns(finished: Path) -> None:
    """The same loss, live and from disk, in the shuffled order of training; the cache rounds to float16."""
    live, cached = ([float.fromhex(loss) for _, loss in curve(finished, name)] for name in ("live", "cached"))
    assert len(live) == 8 and live[-1] < live[0]
    assert cached == pytest.approx(live, rel=1e-3)


def bad_example(run: Path) -> tuple[int, int, int, int]:
    """A token that occurs in one example of the training text alone: its id, that example, the sequence, the place."""
    _, corpus, batches = opened(run)
    examples = [tokens for tokens, _ in corpus.train.examples()]
    everywhere = torch.bincount(torch.tensor([token for tokens in examples for token in tokens[:-1]]))
    rare = int((everywhere == 1).nonzero()[0])
    number = next(n for n, tokens in enumerate(examples) if rare in tokens[:-1])
    sequence = next(s for s, together in enumerate(batches.packed) if number in together)
    row = batches.rows([sequence]).input_ids[0].tolist()
    return rare, number, sequence, row.index(rare)


def spoilt(finished: Path, folder: Path, *stages: str) -> tuple[Path, tuple[int, int, int, int]]:
    """A copy in which the base model overflows at a rare token, and these stages are not done."""
    shutil.copytree(finished.parent, folder, dirs_exist_ok=True)
    run = folder / "run"
    bad = bad_example(run)
    model = load_model(run / "stages/base/model")
    overflow_at(model, bad[0])
    model.save_pretrained(run / "stages/base/model")
    for stage in stages:
        shutil.rmtree(run / "stages" / stage)
    return run, bad


def line_of(run: Path, example: int) -> str:
    """The line of the file that a training example was read from."""
    _, corpus, _ = opened(run)
    text = [tokens for tokens, _ in corpus.train.examples()][example]
    from edgewright.data.tokenizer import load_encoder

    prompt = load_encoder(run / "data/tokenizer").tokenizer.decode(text, skip_special_tokens=True)
    rows = [json.loads(line) for line in (run.parent / "rows.jsonl").read_text().splitlines()]
    return str(1 + next(n for n, row in enumerate(rows) if row["prompt"] + row["completion"] == prompt))


def test_a_teacher_that_says_nan_names_the_example_in_a_cache(finished: Path, tmp_path: Path) -> None:
    run, (_, example, sequence, place) = spoilt(finished, tmp_path, "said", "live", "cached")
    with pytest.raises(BadInput) as raised:
        edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", say=lambda line: None)
    assert raised.value.code == "EW-783"
    assert raised.value.where.endswith(f"rows.jsonl:{line_of(run, example)}")
    assert f"token {place} of sequence {sequence} " in raised.value.found


def test_a_teacher_that_says_nan_names_the_example_in_training(finished: Path, tmp_path: Path) -> None:
    run, (rare, example, sequence, place) = spoilt(finished, tmp_path, "live")
    lines = [line for line in RECIPE.splitlines() if "name: said" not in line]
    (tmp_path / "live.yaml").write_text("\n".join(lines[: lines.index("  - name: cached")]) + "\nbench: null\n")
    with pytest.raises(BadInput) as raised:
        edgewright.run(
            tmp_path / "live.yaml", f"output_dir={run}", "stages.live.budget.max_steps=40", say=lambda line: None
        )
    token = [tokens for tokens, _ in opened(run)[1].train.examples()][example].index(rare)
    assert raised.value.code == "EW-783"
    document = f"document {example + 1} of the training text, its token {token + 1}"
    assert raised.value.where == f"{document} (sequence {sequence}, {place})"


def test_a_place_is_in_the_example_that_the_batch_has_there(finished: Path) -> None:
    """All places of all sequences; padding counts as the last example's."""
    _, corpus, batches = opened(finished)
    examples = [tokens for tokens, _ in corpus.train.examples()]
    padded = 0
    for sequence in range(len(batches)):
        row = batches.rows([sequence])
        for place in range(LENGTH):
            document, token = batches.document_at(sequence, place)
            if token < len(examples[document - 1]):
                assert examples[document - 1][token - 1] == row.input_ids[0, place]
                assert row.position_ids[0, place] == token - 1
            else:
                padded += 1
                assert document - 1 == batches.packed[sequence][-1] and row.labels[0, place] == -100
    places = sum(len(tokens) - 1 for tokens in examples)
    assert padded == len(batches) * LENGTH - places


def test_a_stage_that_writes_running_text_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    stage = "\n  - {name: written, type: generate, teacher: {type: stage, stage: base}, prompts: PROMPTS}"
    for prompts in ("{type: corpus, prompts: 4}", "{type: files, files: [p.txt]}", "{type: none, documents: 3}"):
        recipe.write_text(RECIPE.replace("\nevaluate: null", stage.replace("PROMPTS", prompts) + "\nevaluate: null"))
        with pytest.raises(RecipeErrors) as raised:
            edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", say=lambda line: None)
        (error,) = raised.value.errors
        assert error.code == "EW-798" and "written" in error.what and "tiny.yaml:" in error.where
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plan_tells_the_size_of_the_cache(finished: Path) -> None:
    manifest = json.loads((finished / "stages/said/cache/cache.json").read_text())
    planned = edgewright.plan(finished.parent / "tiny.yaml", f"output_dir={finished}").to_json()["caches"]
    assert planned[0]["tokens"] == manifest["tokens"]
    assert planned[0]["bytes"] == pytest.approx(manifest["bytes"], rel=0.05)
