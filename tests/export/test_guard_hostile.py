"""Every kind of hostile model is refused with its code and by its name, in little memory, before a library sees it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import hostile
import hostile_graphs as graphs
import pytest

import edgewright
from edgewright.error_catalogue import catalogue
from edgewright.errors import BadInput, EdgewrightError, Unsafe
from edgewright.export import guard
from edgewright.export.guard import openvino as guard_openvino

CASES = {f"{case.kind}: {case.name}": case for case in hostile.cases()}
UNSAFE = {313, 314, 315, 316, 330, 331, 333, 335, 336, 338, 339}
LIMIT = 64 * 2**20

MEASURE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import hostile
from edgewright.export import guard

alone = sys.argv[2] == "alone"
for kind, path in json.load(sys.stdin):
    if alone and os.fork():
        os.wait()
        continue
    print(json.dumps([path, hostile.peak_and_time(kind, hostile.Path(path))]), flush=True)
    if alone:
        os._exit(0)
"""


def test_there_are_as_many_kinds_as_promised() -> None:
    counts = {kind: sum(case.kind == kind for case in CASES.values()) for kind in hostile.CHECKS}
    least = {"safetensors": 11, "gguf": 26 + 14, "onnx": 9, "genai": 15, "openvino": 15, "archive": 15, "folder": 20}
    assert all(counts[kind] >= least[kind] for kind in least), counts
    assert len(CASES) == len(hostile.cases())


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_model_is_refused_by_name(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = case.build(tmp_path)
    before = {entry: entry.lstat().st_size for entry in tmp_path.rglob("*")}
    with pytest.raises(EdgewrightError) as caught:
        vars(guard)[hostile.CHECKS[case.kind]](path)
    error = caught.value
    assert error.code == case.code
    assert isinstance(error, Unsafe if int(case.code[3:]) in UNSAFE else BadInput)
    assert error.exit_code == catalogue()[case.code].exit_code
    assert error.where is not None and error.fix
    assert error.where.startswith(str(path if path.is_dir() or case.code != "EW-323" else path.parent))
    assert all(character.isprintable() or character == "\n" for character in error.message())
    assert {entry: entry.lstat().st_size for entry in tmp_path.rglob("*")} == before, "the check wrote something"


def measured(models: list[tuple[str, Path]], *, alone: bool) -> list[tuple[str, dict[str, object]]]:
    """Check models in a fresh process, or each in one of its own; what `peak_and_time` says of each."""
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, here, "alone" if alone else "together"],
        input=json.dumps([(kind, str(path)) for kind, path in models]),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_all_of_them_together_take_little_memory(tmp_path: Path) -> None:
    models = []
    for index, case in enumerate(CASES.values()):
        (tmp_path / str(index)).mkdir()
        models.append((case.kind, case.build(tmp_path / str(index))))
    found = measured(models, alone=False)
    assert [result["code"] for _, result in found] == [case.code for case in CASES.values()]
    assert sum(int(str(result["peak"])) for _, result in found) < LIMIT


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_files_at_the_caps_take_little_memory(tmp_path: Path) -> None:
    models = [(kind.split()[0], path) for kind, path in hostile.heavy(tmp_path / "heavy").items()]
    found = measured(models, alone=True)
    assert len(found) == len(models)
    assert {path: result["peak"] for path, result in found if int(str(result["peak"])) >= LIMIT} == {}


@pytest.mark.parametrize("name", graphs.GOOD_ONNX)
def test_wellformed_onnx_passes(tmp_path: Path, name: str) -> None:
    guard.check_onnx(graphs.onnx_folder(tmp_path / "model", graphs.GOOD_ONNX[name]))


@pytest.mark.parametrize("name", ["typed", "function", "branches"])
def test_every_truncation_of_an_onnx_file_is_refused(tmp_path: Path, name: str) -> None:
    path, raw = tmp_path / "model.onnx", graphs.GOOD_ONNX[name]
    last = raw.rindex(graphs.message(25, b"")[:2]) if name == "function" else len(raw)
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        if size == last:
            continue  # cut between two functions, before the one that is called
        with pytest.raises(EdgewrightError):
            guard.check_onnx(path)


