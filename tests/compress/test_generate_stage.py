"""What teachers write: greedy is transformers' own, draws are the teacher's, a corpus is made once and as a whole."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from overflow import overflow_at
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import edgewright
from edgewright.check import check
from edgewright.compress.continuation import continue_prompts
from edgewright.compress.generate import open_generated
from edgewright.compress.generate_config import GenerateStageConfig
from edgewright.compress.prompts import read_prompts
from edgewright.data import Batches, MixedBatches, TokenStream, iterate_documents, prepare_data
from edgewright.data.tokenizer import load_encoder
from edgewright.errors import BadInput, RecipeErrors
from edgewright.recipe import load_recipe
from edgewright.student import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, write_recipe  # noqa: E402

STAGES = """
  - name: written
    type: generate
    teacher: TEACHER
    prompts: PROMPTS
    temperatures: [0, 1.0]
    samples: 3
    max_new_tokens: 12
    per_device_batch_size: 5
  - name: student
    student: {type: stage, stage: base}
    generated: {stage: written, share: 0.5}
    budget: {max_steps: 4}
    training: {per_device_train_batch_size: 2, save_steps: 2, eval_steps: 0, eval_sequences: 4}
evaluate: null"""
FILES = '{type: files, files: ["prompts*"]}'


def tiny(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def written(models: list[PreTrainedModel], prompts: list[list[int]], temperatures: list[float], seed: int = 0, **more):
    settings = {"max_new_tokens": 9, "eos_id": 0, "vocab_size": 40, "dtype": torch.float32} | more
    settings["names"] = [f"number {number}" for number in range(len(prompts))]
    return continue_prompts(models, prompts, temperatures, generator=torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_continuations_are_those_of_transformers(seed: int) -> None:
    """Prompts of different lengths at once, against one at a time."""
    model = tiny(seed)
    prompts = [[0, 5], [0, 7, 8, 9, 10, 11], [0], [0, 3, 3, 3]]
    found = written([model], prompts, [0.0] * 4)
    for prompt, new in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        expected = whole[0, len(prompt) :].tolist()
        assert new == (expected[: expected.index(0)] if 0 in expected else expected)


def test_draws_have_the_teachers_probabilities_at_each_temperature() -> None:
    model, count = tiny(), 6000
    for temperature in (0.7, 1.0, 1.5):
        found = written([model], [[0, 5, 6]] * count, [temperature] * count, max_new_tokens=1)
        drawn = np.bincount([new[0] if new else 0 for new in found], minlength=40) / count
        with torch.no_grad():
            t = (model(torch.tensor([[0, 5, 6]])).logits[0, -1].double() / temperature).softmax(-1).numpy()
        chi = float((count * (drawn - t) ** 2 / t).sum())
        assert chi < 75, "chi square of 39 degrees, 1 in 2000"


def test_an_ensemble_writes_by_the_mean_of_its_logits() -> None:
    models = [tiny(0), tiny(1)]
    (found,) = written(models, [[0, 5]], [0.0])
    ids = [0, 5]
    for _ in range(9):
        with torch.no_grad():
            mean = sum(model(torch.tensor([ids])).logits[0, -1].double() for model in models)
        ids.append(int(mean.argmax()))
    assert found == (ids[2 : ids.index(0, 2)] if 0 in ids[2:] else ids[2:])
    assert written([models[0]] * 3, [[0, 5]], [0.0]) == written([models[0]], [[0, 5]], [0.0])


def test_a_model_that_says_nan_is_refused() -> None:
    """The first of the prompts after which it does is named, and where in its continuation."""
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(BadInput) as raised:
        written([model], [[0, 5], [0, 3, 7, 4], [0, 7]], [0.0] * 3)
    assert raised.value.code == "EW-783" and raised.value.where == "prompt number 1"
    assert "new token 1 " in raised.value.found
    (clean,) = written([tiny()], [[0, 5]], [0.0])
    assert 7 not in clean
    with torch.no_grad():
        model.model.embed_tokens.weight[clean[2]] = float("nan")
    with pytest.raises(BadInput) as raised:
        written([model], [[0, 5]], [0.0])
    assert raised.value.where == "prompt number 0"
    assert f"new token {2 + clean.index(clean[2])} " in raised.value.found


def test_a_stage_names_the_prompt_after_which_its_teacher_says_nan(finished, tmp_path) -> None:
    run = shutil.copytree(finished[0].parent, tmp_path, dirs_exist_ok=True) / "run"
    before = documents(run / "stages/written/corpus")
    (name,) = {document["prompt"] for document in before if document["text"].startswith("class A")}
    shutil.rmtree(run / "stages/written")
    shutil.rmtree(run / "stages/student")
    encoder = load_encoder(run / "data/tokenizer")
    first, second = (ids.tolist() for ids in encoder.encode(["import os", "class A"]))
    assert second[-1] not in first
    model = load_model(run / "stages/base/model")
    overflow_at(model, second[-1])
    model.save_pretrained(run / "stages/base/model")
    with pytest.raises(BadInput) as raised:
        edgewright.run(tmp_path / "tiny.yaml", f"output_dir={run}", "evaluate=null", say=lambda line: None)
    assert raised.value.code == "EW-783" and raised.value.where == f"prompt {name}"
    assert "new token 1 " in raised.value.found


def recipe_in(folder: Path, prompts: str = FILES, teacher: str = "{type: stage, stage: base}") -> Path:
    path = write_recipe(folder)
    stages = STAGES.replace("PROMPTS", prompts).replace("TEACHER", teacher)
    path.write_text(path.read_text().replace("\nevaluate: null", stages))
    (folder / "prompts.txt").write_text("import os\nclass A\n\ndef read_file(\nimport os\n")
    (folder / "prompts2.jsonl").write_text('{"prompt": "def f():\\n    return"}\n')
    return path


def run(folder: Path, *changes: str, **kinds: str) -> tuple[Path, list[str]]:
    said: list[str] = []
    edgewright.run(recipe_in(folder, **kinds), f"output_dir={folder / 'run'}", *changes, say=said.append)
    return folder / "run", said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    return run(tmp_path_factory.mktemp("written"))


def documents(corpus: Path) -> list[dict]:
    return [json.loads(line) for line in (corpus / "generated.jsonl").read_text().splitlines()]


def test_the_corpus_has_every_prompt_and_no_document_twice(finished) -> None:
    directory, said = finished
    corpus = directory / "stages/written/corpus"
    found = documents(corpus)
    texts = [tuple(document["ids"]) for document in found]
    assert len(set(texts)) == len(texts)
    assert len({document["prompt"] for document in found}) == 4
    assert {document["temperature"] for document in found} == {0.0, 1.0}
    report = json.loads((corpus / "index.json").read_text())["report"]
    assert report["asked"] == 4 * (1 + 3)
    assert report["kept"] + report["duplicates"] + report["empty"] == report["asked"]
    assert any(f"{report['kept']} documents of 16" in line for line in said)


def test_a_document_that_came_before_is_dropped_and_counted(tmp_path: Path) -> None:
    """Files with one and the same head: greedy after it, each alone in its batch, a teacher writes the same again."""
    recipe = recipe_in(tmp_path, prompts="{type: corpus, prompts: 100, tokens: 6}")
    for number in range(8):
        (tmp_path / f"corpus/same{number}.py").write_text(f"def one_head_of_many_files(a, b):\n    return {number}\n")
    settings = ["temperatures=[0]", "max_new_tokens=6", "per_device_batch_size=1"]
    changes = [f"stages.written.{setting}" for setting in settings]
    edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", *changes, say=lambda line: None)
    corpus = tmp_path / "run/stages/written/corpus"
    loaded = load_recipe(recipe, changes)
    stage = loaded.stages[1]
    assert isinstance(stage, GenerateStageConfig)
    prepared = prepare_data(loaded.data, tmp_path / "run/data", say=lambda line: None)
    asked = read_prompts(stage, loaded, prepared, load_encoder(prepared.tokenizer_dir))
    heads = Counter(tuple(prompt.ids[1:]) for prompt in asked)
    assert max(heads.values()) >= 3, "prompts that are the same"
    found = documents(corpus)
    assert Counter(tuple(document["ids"][:6]) for document in found) == Counter(heads.keys())
    report = json.loads((corpus / "index.json").read_text())["report"]
    assert report["asked"] == len(asked) and report["empty"] == 0
    assert report["duplicates"] == len(asked) - len(heads) and report["kept"] == len(heads)
    assert open_generated(corpus).documents == len(heads)


def test_packed_tokens_are_the_documents(finished) -> None:
    corpus = finished[0] / "stages/written/corpus"
    stream = open_generated(corpus)
    expected = [0]
    for document in documents(corpus):
        expected += [*document["ids"], 0]
    assert stream.tokens.tolist() == expected
    assert stream.documents == len(documents(corpus))
    texts = [text for _, text in iterate_documents(str(corpus / "generated.jsonl"))]
    assert len(texts) >= 0.9 * len(documents(corpus)), "any recipe reads it as a corpus"


def test_nothing_is_generated_twice_and_a_kill_changes_nothing(finished, tmp_path, monkeypatch) -> None:
    from edgewright.compress import generate

    monkeypatch.setattr(generate, "BATCHES_OF_PIECE", 1)
    calls: list[int] = []
    original = generate.continue_prompts

    def counting(*arguments, **settings):
        calls.append(len(arguments[1]))
        if len(calls) == 3 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(generate, "continue_prompts", counting)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    (tmp_path / "again").touch()
    directory, _ = run(tmp_path)
    assert sum(calls) == 16 + 5, "only the batch that was cut off is written again"
    before = len(calls)
    _, said = run(tmp_path)
    assert len(calls) == before and "written: done already" in said
    whole = tmp_path / "whole"
    run(whole)
    one, other = (each / "run/stages/written/corpus/generated.jsonl" for each in (tmp_path, whole))
    assert one.read_bytes() == other.read_bytes()
    assert curve(directory, "student") == curve(whole / "run", "student")


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: "{}"], ids=["cut", "other JSON"])
def test_a_damaged_piece_is_written_again(finished, tmp_path, damage: Callable[[str], str]) -> None:
    directory, _ = run(tmp_path)
    corpus = directory / "stages/written/corpus"
    before = (corpus / "train.bin").read_bytes()
    piece = corpus / "pieces/00000.json"
    piece.write_text(damage(piece.read_text()))
    (corpus / "train.bin").write_bytes(before[:-2])
    run(tmp_path)
    assert (corpus / "train.bin").read_bytes() == before


@pytest.mark.parametrize(
    "prompts",
    ["{type: corpus, prompts: 5, tokens: 6}", "{type: none, documents: 7}", "{type: files, files: prompts.txt}"],
)
def test_prompts_from_the_text_or_one_file_or_none(tmp_path: Path, prompts: str) -> None:
    ensemble = "{type: ensemble, members: [{type: stage, stage: base}, {type: stage, stage: base, weights: bf16}]}"
    directory, _ = run(
        tmp_path, "stages.written.temperatures=[1.0]", "stages.written.samples=1", prompts=prompts, teacher=ensemble
    )
    found = documents(directory / "stages/written/corpus")
    assert 0 < len(found) <= 7
    if "corpus" in prompts:
        train = np.fromfile(directory / "data/train.bin", np.uint16).tolist()
        text = ",".join(map(str, train))
        assert all(",".join(map(str, [0, *document["ids"][:6]])) in text for document in found)


def test_recipes_that_cannot_be(tmp_path: Path) -> None:
    def codes(*changes: str) -> list[str]:
        with pytest.raises(RecipeErrors) as raised:
            run(tmp_path, *changes)
        return [error.code for error in raised.value.errors]

    assert codes("stages.written.temperatures=[-1]") == ["EW-113"]
    assert codes("stages.written.temperatures=[1, 1]") == ["EW-115"]
    assert codes("stages.written.prompts={type: none, documents: 3}") == ["EW-115"]
    assert codes("stages.student.generated.stage=base") == ["EW-121"]
    assert codes("stages.student.generated.share=0") == ["EW-113"]
    long = "stages.written.max_new_tokens=100"
    with pytest.raises(BadInput) as raised:
        run(tmp_path, long)
    assert raised.value.code == "EW-612"


@pytest.mark.parametrize("prompts", ["{type: none, documents: 4}", "{type: corpus, prompts: 4, tokens: 40}", FILES])
def test_no_room_in_the_context_is_found_before_anything_is_trained(tmp_path: Path, prompts: str) -> None:
    """The preset of the first stage reads 64 tokens."""
    recipe = recipe_in(tmp_path, prompts=prompts)
    changes = ("stages.written.temperatures=[1.0]", f"output_dir={tmp_path / 'run'}")
    room = 64 - 1 - (40 if "corpus" in prompts else 0)  # of files the tokens are not known yet
    assert check(recipe, *changes, f"stages.written.max_new_tokens={room}").ok
    too_many = f"stages.written.max_new_tokens={room + 1}"
    assert [error.code for error in check(recipe, *changes, too_many).errors] == ["EW-612"]
    with pytest.raises(BadInput) as raised:
        edgewright.run(recipe, *changes, too_many, say=lambda line: None)
    assert raised.value.code == "EW-612" and "at most 64" in str(raised.value.expected)
    assert not (tmp_path / "run/stages/base/checkpoints").exists()


def test_the_length_of_prompts_in_files_counts_where_there_is_a_tokenizer(finished, tmp_path) -> None:
    model = finished[0] / "stages/base/model"
    recipe = recipe_in(tmp_path, teacher=f"{{type: checkpoint, model: {model}}}")
    (tmp_path / "prompts.txt").write_text("import os\n" + "class A: pass; " * 20)
    known = f"data.tokenizer={{type: pretrained, path: {model}}}"
    report = check(recipe, known)
    assert [error.code for error in report.errors] == ["EW-612"]
    assert "prompts.txt" in str(report.errors[0].where)


def test_files_of_prompts_that_are_not_there_name_their_key(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, prompts="{type: files, files: nothing.txt}")
    (error,) = check(recipe).errors
    assert error.code == "EW-203" and "prompts.files" in error.what and "prompts.files" in str(error.fix)
    assert "data.files" not in error.message()


def test_files_without_a_prompt_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, prompts="{type: files, files: prompts.txt}")
    assert edgewright.check(recipe).ok
    (tmp_path / "prompts.txt").write_text("\n  \n")
    report = edgewright.check(recipe)
    assert [error.code for error in report.errors] == ["EW-606"]
    (tmp_path / "prompts.txt").unlink()
    assert [error.code for error in edgewright.check(recipe).errors] == ["EW-203"]


def batches(count: int, offset: int, seed: int = 3) -> Batches:
    tokens = (np.arange(count * 8 + 1) + offset).astype(np.uint32)
    return Batches(TokenStream(tokens, 1, 1), sequence_length=8, seed=seed, start_id=0, eos_id=0)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.75, 1.0])
def test_a_mixture_keeps_its_share_and_goes_over_both_streams_evenly(share: float) -> None:
    first, second = batches(50, 1), batches(20, 10_000)
    mixed = MixedBatches(first, second, share)
    of_second = [index >= 50 for index in mixed.batch(0, 600).indices]
    for position in range(1, 601):
        assert abs(sum(of_second[:position]) - share * position) < 1 + 1e-3 * position
    seen = Counter(mixed.batch(0, 600).indices)
    for stream in (range(50), range(50, 70)):
        counts = [seen[index] for index in stream]
        assert max(counts) - min(counts) <= 1
    pieces = [index for position in range(0, 60, 7) for index in mixed.batch(position, 7).indices]
    assert pieces == mixed.batch(0, len(pieces)).indices
    whole = mixed.batch(11, 4)
    for row, index in zip(whole.input_ids, whole.indices, strict=True):
        begin = 1 + index * 8 if index < 50 else 10_000 + (index - 50) * 8
        assert row.tolist() == list(range(begin, begin + 8))
