"""Recipes: what is wrong is said all at once, with its place and the nearest thing that is right."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgewright.errors import RecipeError, RecipeErrors
from edgewright.recipe import Recipe, json_schema, load_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

MINIMAL = """\
version: 1
name: tiny
data: {type: files, files: "texts/*.txt"}
stages:
  - name: base
    student: {type: preset, preset: llama-1m}
    budget: {max_steps: 3}
"""

FULL = """\
version: 1
name: full
output_dir: runs/full
seed: 7
data: {type: stdlib, tokenizer: {type: pretrained, path: teacher}, sequence_length: 128}
stages:
  - name: base
    student: {type: preset, preset: llama-4m, hidden_size: 512}
    optimizer: {type: adamw, learning_rate: 1e-4, betas: [0.9, 0.99]}
    schedule: {type: wsd, decay_ratio: 0.3}
    budget: {max_tokens: 1e6}
  - name: small
    student: {type: stage, stage: base}
    objective: {type: distill, teacher: {type: checkpoint, model: ../teacher}, kl_weight: 1}
    methods: [{type: ternary, granularity: group}]
    budget: {max_steps: 10}
exports:
  - {name: file, model: small, to: gguf, quant: tq2_0, embedding_quant: q8_0}
  - {name: folder, model: small, to: genai, quant: ternary}
