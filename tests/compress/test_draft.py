"""Drafts: legal shapes in every family, the target's tokens, the loss that a runtime rewards, a run that resumes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import edgewright
from edgewright.compress.acceptance import Written, measure_acceptance, not_trained_on, rates, read_written
from edgewright.compress.align import RUNTIMES, AlignConfig
from edgewright.compress.draft import DraftStudentConfig, count
from edgewright.compress.draft_record import read_draft_record
from edgewright.compress.draft_shape import DraftShape
from edgewright.data import prepare_data
from edgewright.errors import RecipeError, RecipeErrors
from edgewright.export.weight_hash import weights_sha256
from edgewright.recipe import load_recipe
from edgewright.student import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from tiny_run import curve, weights, write_recipe  # noqa: E402

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},  # heads are wider than the hidden size
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 32},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 128, "pad_token_id": 1},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": 0},
}
VOCABULARY = 331
"""No multiple of anything: tokens and rows that pad."""


def target_config(family: str):  # noqa: ANN201 - a class of transformers
    sizes = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4,
        "max_position_embeddings": 64, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": [2, 3],
    }  # fmt: skip
    if family in ("gpt2", "opt"):
        del sizes["intermediate_size"]
        sizes["eos_token_id"] = 2
    return AutoConfig.for_model(family, **(sizes | FAMILIES[family]))


def student(**settings: object) -> DraftStudentConfig:
    return DraftStudentConfig.model_validate({"source": {"type": "checkpoint", "model": "x"}, **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_is_its_target_shrunk_in_every_family(family: str) -> None:
    """Legal by itself: transformers builds it, it computes, and its rows are the target's."""
    target = target_config(family)
    found = student(parameters=0.15).architecture(target)
    before, shape = DraftShape.of(target), DraftShape.of(found)
    assert type(found) is type(target) and found.vocab_size == VOCABULARY
    assert (found.bos_token_id, found.eos_token_id) == (target.bos_token_id, target.eos_token_id)
    assert found.tie_word_embeddings == target.tie_word_embeddings
    assert found.max_position_embeddings == target.max_position_embeddings
    assert shape.head_dim == before.head_dim and shape.bound == before.bound
    assert shape.hidden_size % 32 == 0 and shape.num_attention_heads % shape.num_key_value_heads == 0
    assert shape.num_hidden_layers == 2, "one for eight"
    assert 0.5 <= count(found) / (0.15 * count(target)) <= 2.0
    model = AutoModelForCausalLM.from_config(found)
    assert sum(p.numel() for p in model.parameters()) == count(found)
    assert model(torch.tensor([[1, 5, 330]])).logits.shape == (1, 3, VOCABULARY)


def test_settings_of_each_layer_keep_the_pattern_from_the_first_on() -> None:
    target = target_config("gemma2")
    assert student(parameters=0.15, num_hidden_layers=3).architecture(target).layer_types == target.layer_types[:3]


