"""Packs: a folder that measures itself without this package, and its result in our tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgewright
from edgewright import bench
from edgewright.bench_pack import pack, read_result
from edgewright.errors import BadInput, EdgewrightError, RecipeError

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "teacher"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shipped teacher in llama.cpp and in ONNX Runtime GenAI."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("onnxruntime_genai")
    out = tmp_path_factory.mktemp("exported")
    gguf = edgewright.export(TEACHER, to="gguf", quant="q8_0", out=out, verify=False)
    genai = edgewright.export(TEACHER, to="genai", quant="int8", out=out / "genai", verify=False)
    return [gguf.path, genai.path]


@pytest.fixture(scope="module")
def measured(exported: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a pack, run by a Python that cannot import this package."""
    folder = tmp_path_factory.mktemp("packs") / "pack"
    pack(exported, folder, prompt=8, generate=4, repeats=2)
    blocked = "import sys, runpy; sys.modules['edgewright'] = None; sys.modules['torch'] = None; "
    blocked += "sys.argv = ['bench.py', '--device', 'A Board/1', '--threads', '1']; "
    blocked += f"runpy.run_path({str(folder / 'bench.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    return folder / "result.json"


def test_a_pack_holds_what_the_device_needs(exported, tmp_path):
    made = pack(exported, tmp_path / "pack", prompt=8, generate=4, repeats=2)
    about = json.loads((tmp_path / "pack" / "pack.json").read_text())
    assert [entry["runtime"] for entry in about["artifacts"]] == ["llamacpp", "genai"]
    assert all((tmp_path / "pack" / entry["path"]).exists() for entry in about["artifacts"])
    assert {name.split("==")[0] for name in made.packages} == {"llama-cpp-python", "onnxruntime-genai"}
    assert all(name in (tmp_path / "pack" / "README.txt").read_text() for name in made.packages)
    text = (tmp_path / "pack" / "pack.json").read_text() + (tmp_path / "pack" / "README.txt").read_text()
    assert str(tmp_path) not in text and str(exported[0].parent) not in text
    assert "edgewright" not in {line.split()[1] for line in _imports(tmp_path / "pack" / "bench.py")}


def _imports(script: Path) -> list[str]:
    return [line.strip() for line in script.read_text().splitlines() if line.strip().startswith(("import ", "from "))]


def test_the_result_has_the_names_of_bench(measured):
    result = read_result(measured)
    assert (result["device"], result["threads"], result["repeats"]) == ("A Board/1", 1, 2)
    ours = bench(measured).to_json()["artifacts"]
    assert [row["device"] for row in ours] == ["A Board/1"] * 2
    for row, own in zip(result["artifacts"], ours, strict=True):
        assert row["tokens_per_s"] == own["tokens_per_s"] > 0
        assert set(own) - {"device"} <= set(row)
        assert row["peak_memory"] > 1e6 and row["ttft_ms"] > 0
    assert "hostname" not in json.dumps(result)


def test_device_rows_stand_beside_own_ones(measured, exported):
    rows = bench(measured, exported[0], prompt=8, generate=4, repeats=1, threads=1).artifacts
    assert [row.device for row in rows] == [None, "A Board/1", "A Board/1"]


def test_the_report_shows_other_devices(measured, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(json.dumps({"schema_version": 1, "name": "tiny", "artifacts": []}))
    result = edgewright.report(run, add=[measured])
    page = result.path.read_text()
    assert "On other devices" in page and "A Board/1" in page and "1-teacher-q8_0.gguf" in page
    assert [path.name for path in (run / "devices").iterdir()] == ["A-Board-1.json"]
    assert edgewright.report(run).to_json()["devices"][0]["device"] == "A Board/1"
    edgewright.report(run, add=[measured])
    assert len(list((run / "devices").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": 1}', '{"schema_version": 1, "artifacts": []}'])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(BadInput, match="EW-394"):
        bench(tmp_path / "result.json")


def test_a_pack_never_mixes_with_what_is_there(exported, tmp_path):
    (tmp_path / "old").write_text("x")
    with pytest.raises(RecipeError, match="EW-193"):
        pack(exported, tmp_path, prompt=8, generate=4, repeats=1)


def test_a_checkpoint_is_no_file_for_a_device(tmp_path):
    with pytest.raises(RecipeError, match="EW-194"):
        pack([TEACHER], tmp_path / "pack", prompt=8, generate=4, repeats=1)


def test_tests_longer_than_the_context_are_refused_here(exported, tmp_path):
    with pytest.raises(EdgewrightError, match="EW-602"):
        pack(exported, tmp_path / "pack", prompt=8, generate=100_000, repeats=1)
    assert not (tmp_path / "pack").exists()


def test_native_loops_are_measured_too(exported):
    report = bench(*exported, prompt=8, generate=4, repeats=1, threads=1, loop="native")
    assert all(row.tokens_per_s > 0 for row in report.artifacts)
    assert report.command.endswith("--loop native")


def test_a_pack_opens_openvino_folders_as_the_bench_does():
    """The same settings for exact files and for files of codes, and no telemetry, although the pack shares no code."""
    import ast

    from edgewright import bench_pack
    from edgewright.export.runtimes import openvino

    text = (Path(bench_pack.__file__).parent / "templates" / "pack_runner.py").read_text()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    given = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in classes["OpenVino"].body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert (given["exact"], given["fast"], given["codes"]) == (openvino.EXACT, openvino.FAST, openvino.CODES)
    for name, silence in (("OpenVino", "openvino_telemetry"), ("Genai", "disable_telemetry_events()")):
        source = ast.get_source_segment(text, classes[name])
        assert source is not None and silence in source