sample: {prompt: "no"}
"""


@pytest.fixture
def write(tmp_path: Path):  # noqa: ANN201 - a small helper
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write


def errors_of(path: Path, *overrides: str) -> list[RecipeError]:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.errors


def the_error(path: Path, *overrides: str) -> RecipeError:
    (error,) = errors_of(path, *overrides)
    return error


def place(error: RecipeError) -> str:
    """`line:column` of an error."""
    return ":".join(str(error.where).rsplit(":", 2)[1:])


# --- what is right -------------------------------------------------------------------------------------------------


def test_a_minimal_recipe_has_defaults(write) -> None:
    recipe = load_recipe(write(MINIMAL))
    (stage,) = recipe.stages
    assert (stage.objective.type, stage.optimizer.type, stage.schedule.type) == ("next_token", "adamw", "cosine")
    assert recipe.run_directory == Path("runs/tiny") and recipe.exports == () and recipe.seed == 0


def test_a_full_recipe(write) -> None:
    recipe = load_recipe(write(FULL))
    base, small = recipe.stages
    assert base.optimizer.learning_rate == 1e-4 and isinstance(base.optimizer.learning_rate, float)
    assert base.budget.max_tokens == 1_000_000 and isinstance(base.budget.max_tokens, int)
    assert [method.type for method in small.methods] == ["ternary"]
    assert recipe.sample is not None and recipe.sample.prompt == "no"
    assert recipe.stage("small") is small and recipe.stage("none") is None


def test_paths_in_a_file_start_at_the_file(write, tmp_path: Path) -> None:
    recipe = load_recipe(write(FULL))
    assert recipe.data.tokenizer.path == tmp_path / "teacher"
    assert recipe.stages[1].objective.teacher.model == tmp_path.parent / "teacher"
    assert recipe.output_dir == Path("runs/full")
    assert load_recipe(write(MINIMAL)).data.files == str(tmp_path / "texts/*.txt")


def test_paths_in_overrides_start_here(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(MINIMAL)
    monkeypatch.chdir(tmp_path.parent)
    recipe = load_recipe(path, ["data.files=my/*.txt", "output_dir=out"])
    assert recipe.data.files == str(tmp_path.parent / "my/*.txt")
    assert recipe.output_dir == Path("out")
    assert load_recipe(path, ["data.files=*.txt"]).data.files == str(tmp_path.parent / "*.txt")
    assert load_recipe(path, ["data.files=[a.txt, b.md]"]).data.files == tuple(
        str(tmp_path.parent / name) for name in ("a.txt", "b.md")
    )


@pytest.mark.parametrize("stage", ["1", "small"])
def test_overrides_reach_stages_by_index_and_by_name(write, stage: str) -> None:
    recipe = load_recipe(write(FULL), [f"stages.{stage}.budget.max_steps=5", f"stages.{stage}.training.precision=fp32"])
    assert recipe.stages[1].budget.max_steps == 5 and recipe.stages[1].training.precision == "fp32"
    assert recipe.stages[0].budget.max_steps is None


def test_override_values_are_yaml(write) -> None:
    overrides = ["seed=3", "sample.prompt=yes", "stages.0.optimizer.learning_rate=1e-5", "bench=null", "exports=[]"]
    recipe = load_recipe(write(FULL), overrides)
    assert recipe.seed == 3 and recipe.sample is not None and recipe.sample.prompt == "yes"
    assert recipe.stages[0].optimizer.learning_rate == 1e-5
    assert recipe.bench is None and recipe.exports == ()


def test_a_later_override_wins(write) -> None:
    assert load_recipe(write(MINIMAL), ["seed=1", "seed=2"]).seed == 2


def test_a_section_can_be_replaced_whole(write) -> None:
    recipe = load_recipe(write(FULL), ["stages.small.objective={type: next_token}"])
    assert recipe.stages[1].objective.type == "next_token"


def test_the_resolved_recipe_runs_again_and_is_the_same(write, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    extra = "  - {name: third, model: model, to: gguf, quant: f16}\nsample:"
    recipe = load_recipe(write(FULL.replace("sample:", extra)), ["sample.prompt='1e-4'"])
    resolved = tmp_path / "runs/full/recipe.resolved.yaml"
    resolved.parent.mkdir(parents=True)
    recipe.dump_yaml(resolved)
    assert str(tmp_path) not in resolved.read_text(), "no absolute paths: the folder may be moved"
    assert load_recipe(resolved) == recipe
    again = resolved.read_text()
    load_recipe(resolved).dump_yaml(resolved)
    assert resolved.read_text() == again


def test_a_directory_named_like_a_stage_is_told_apart(write, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    text = FULL.replace("name: file, model: small", "name: file, model: ./small")
    recipe = load_recipe(write(text))
    assert recipe.exports[0].model == str(tmp_path / "small") and recipe.exports[1].model == "small"
    recipe.dump_yaml(tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_recipe(path: Path, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    shutil.copy(path, tmp_path)
    assert isinstance(load_recipe(tmp_path / path.name), Recipe)


def test_the_schema_knows_every_section(write) -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False and "TernaryConfig" in schema["$defs"]


# --- what is wrong in YAML -----------------------------------------------------------------------------------------


def test_yaml_1_2(write) -> None:
    recipe = load_recipe(write(MINIMAL.replace("name: tiny", "name: no").replace("max_steps: 3", "max_steps: 0o17")))
    assert recipe.name == "no" and recipe.stages[0].budget.max_steps == 15


@pytest.mark.parametrize(
    ("text", "code", "where", "words"),
    [
        ("", "EW-103", "1:1", "an empty file"),
        ("# only a comment\n", "EW-103", "1:1", "an empty file"),
        ("- a\n- b\n", "EW-103", "1:1", "a list"),
        ("just text\n", "EW-103", "1:1", "a single value"),
        ("version: 1\nname: [a\n", "EW-102", "3:1", "YAML"),
        ("version: 1\n\tname: x\n", "EW-102", "2:1", "spaces"),
        ("a: 1\n---\nb: 1\n", "EW-102", "2:1", "another document"),
        ("a: *nowhere\n", "EW-102", "1:4", "undefined alias"),
        (b"version: 1\nname: \xff\n", "EW-101", "2:7", "0xff"),
        (b"version: 1\n# \xc3\xa4\nname: \xff\n", "EW-101", "3:7", "0xff"),
    ],
)
def test_no_yaml_no_recipe(write, text: str | bytes, code: str, where: str, words: str) -> None:
    error = the_error(write(text))
    assert (error.code, place(error)) == (code, where)
    assert words in error.message()


def test_no_file_and_other_files(tmp_path: Path) -> None:
    assert "No such file" in the_error(tmp_path / "none.yaml").message()
    assert "directory" in the_error(tmp_path).message()
    (tmp_path / "big.yaml").write_bytes(bytes(200_000))
    assert the_error(tmp_path / "big.yaml").code == "EW-101"


def test_duplicate_keys_are_refused_at_the_second_one(write) -> None:
    error = the_error(write(MINIMAL + "name: again\nseed: 1\n"))
    assert (error.code, place(error)) == ("EW-104", "8:1")
    assert "first on line 2" in error.message()


def test_an_alias_bomb_is_refused(write) -> None:
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 9))
    errors = errors_of(write("l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + levels))
    assert "EW-105" in {error.code for error in errors}


def test_deep_nesting_is_refused(write) -> None:
    assert "EW-105" in {error.code for error in errors_of(write("a: " + "[" * 40_000 + "]" * 40_000))}
    assert "EW-105" in {error.code for error in errors_of(write("a: " + "[" * 60 + "]" * 60))}


def test_an_alias_that_is_no_bomb_works(write) -> None:
    text = MINIMAL.replace("budget: {", "budget: &budget {")
    text += "  - name: more\n    student: {type: stage, stage: base}\n    budget: *budget\n"
    assert load_recipe(write(text)).stages[1].budget.max_steps == 3


@pytest.mark.parametrize("value", ["!!python/object:os.system x", "!tag 3", ".inf", "-.inf", ".nan", "{[a]: 1}"])
def test_yaml_that_no_recipe_needs(write, value: str) -> None:
    error = next(error for error in errors_of(write(MINIMAL + f"seed: {value}\n")) if error.code == "EW-105")
    assert place(error).startswith("8:")


# --- what is wrong in a recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "code", "where", "words"),
    [
        ("name: tiny", "nmae: tiny", "EW-110", "2:1", "did you mean name?"),
        ("budget: {max_steps", "budget: {max_stesp", "EW-110", "7:14", "did you mean max_steps?"),
        ("max_steps: 3", "max_steps: 3, learning_rate: 1", "EW-110", "7:28", "belongs in stages[].optimizer"),
        ("type: preset, ", "type: prest, ", "EW-114", "6:21", "did you mean preset?"),
        ("type: preset, ", "", "EW-111", "6:5", "preset | checkpoint | stage"),
        ("preset: llama-1m", "preset: llama-1g", "EW-113", "6:37", "did you mean llama-1"),
        ("preset: llama-1m", "preset: llama-1m, hidden_size: -4", "EW-113", "6:60", "more than 0"),
        ("preset: llama-1m", "preset: llama-1m, hidden_size: 4.5", "EW-112", "6:60", "a whole number"),
        ("preset: llama-1m", "preset: llama-1m, tie_word_embeddings: no", "EW-112", "6:68", "true or false"),
        ("max_steps: 3", 'max_steps: "3"', "EW-112", "7:25", "without quotes"),
        ("max_steps: 3", "max_steps: 3, max_tokens: 4", "EW-115", "7:13", "exactly one"),
        ("    budget: {max_steps: 3}\n", "", "EW-111", "5:5", "budget"),
        ("name: tiny", "name: 3", "EW-112", "2:7", "put it in quotes"),
        ("name: tiny", "name: a/b", "EW-113", "2:7", "letters, digits"),
        ("version: 1", "version: 2", "EW-113", "1:10", "1"),
        ("files: ", "path: ", "EW-110", "3:21", "unknown key 'path'"),
        ('files: "texts/*.txt"', "files: []", "EW-112", "3:28", "at least 1"),
        ('files: "texts/*.txt"', "files: [3]", "EW-112", "3:29", "text"),
        ("stages:", "stages: 3\nexports:", "EW-112", "4:9", "a list"),
        ("data: {", "data: 3 #", "EW-112", "3:7", "a section"),
    ],
)
def test_each_error_has_its_place_and_a_fix(write, before: str, after: str, code: str, where: str, words: str) -> None:
    assert before in MINIMAL
    path = write(MINIMAL.replace(before, after))
    found = [error for error in errors_of(path) if error.code == code and place(error) == where]
    assert len(found) == 1, [error.message() for error in errors_of(path)]
    assert words in found[0].message() and str(found[0].where).startswith(str(path.absolute()))


@pytest.mark.parametrize(
    ("before", "after", "code", "words"),
    [
        ("name: small", "name: base", "EW-120", "same name"),
        ("name: folder", "name: file", "EW-120", "same name"),
        ("stage: base", "stage: bsae", "EW-121", "did you mean base?"),
        ("stage: base", "stage: small", "EW-121", "comes later"),
        ("type: checkpoint, model: ../teacher", "type: stage, stage: small", "EW-121", "an earlier stage: base"),
        ("name: file, model: small", "name: file, model: smal", "EW-122", "did you mean small?"),
        ("to: gguf", "to: ggfu", "EW-123", "did you mean gguf?"),
        ("quant: tq2_0", "quant: ternary", "EW-124", "a width of hf, onnx, genai, openvino"),
        ("quant: tq2_0", "quant: tq2-0", "EW-124", "did you mean tq2_0?"),
        ("embedding_quant: q8_0", "embedding_quant: tq2_0", "EW-124", "f32 | f16"),
        ("[{type: ternary, granularity: group}]", "[{type: ternary}, {type: ternary}]", "EW-125", "twice"),
        (
            "[{type: ternary, granularity: group}]",
            "[{type: ternary, layers: [q_proj]}, {type: ternary}]",
            "EW-125",
            "takes every layer",
        ),
        ("{type: ternary, granularity: group}", "{granularity: group}", "EW-111", "| ternary"),
        ("{type: ternary, granularity: group}", "{type: ternery}", "EW-114", "did you mean ternary?"),
    ],
)
def test_sections_that_contradict_each_other(write, before: str, after: str, code: str, words: str) -> None:
    assert before in FULL
    text = FULL.replace(before, after)
    error = next(error for error in errors_of(write(text)) if error.code == code)
    assert words in error.message()
    line = int(place(error).split(":")[0])
    changed = next(n for n, (a, b) in enumerate(zip(FULL.splitlines(), text.splitlines(), strict=True), 1) if a != b)
    assert line == changed


def test_all_errors_come_at_once_and_in_order(write) -> None:
    text = FULL.replace("seed: 7", "sed: 7").replace("type: wsd", "type: wds").replace("max_steps: 10", "max_steps: x")
    text = text.replace("stage: base", "stage: bas").replace("quant: tq2_0", "quant: tq3") + "extra: 1\nname: again\n"
    errors = errors_of(write(text), "stages.9.name=x", "nothing", "sample.prompt=3")
    assert [error.code for error in errors] == [
        "EW-110", "EW-114", "EW-121", "EW-112", "EW-124", "EW-110", "EW-104", "EW-116", "EW-116", "EW-112",
    ]  # fmt: skip
    lines = [int(place(error).split(":")[0]) for error in errors[:7]]
    assert lines == sorted(lines)
    assert [str(error.where) for error in errors[7:]] == [
        "override 'stages.9.name=x'", "override 'nothing'", "override 'sample.prompt=3'",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("stages.sma.budget.max_steps=1", "EW-116", "did you mean small?"),
        ("stages.5.budget.max_steps=1", "EW-116", "0, 1"),
        ("stages.0.buget.max_steps=1", "EW-110", "did you mean budget?"),
        ("name.first=1", "EW-116", "name has no keys"),
        ("=1", "EW-116", "section.key=value"),
        ("seed=[1", "EW-116", "not valid YAML"),
        ("seed=one", "EW-112", "a whole number"),
        ("stages.small.student.stage=none", "EW-121", "no stage"),
        ("exports.file.quant=q9", "EW-124", "tq2_0"),
        ("data.type=hff", "EW-114", "did you mean hf?"),
    ],
)
def test_wrong_overrides_are_named(write, override: str, code: str, words: str) -> None:
    error = the_error(write(FULL), override)
    assert error.where == f"override {override!r}"
    assert error.code == code and words in error.message()


def test_recipe_errors_do_not_import_torch(write) -> None:
    """A misspelt key must not cost seconds."""
    code = (
        "import sys\nfrom edgewright.errors import RecipeErrors\nfrom edgewright.recipe import load_recipe\n"
        "try:\n    load_recipe(sys.argv[1])\nexcept RecipeErrors:\n    pass\nelse:\n    sys.exit('no error')\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'llama_cpp', 'plotly', 'gguf'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    path = write(FULL.replace("name: full", "nmae: full"))
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
