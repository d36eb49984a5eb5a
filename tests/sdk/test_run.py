"""A whole run: corpus, two stages, exports, gate, evaluation, benchmark, sample, report; and again when all is done."""

import sys
from pathlib import Path

import pytest

import edgewright
from edgewright.errors import GateFailed, RecipeErrors
from edgewright.export.artifact import read_entry

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import write_recipe  # noqa: E402

EXPORTS = """
exports:
  - {name: base-f32, model: base, to: gguf, quant: f32}
  - {name: student-tq2_0, model: student, to: gguf, quant: tq2_0, embedding_quant: q8_0}
  - {name: student-ternary, model: student, to: genai, quant: ternary}
evaluate: {max_tokens: 400}
bench: {prompt: 16, generate: 8, repeats: 2, threads: 1}
sample: {prompt: "def ", max_new_tokens: 8}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, run directory, result, what was said)"""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, ternary=True)
    text = recipe.read_text().replace("evaluate: null\nbench: null\n", EXPORTS.lstrip("\n"))
    text = text.replace("hidden_size: 64", "hidden_size: 256").replace(
        "intermediate_size: 64", "intermediate_size: 256"
    )
    recipe.write_text(text.replace("num_attention_heads: 2", "num_attention_heads: 4"))
    said = []
    result = edgewright.run(recipe, f"output_dir={folder / 'run'}", say=said.append)
    return recipe, folder / "run", result, said


def test_every_file_is_certified_and_measured(finished):
    _, run, result, _ = finished
    rows = result.results["artifacts"]
    assert [row["name"] for row in rows] == ["base-f32", "student-tq2_0", "student-ternary"]
    for row in rows:
        assert row["gate"] == "passed" and row["lattice_identity"]
        assert (run / row["path"]).exists() and row["bytes"] > 0
        for figure in ("bits_per_byte", "kl", "ttft_ms", "prompt_tokens_per_s", "tokens_per_s", "peak_memory"):
            assert row[figure] is not None and row[figure] >= 0, figure
    assert [sample["artifact"] for sample in result.results["samples"]] == [row["name"] for row in rows]


def test_checkpoint_and_lossless_file_have_the_same_quality(finished):
    _, _, result, _ = finished
    checkpoints = {row["name"]: row["bits_per_byte"] for row in result.results["checkpoints"]}
    files = {row["name"]: row["bits_per_byte"] for row in result.results["artifacts"]}
    assert files["base-f32"] == pytest.approx(checkpoints["base"], rel=1e-5)
    for name in ("student-tq2_0", "student-ternary"):
        assert files[name] == pytest.approx(checkpoints["student"], rel=1e-2)


def test_the_ternary_files_hold_all_linear_weights_in_two_bits(finished):
    _, run, result, _ = finished
    for row in result.results["artifacts"][1:]:
        entry = read_entry(run / row["path"])
        assert entry["fallbacks"] == []
        assert set(entry["lattice"].values()) == {"exact"} and len(entry["lattice"]) == 7


def test_report_json_has_the_names_that_scripts_rely_on(finished):
    _, run, _, _ = finished
    report = edgewright.report(run).to_json()
    names = (
        "path to quant bytes bits_per_byte kl ttft_ms prompt_tokens_per_s tokens_per_s tokens_per_s_sd peak_memory gate"
    )
    for artifact in report["artifacts"]:
        assert set(names.split()) <= artifact.keys()
        assert Path(artifact["path"]).exists()


def test_nothing_of_this_machine_is_written_down(finished):
    """No absolute path in any text file of the run, but the output_dir that was asked for, in the recipe."""
    _, run, _, _ = finished
    for path in run.rglob("*"):
        if path.suffix in {".json", ".yaml", ".jsonl", ".html"} and path.name != "tokenizer.json":
            lines = path.read_text(encoding="utf-8").splitlines()
            assert not [line for line in lines if str(run.parent) in line and "output_dir:" not in line], path


def test_again_all_is_done(finished):
    recipe, run, result, _ = finished
    said = []
    again = edgewright.run(recipe, f"output_dir={run}", say=said.append)
    assert {"base: done already", "student: done already", "measured already"} <= set(said)
    assert sum("exported already" in line for line in said) == 3
    assert again.results == result.results


def test_a_changed_export_is_made_again_and_only_that(finished):
    recipe, run, _, _ = finished
    said = []
    edgewright.run(
        recipe,
        f"output_dir={run}",
        "exports.1.embedding_quant=f16",
        "bench=null",
        "sample=null",
        "evaluate=null",
        say=said.append,
    )
    assert sum("exported already" in line for line in said) == 2
    (file,) = (run / "exports" / "student-tq2_0").glob("*.gguf")
    assert read_entry(file)["embedding_quant"] == "f16"


def test_a_damaged_artifact_is_made_again(finished):
    recipe, run, _, _ = finished
    (file,) = (run / "exports" / "base-f32").glob("*.gguf")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    said = []
    edgewright.run(recipe, f"output_dir={run}", "bench=null", "sample=null", "evaluate=null", say=said.append)
    assert "base-f32: exported already" not in said
    assert read_entry(file)["gate"] == "passed"


def test_a_gate_that_fails_stops_the_run_and_leaves_no_file(finished):
    recipe, run, _, _ = finished
    with pytest.raises(GateFailed, match="EW-504"):
        edgewright.run(
            recipe,
            f"output_dir={run}",
            "exports=[{name: bad, model: student, to: gguf, quant: q8_0, embedding_quant: q4_0, max_kl: 1e-12}]",
        )
    assert not list((run / "exports").glob("bad*/*.gguf"))


def test_all_errors_of_a_recipe_come_before_anything_is_made(finished, tmp_path):
    recipe, _, _, _ = finished
    with pytest.raises(RecipeErrors, match=r"EW-1\d\d[\s\S]*EW-1\d\d"):
        edgewright.run(recipe, f"output_dir={tmp_path / 'run'}", "stages.0.budgt=1", "exports.0.quant=q9")
    assert not (tmp_path / "run").exists()
