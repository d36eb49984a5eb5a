"""`check`: what would stop a run is found in seconds, and nothing is trained or written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgewright.check import CheckReport, check
from edgewright.data.tokenizer import TrainTokenizer, train_tokenizer
from edgewright.errors import RecipeErrors
from edgewright.vocabulary import quoted

WORDS = "the quick brown fox jumps over the lazy dog " * 30
RECIPE = """\
version: 1
name: tiny
data: {type: files, files: "*.txt", tokenizer: {type: pretrained, path: model}, sequence_length: 16}
stages:
  - name: small
    student: {type: checkpoint, model: model}
    objective: {type: distill, teacher: {type: checkpoint, model: teacher}}
    methods: [{type: ternary}]
    budget: {max_steps: 3}
  - name: again
    student: {type: stage, stage: small}
    budget: {max_steps: 3}
exports:
  - {name: file, model: teacher, to: gguf, quant: f16}
"""


def save_model(directory: Path, *, words: str = WORDS, rows: int | None = None) -> None:
    """A model directory that has everything that `check` looks at."""
    train_tokenizer([words], TrainTokenizer(vocab_size=300), directory)
    tokens = len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"])
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows or tokens}))
    save_file({"embedding": np.ones((100, 3), np.float32)}, directory / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe that can run, and the working directory."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(WORDS)
    save_model(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(folder: Path, *overrides: str) -> CheckReport:
    return check(folder / "recipe.yaml", *overrides)


def codes(report: CheckReport) -> list[str]:
    return [error.code for error in report.errors]


def test_a_recipe_that_can_run(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    report = look(folder)
    assert report.ok and report.exit_code == 0 and codes(report) == []
    assert report.parameters == {"small": 300, "again": 300}
    assert {check.status for check in report.checks} == {"ok"}
    found = report.to_json()
    assert found["ok"] is True and found["schema_version"] == 1 and json.loads(json.dumps(found)) == found
    assert sorted(folder.rglob("*")) == before, "check writes nothing"


def test_a_wrong_recipe_is_not_opened_any_further(folder: Path) -> None:
    with pytest.raises(RecipeErrors, match="EW-112"):
        look(folder, "seed=x")


@pytest.mark.parametrize("more", ["", ", sub_norm: true, num_key_value_heads: 2"])
def test_parameters_and_layers_of_a_preset_are_those_of_the_model(folder: Path, more: str) -> None:
    from edgewright.preview import architecture, preview
    from edgewright.recipe import load_recipe
    from edgewright.student import build_preset

    overrides = [
        f"stages.small.student={{type: preset, preset: llama-1m{more}}}",
        "stages.small.objective={type: next_token}",
    ]
    report = look(folder, *overrides)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    student = recipe.stages[0].student
    vocab_size = json.loads((folder / "model/config.json").read_text())["vocab_size"]
    model = build_preset(student, vocab_size=vocab_size, max_position_embeddings=16, bos=0, eos=0, seed=0)
    assert report.parameters["small"] == sum(parameter.numel() for parameter in model.parameters())
    layers = {name: tuple(p.shape) for name, p in model.named_parameters() if "proj" in name}
    (share,) = preview(recipe, recipe.stages[0], architecture(recipe, recipe.stages[0], vocab_size, {})).shares
    assert {f"{name}.weight": shape for name, shape in share[1].items()} == layers
    assert model.config.to_dict().get("quantization_config") is None


def test_a_teacher_with_other_tokens_names_the_first_one(folder: Path) -> None:
    shutil.rmtree(folder / "teacher")
    save_model(folder / "teacher", words="other words make other merges, and so another vocabulary " * 30)
    vocabularies = [
        {token: text for text, token in json.loads(path.read_text())["model"]["vocab"].items()}
        for path in (folder / "model/tokenizer.json", folder / "teacher/tokenizer.json")
    ]
    first = next(token for token in range(1000) if vocabularies[0].get(token) != vocabularies[1].get(token))
    report = look(folder)
    (error,) = report.errors
    assert (error.code, error.exit_code) == ("EW-130", 2) and error.where == str(folder / "teacher")
    assert f"token {first} " in error.what and "teacher of stage small" in error.what
    assert quoted(vocabularies[0].get(first)) in str(error.expected)
    assert error.found == quoted(vocabularies[1].get(first))


def test_rows_that_only_pad_the_vocabulary_are_a_note(folder: Path) -> None:
    shutil.rmtree(folder / "teacher")
    save_model(folder / "teacher", rows=512)
    report = look(folder)
    assert report.ok
    (note,) = [check for check in report.checks if check.status == "note"]
    assert "only pad" in note.found and note.what == "stage small"


def test_further_tokens_of_the_teacher_are_a_note_and_missing_ones_an_error(folder: Path) -> None:
    def rename(directory: Path, add: dict[str, int]) -> None:
        path = directory / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["vocab"] |= add
        path.write_text(json.dumps(tokenizer))

    size = len(json.loads((folder / "model/tokenizer.json").read_text())["model"]["vocab"])
    rename(folder / "teacher", {"<further>": size})
    report = look(folder)
    assert report.ok and any("1 further tokens" in check.found for check in report.checks)
    rename(folder / "model", {"<ours>": size, "<ours too>": size + 1})
    rename(folder / "teacher", {"<ours>": size})
    assert codes(look(folder))[0] == "EW-130"


def test_another_end_token_is_an_error(folder: Path) -> None:
    path = folder / "teacher/tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|endoftext|>"', '"eos_token": "a"'))
    (error,) = look(folder).errors
    assert error.code == "EW-130" and "the end token" in error.what


def test_a_trained_tokenizer_does_not_fit_a_checkpoint(folder: Path) -> None:
    report = look(folder, "data.tokenizer={type: train, vocab_size: 300}")
    assert codes(report) == ["EW-130"]
    assert "type: pretrained" in str(report.errors[0].fix)


def test_models_are_guarded(folder: Path) -> None:
    (folder / "teacher/pytorch_model.bin").write_bytes(b"\x80\x04]\x94.")
    report = look(folder)
    assert codes(report) == ["EW-315"] and report.exit_code == 8
    (folder / "teacher/pytorch_model.bin").unlink()
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    report = look(folder)
    assert codes(report) == ["EW-317"] and report.exit_code == 3
    assert report.parameters == {}


def test_a_fault_that_two_looks_meet_is_one_error(folder: Path) -> None:
    lessons = "objective={type: distill, teacher: {type: checkpoint, model: none}, losses: [{function: minilm}]}"
    report = look(folder, f"stages.small.{lessons}", PRESET)
    assert codes(report) == ["EW-310"]
    assert sum(check.status == "failed" for check in report.checks) == 2


def test_several_faults_of_one_stage_are_counted_each(folder: Path) -> None:
    grown = "{type: grown, source: {type: stage, stage: small}, hidden_size: 64, num_hidden_layers: 1}"
    report = look(folder, PRESET, PLAIN, f"stages.again.student={grown}")
    assert codes(report) == ["EW-763", "EW-763"]
    assert [check.found.count("EW-") for check in report.checks if check.status == "failed"] == [0]


def test_every_fault_is_listed(folder: Path) -> None:
    (folder / "text.txt").unlink()
    (folder / "model/tokenizer.json").unlink()
    (folder / "teacher/config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    assert codes(look(folder)) == ["EW-203", "EW-220", "EW-311", "EW-313"]


@pytest.mark.parametrize(
    ("content", "code"), [(b" \n\n ", "EW-131"), (b"", "EW-131"), (b"good\xff\xfe bad", "EW-202"), (b"a\0b", "EW-202")]
)
def test_a_corpus_without_usable_text(folder: Path, content: bytes, code: str) -> None:
    (folder / "text.txt").write_bytes(content)
    report = look(folder, "data.on_bad_text=strict")
    assert codes(report) == [code]


def test_a_small_disk_is_an_error_before_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    (error,) = look(folder).errors
    assert (error.code, error.exit_code) == ("EW-403", 4) and error.found == "10 bytes free"


def test_torch_is_not_imported_for_a_recipe_without_methods_and_models(folder: Path) -> None:
    code = "import sys, edgewright; assert edgewright.check(*sys.argv[1:]).ok; sys.exit('torch' in sys.modules)"
    scratch = ["student={type: preset, preset: llama-1m}", "objective={type: next_token}", "methods=[]"]
    done = subprocess.run(
        [sys.executable, "-c", code, "recipe.yaml", *(f"stages.small.{setting}" for setting in scratch)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PRESET = "stages.small.student={type: preset, preset: llama-1m}"
PLAIN = "stages.small.objective={type: next_token}"


def exported(to: str, quant: str) -> str:
    return f"exports=[{{name: file, model: small, to: {to}, quant: {quant}}}]"


def found_about(report: CheckReport, what: str) -> list[tuple[str, str]]:
    return [(check.status, check.found) for check in report.checks if check.what == what]


def test_formats_that_hold_what_is_trained_are_named(folder: Path) -> None:
    report = look(folder, PRESET, PLAIN, "stages.small.methods=[{type: integer}]", exported("onnx", "int4"))
    ((status, found),) = found_about(report, "lattice of small")
    assert status == "ok" and "gguf q4_0 q5_0 q8_0 q4_1; onnx int4 int8" in found
    assert [status for status, _ in found_about(report, "export file")] == ["ok"]


def test_an_export_that_stores_some_weights_wider_is_a_note(folder: Path) -> None:
    sizes = ["stages.small.student.hidden_size=256", "stages.small.student.intermediate_size=384"]
    report = look(folder, PRESET, PLAIN, *sizes, exported("gguf", "tq2_0"))
    (ok, note) = found_about(report, "export file")
    assert report.ok and (ok[0], note[0]) == ("ok", "note")
    assert "384 columns" in note[1] and "mlp.down_proj" in note[1] and "256" in note[1]


@pytest.mark.parametrize(("to", "quant", "noted"), [("gguf", "tq2_0", 1), ("onnx", "ternary", 1), ("gguf", "q8_0", 0)])
def test_layers_that_are_not_trained_for_a_ternary_width_are_a_note(
    folder: Path, to: str, quant: str, noted: int
) -> None:
    sizes = ["stages.small.student.hidden_size=256", "stages.small.student.intermediate_size=256"]
    method = "stages.small.methods=[{type: ternary, exclude: [down_proj]}]"
    report = look(folder, PRESET, PLAIN, *sizes, method, exported(to, quant))
    notes = [found for status, found in found_about(report, "export file") if status == "note"]
    assert report.ok and len(notes) == noted
    assert all("3, the first model.layers.0.mlp.down_proj" in note for note in notes)


@pytest.mark.parametrize(
    ("method", "to", "quant", "reason"),
    [
        ("{type: ternary, granularity: group, group: 64}", "gguf", "tq2_0", "block of 256"),
        ("{type: ternary, quantizer: seq_2bit}", "onnx", "ternary", "codes reach -3..3"),
        ("{type: integer, format: q8_0}", "openvino", "int4", "codes reach -127..127"),
        ("{type: integer, format: matmulnbits, bits: 8}", "gguf", "q8_0", "float16"),
        ("{type: integer}", "gguf", "q4_k", "rounds every weight anew"),
        ("{type: integer}", "gguf", "f16", "float16"),
    ],
)
def test_an_export_that_no_weight_fits_is_refused(folder: Path, method: str, to: str, quant: str, reason: str) -> None:
    report = look(folder, PRESET, PLAIN, f"stages.small.methods=[{method}]", exported(to, quant))
    (error,) = report.errors
    assert error.code == "EW-733" and reason in str(error.found)
    assert quant not in str(error.expected).split(to, 1)[-1].split(";")[0].split()


def test_a_group_that_does_not_divide_a_row_is_found_before_training(folder: Path) -> None:
    method = "stages.small.methods=[{type: ternary, granularity: group, group: 256}]"
    (error,) = look(folder, PRESET, PLAIN, method).errors
    assert error.code == "EW-703" and "model.layers.0.self_attn.q_proj" in error.what
    assert look(folder, PRESET, PLAIN, method.replace("256", "128")).ok
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "intermediate_size": 96}))
    assert codes(look(folder, method)) == ["EW-703"]
    assert codes(look(folder, method.replace("256}", "256, exclude: [down_proj]}"))) == []