def test_larger_blocks_are_taken_where_the_parameters_allow_it() -> None:
    wide = AutoConfig.for_model(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    shape = DraftShape.of(student(parameters=0.05).architecture(wide))
    assert shape.hidden_size % 256 == 0 and shape.inner is not None and shape.inner % 256 == 0
    number = round(0.05 * count(wide))
    assert DraftShape.of(student(parameters=number).architecture(wide)) == shape, "a share and its number are the same"


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"parameters": 1.0e-6}, "EW-840", "the nearest that can be"),
        ({"hidden_size": 48}, "EW-840", "the nearest that can be: 32 or 64"),
        ({"hidden_size": 64, "intermediate_size": 100}, "EW-840", "the nearest that can be: 96 or 128"),
        ({"num_hidden_layers": 13}, "EW-840", "the nearest that can be: 12"),
        ({"hidden_size": 128, "num_hidden_layers": 12}, "EW-841", "fewer than"),
    ],
)
def test_a_draft_that_cannot_be_is_refused_with_the_nearest_that_can(settings, code: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        student(**settings).architecture(target_config("llama"))
    assert raised.value.code == code and said in raised.value.message()


def test_parameters_and_width_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        student(parameters=0.1, hidden_size=64)


def pair(rows: int = 40):  # noqa: ANN201 - two models
    models = []
    for seed, hidden in ((0, 32), (1, 16)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=rows, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.5,
        )  # fmt: skip
        models.append(LlamaForCausalLM(config).eval())
    return models


def test_acceptance_is_what_drawing_and_accepting_gives() -> None:
    """Draws of a draft token, accepted with min(1, p/q), and of a best token, against the two expectations."""
    target, draft = pair()
    document = Written(ids=(5, 6, 7, 8, 9, 10), new=4, temperature=0.7)
    found = measure_acceptance(draft, target, [document], start_id=1)
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        p, q = (torch.softmax(model(ids).logits[0, 2:].double() / 0.7, -1) for model in (target, draft))
    generator, count_ = torch.Generator().manual_seed(0), 40_000
    accepted, best = 0.0, 0.0
    for row_p, row_q in zip(p, q, strict=True):
        drawn = torch.multinomial(row_q, count_, replacement=True, generator=generator)
        u = torch.rand(count_, generator=generator, dtype=torch.float64)
        accepted += float((u <= row_p[drawn] / row_q[drawn]).double().mean()) / len(p)
        of_target = torch.multinomial(row_p, count_, replacement=True, generator=generator)
        best += float((of_target == row_q.argmax()).double().mean()) / len(p)
    assert found.sampled == pytest.approx(accepted, abs=0.006) and found.greedy == pytest.approx(best, abs=0.006)
    assert (found.tokens, found.documents) == (4, 1)


def test_acceptance_of_the_target_itself_is_one() -> None:
    target, _ = pair()
    documents = [Written((5, 6, 7), 2, 1.0), Written((8, 9), 1, 0.0)]
    found = measure_acceptance(target, target, documents, start_id=1)
    assert found.sampled == pytest.approx(1.0, abs=1e-6) and found.agreement == 1.0 and found.tokens == 3


def test_greedy_documents_tell_the_agreement_and_drawn_ones_the_rest() -> None:
    target, draft = pair()
    drawn, greedy = Written((5, 6, 7, 8), 3, 1.0), Written((9, 10, 11), 2, 0.0)
    both = measure_acceptance(draft, target, [drawn, greedy], start_id=1)
    alone = measure_acceptance(draft, target, [drawn], start_id=1)
    assert both.sampled == alone.sampled and both.greedy == alone.greedy
    assert both.agreement == measure_acceptance(draft, target, [greedy], start_id=1).agreement


def test_rows_that_only_one_model_has_are_never_accepted() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]])
    overlap, best = rates(p[:, :2], torch.tensor([[0.1, 0.2, 0.7]]))
    assert overlap.item() == pytest.approx(0.3) and best.item() == 0.0
    overlap, best = rates(p, torch.tensor([[0.9, 0.1]]))
    assert overlap.item() == pytest.approx(0.6) and best.item() == 0.5


def test_documents_that_were_trained_on_are_left_out() -> None:
    a, b = Written((1, 2), 1, 0.0), Written((3, 4), 1, 1.0)
    assert not_trained_on([a, b], [Written((1, 2), 2, 1.0)]) == [b]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_loss_is_the_one_that_the_runtime_rewards(runtime: str, do_sample: bool) -> None:
    teacher = {"type": "checkpoint", "model": "x"}
    config = AlignConfig.model_validate(
        {"teacher": teacher, "runtime": runtime, "do_sample": do_sample, "held_out": "proof"}
    )
    lesson = config.lesson()
    if do_sample and runtime in ("genai", "transformers", "openvino"):
        assert lesson.type == "distill" and [loss.function for loss in lesson.losses] == ["lk_hybrid"]
        assert "sum(min(p, q))" in config.note()
    else:
        assert lesson.type == "next_token" and "p(argmax q)" in config.note()
    assert runtime in config.note()