def test_wellformed_genai_folders_pass(tmp_path: Path) -> None:
    provider = {"cuda": {"enable_cuda_graph": "0", "enable_skip_layer_norm_strict_mode": "1"}}
    changes = {
        "model__decoder__session_options__provider_options": [provider],
        "model__decoder__session_options__enable_profiling": "",
        "model__eos_token_id": [1, 2],
        "model__pad_token_id": None,
        "search__temperature": 0.5,
    }
    guard.check_genai_folder(graphs.genai_folder(tmp_path / "model", graphs.genai_config(**changes)))


def test_a_draft_in_a_folder_inside_is_checked_too(tmp_path: Path) -> None:
    path = graphs.genai_folder(tmp_path / "model", graphs.genai_config(model__draft__filename="draft/model.onnx"))
    (path / "draft").mkdir()
    (path / "draft" / "model.onnx").write_bytes(graphs.GOOD_ONNX["raw"])
    guard.check_genai_folder(path)
    (path / "draft" / "model.onnx").write_bytes(graphs.ONNX["custom operator"][0])
    with pytest.raises(Unsafe, match="EW-333"):
        guard.check_genai_folder(path)


def test_wellformed_openvino_folders_pass(tmp_path: Path) -> None:
    layers = [
        graphs.constant(),
        graphs.constant("u4", "3", size="2"),
        graphs.constant("u8", "0", offset="1031", size="1"),
        graphs.constant("string", "2", offset="8", size="30"),
        graphs.constant("i64", "", size="8"),
        '<layer id="1" name="x" type="Parameter" version="opset1"><data shape="?,?" element_type="i64"/></layer>',
        '<layer id="2" name="t" type="BPETokenizer" version="extension"/>',
    ]
    guard.check_openvino_folder(graphs.openvino_folder(tmp_path / "model", graphs.net(*layers)))


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_damaged_graphs_end_in_a_refusal_or_pass_but_never_in_a_crash(tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        whole, check = graphs.GOOD_ONNX["branches"] + graphs.function("f", "g"), guard.check_onnx
        path = graphs.onnx_folder(tmp_path / "model", whole)
    else:
        whole, check = graphs.net(graphs.constant() * 5).encode(), guard_openvino.check_openvino
        path = graphs.openvino_folder(tmp_path / "model", whole.decode()) / "openvino_model.xml"
    chance = random.Random(5)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            check(path)
        except EdgewrightError as error:
            refused += 1
            assert str(tmp_path) in str(error)
    assert refused > 150


def test_open_session_and_verify_refuse_before_a_runtime_sees_the_model(tmp_path: Path, ternary_model: Path) -> None:
    """The packages of the runtimes need not even be there."""
    kinds = {
        "EW-330": graphs.genai_folder(tmp_path / "genai", graphs.GENAI["custom operators"][0]),
        "EW-333": graphs.onnx_folder(tmp_path / "onnx", graphs.ONNX["custom operator"][0]).parent,
        "EW-335": graphs.openvino_folder(tmp_path / "ir", graphs.OPENVINO["custom operation"][0]),
    }
    for name in ("link", "folder", "hard", "pipe"):
        (tmp_path / "onnx" / name).unlink()
    archive = tmp_path / "model.tar.gz"
    archive.write_bytes(b"\x1f\x8b" + bytes(50))
    for code, path in {**kinds, "EW-336": archive}.items():
        with pytest.raises(Unsafe, match=code):
            edgewright.open_session(path)
        with pytest.raises(Unsafe, match=code):
            edgewright.verify(path, against=ternary_model)
    with pytest.raises(Unsafe, match="EW-336"):
        guard.check_model_directory(archive)


def test_names_of_one_file_in_one_folder_are_no_hard_link_to_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    path = graphs.onnx_folder(folder, graphs.GOOD_ONNX["outside"])
    (folder / "other").hardlink_to(folder / "data")
    guard.check_onnx(path)
    (tmp_path / "elsewhere").hardlink_to(folder / "data")
    with pytest.raises(Unsafe, match="EW-331"):
        guard.check_onnx(path)