DRAFTED = """
  - name: pretrained
    student: {type: draft, source: {type: stage, stage: base}, hidden_size: 32, num_hidden_layers: 1}
    budget: {max_steps: 3}
    training: {per_device_train_batch_size: 2, save_steps: 2, eval_steps: 0, eval_sequences: 4}
  - {name: code, type: text, files: "code/*.py", held_out: 0.3}
  - name: domain
    student: {type: stage, stage: pretrained}
    generated: {stage: code, share: 0.67}
    budget: {max_steps: 3}
    training: {per_device_train_batch_size: 2, save_steps: 2, eval_steps: 0, eval_sequences: 4}
  - name: answers
    type: generate
    teacher: {type: stage, stage: base}
    prompts: {type: files, files: [prompts.txt]}
    temperatures: [0, 1.0]
    samples: 2
    max_new_tokens: 24
  - name: proof
    type: generate
    teacher: {type: stage, stage: base}
    prompts: {type: files, files: [proof.txt]}
    temperatures: [0, 1.0]
    samples: 2
    max_new_tokens: 24
  - name: draft
    student: {type: stage, stage: domain}
    generated: {stage: answers, share: 1.0}
    objective: {type: align, teacher: {type: stage, stage: base}, runtime: genai, held_out: proof}
    budget: {max_steps: 4}
    training: {per_device_train_batch_size: 2, save_steps: 2, eval_steps: 0, eval_sequences: 4}
evaluate: null"""


def recipe(folder: Path) -> Path:
    path = write_recipe(folder)
    text = path.read_text(encoding="utf-8").replace("num_hidden_layers: 1", "num_hidden_layers: 2")
    path.write_text(text.replace("\nevaluate: null", DRAFTED), encoding="utf-8")
    (folder / "code").mkdir()
    for name in ("queue", "sched", "gzip", "shlex"):
        shutil.copyfile(folder / f"corpus/{name}.py", folder / f"code/other_{name}.py")
    (folder / "prompts.txt").write_text("import os\ndef main():\nclass A\nif x\nfor a in b\n")
    (folder / "proof.txt").write_text("import re\ndef other():\nimport os\n")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("draft")
    said: list[str] = []
    edgewright.run(recipe(folder), f"output_dir={folder / 'run'}", say=said.append)
    return folder, said


def test_three_stages_leave_a_draft_of_the_very_tokens_and_its_acceptance(finished) -> None:
    folder, said = finished
    stages = folder / "run/stages"
    target, draft = (load_model(stages / name / "model") for name in ("base", "draft"))
    assert draft.config.vocab_size == target.config.vocab_size and type(draft) is type(target)
    ours, theirs = ((stages / name / "model/tokenizer.json").read_bytes() for name in ("draft", "base"))
    assert ours == theirs
    start = json.loads((stages / "pretrained/start/start.json").read_text())
    assert 0 < start["share"] < 0.6 and start["vocab_size"] == target.config.vocab_size
    found = json.loads((stages / "draft/model/draft.json").read_text())
    assert found["target_sha256"] == weights_sha256(stages / "base/model") and found["runtime"] == "genai"
    assert found["trained_on"] >= 1, "the greedy answer to `import os`, a prompt of both"
    kept = not_trained_on(read_written(stages / "proof/corpus"), read_written(stages / "answers/corpus"))
    loaded = load_recipe(folder / "tiny.yaml")
    corpus = prepare_data(loaded.data, folder / "run/data", say=lambda _: None)
    greedy = [d for d in kept if d.temperature == 0 and d.new < len(d.ids)]
    assert greedy and found["prompts"] == [list(d.ids[: len(d.ids) - d.new]) for d in greedy]
    record = read_draft_record(stages / "draft/model")
    assert record is not None and [list(prompt) for prompt in record.prompts] == found["prompts"]
    again = measure_acceptance(draft.eval(), target.eval(), kept, corpus.start_id)
    assert found["acceptance_sampled"] == pytest.approx(again.sampled, abs=1e-6)
    assert 0 < found["acceptance_greedy"] <= 1 and found["by_text"]["proof"]["tokens"] == found["tokens"] > 0
    results = json.loads((folder / "run/results.json").read_text())
    (kept_there,) = (stage["draft"] for stage in results["stages"] if "draft" in stage)
    assert kept_there == found
    assert any("aligned for genai by lk_hybrid" in line for line in said)
    assert any(line.startswith("draft: acceptance on ") for line in said)
    page = (folder / "run/report.html").read_text()
    assert "<strong>draft</strong>, aligned for genai. Of its first draft token" in page


def test_a_draft_that_was_killed_goes_on_with_the_same_bits(finished, tmp_path: Path) -> None:
    """From the middle of each stage: without its last checkpoint and its result, and without the acceptance."""
    before = finished[0]
    folder = shutil.copytree(before, tmp_path / "again")
    stages = folder / "run/stages"
    for name in ("pretrained", "draft"):
        (stages / name / "done.json").unlink()
        shutil.rmtree(stages / name / "model")
        last = max((stages / name / "checkpoints").glob("step-*"))
        shutil.rmtree(last)
    shutil.rmtree(stages / "pretrained/start")
    shutil.rmtree(stages / "code/corpus")
    edgewright.run(folder / "tiny.yaml", f"output_dir={folder / 'run'}", say=lambda _: None)
    for name in ("pretrained", "draft"):
        assert weights(folder / "run", name) == weights(before / "run", name)
        assert curve(folder / "run", name) == curve(before / "run", name)
    ours, theirs = ((each / "run/stages/draft/model/draft.json").read_text() for each in (folder, before))
    assert ours == theirs


def test_the_text_of_a_stage_is_another_recipe_when_it_changes(finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "again")
    (folder / "code/more.py").write_text("import this\n" * 50)
    with pytest.raises(RecipeError, match="EW-705"):
        edgewright.run(folder / "tiny.yaml", f"output_dir={folder / 'run'}", say=lambda _: None)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            "stage: answers, share",
            "stage: code, share",
            "code, which is no such stage",
        ),
        ("    generated: {stage: answers, share: 1.0}\n", "", "no `generated`"),
        (
            "objective: {type: align, teacher: {type: stage, stage: base}",
            "objective: {type: align, teacher: {type: stage, stage: pretrained}",
            "another model",
        ),
        ("held_out: proof", "held_out: answers", "the text that the draft learns"),
        ("held_out: proof", "held_out: [proof, nowhere]", "nowhere: no such stage"),
    ],
)
def test_an_alignment_without_text_of_its_target_is_refused(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = recipe(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(RecipeErrors, match="EW-843") as raised:
        load_recipe(path)
    assert said in str(raised.value)


def test_the_target_stands_wherever_a_path_is_its_name(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples"
    loaded = load_recipe(examples / "draft.yaml")
    teacher = examples.resolve() / "teacher"
    assert loaded.target == loaded.data.tokenizer.path == teacher  # type: ignore[union-attr]
    assert loaded.trainings[-1].judges[0].directory({}) == teacher
    other = tmp_path / "other"
    changed = load_recipe(examples / "draft.yaml", [f"target={other}"])
    assert changed.trainings[0].student.source.model == other  # type: ignore[union-attr]
    changed.dump_yaml(tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == changed


def test_a_target_that_nothing_names_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeErrors, match="EW-847"):
        load_recipe(path, ["target=somewhere"])


def test_the_example_can_run_and_says_shape_share_and_loss() -> None:
    report = edgewright.check(Path(__file__).parents[2] / "examples/draft.yaml")
    assert report.ok, report.errors
    notes = [check.found for check in report.checks if check.status == "note"]
    assert any("of its target's 4,458,752 parameters, 1 layers" in note for note in notes)
    assert any("aligned for genai" in note for note in notes)


def shortened(folder: Path, *, small: str = "") -> list[str]:
    """Overrides with which an example takes seconds, on the target of a run."""
    run = folder / "run/stages"
    short = "{per_device_train_batch_size: 2, eval_steps: 0, eval_sequences: 4, save_steps: 1}"
    stages = ["draft"] if small else ["pretrained", "draft"]
    start = [f"stages.draft.student.source.model={run / small / 'model'}"] if small else []
    return [
        f"target={run / 'base/model'}",
        f"data.files={folder / 'corpus'}/*.py",
        "data.sequence_length=48",
        "data.held_out=0.2",
        *start,
        *(f"stages.{name}.budget={{max_steps: 2}}" for name in stages),
        *(f"stages.{name}.training={short}" for name in stages),
        *([] if small else ["stages.pretrained.student.parameters=0.3"]),
        *(f"stages.{name}.{key}" for name in ("answers", "held_out") for key in ("max_new_tokens=12", "samples=1")),
        "stages.answers.temperatures=[0, 1.0]",
        "evaluate=null",
        "bench=null",
    ]


VARIANTS = {"draft_ternary": "", "draft_int4": "", "draft_lora": "domain", "draft_head": ""}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_runs_to_a_measured_draft(finished, tmp_path: Path, name: str) -> None:
    """In ternary, in 4 bits, and an existing small model by adapters that are merged; again it finds all done."""
    example = Path(__file__).parents[2] / f"examples/{name}.yaml"
    overrides = [*shortened(finished[0], small=VARIANTS[name]), f"output_dir={tmp_path / 'run'}", "exports=[]"]
    edgewright.run(example, *overrides, say=lambda _: None)
    model = tmp_path / "run/stages/draft/model"
    found = json.loads((model / "draft.json").read_text())
    assert 0 < found["acceptance_sampled"] < 1 and found["target_sha256"] == weights_sha256(
        finished[0] / "run/stages/base/model"
    )
    assert found["runtime"] == ("llamacpp" if name == "draft_int4" else "genai")
    assert (model / "lattice.safetensors").exists() == (name in ("draft_ternary", "draft_int4"))
    assert all(type(module).__module__.startswith(("torch", "transformers")) for module in load_model(model).modules())
    said: list[str] = []
    edgewright.run(example, *overrides, say=said.append)
    assert "draft: done already" in said


def test_a_trimmed_head_goes_on_with_the_same_tokens_and_bits(finished, tmp_path: Path) -> None:
    """Counted on the target's own text; the run is cut off after its first step."""
    example = Path(__file__).parents[2] / "examples/draft_head.yaml"
    overrides = [*shortened(finished[0]), f"output_dir={tmp_path / 'run'}", "exports=[]"]
    edgewright.run(example, *overrides, say=lambda _: None)
    stage = tmp_path / "run/stages/draft"
    model, before = stage / "model", weights(tmp_path / "run", "draft")
    kept = json.loads((model / "draft_head.json").read_text())["kept"]
    ids = np.concatenate([d.ids for d in read_written(tmp_path / "run/stages/answers/corpus")])
    counts = np.bincount(ids, minlength=300)
    assert len(kept) == 75 and kept == sorted(set(kept)) and load_model(model).config.eos_token_id in kept
    others = np.setdiff1d(np.arange(300), kept)
    assert counts[others].max() <= np.sort(counts[kept])[1], "but for the end, whatever is kept comes as often"
    head = load_model(model).get_output_embeddings().weight
    assert bool((head[others] == head[others[0]]).all())
    (stage / "done.json").unlink()
    shutil.rmtree(model)
    shutil.rmtree(max((stage / "checkpoints").glob("step-*")))
    edgewright.run(example, *overrides, say=lambda _: None)
    assert weights(tmp_path / "run", "draft") == before
    assert json.loads((model / "draft_head.json").read_text())["kept"] == kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft_ternary", "draft_int4"])
def test_the_files_of_a_variant_are_certified(finished, tmp_path: Path, name: str) -> None:
    example = Path(__file__).parents[2] / f"examples/{name}.yaml"
    result = edgewright.run(example, *shortened(finished[0]), f"output_dir={tmp_path / 'run'}", say=lambda _: None)
    rows = result.results["artifacts"]
    assert len(rows) == 2 and all(row["gate"] == "passed" for row in rows)
