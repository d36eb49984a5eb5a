"""Not one real file is refused: what others' tools and our own exporters write passes."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import hostile
import pytest
from families import FAMILIES

from edgewright.errors import EdgewrightError
from edgewright.export import guard
from edgewright.export.guard import openvino as guard_openvino
from edgewright.export.guard.config import check_configs
from edgewright.export.guard.folder import check_entries

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "../shared/data"


def refused(paths: list[Path], check: object) -> list[str]:
    """The messages of all that a check refuses."""
    assert callable(check)
    messages = []
    for path in paths:
        try:
            check(path)
        except EdgewrightError as error:
            messages.append(str(error))
    return messages


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(found.origin).parent


def test_the_teacher_of_the_examples_passes() -> None:
    guard.check_model_directory(ROOT / "examples" / "teacher")


def test_the_shared_models_and_tokenizers_pass() -> None:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    guard.check_model_directory(SHARED / "stories260K")
    for folder in sorted(path for path in SHARED.rglob("*") if path.is_dir()):
        check_entries(folder)
        check_configs(folder)
    assert refused(sorted(SHARED.rglob("*.gguf")), guard.check_gguf) == []


def test_the_models_that_the_package_onnx_tests_with_pass() -> None:
    paths = sorted((package_folder("onnx") / "backend" / "test" / "data").rglob("model.onnx"))
    if len(paths) < 20:
        pytest.skip("this build of onnx comes without its test models")
    assert refused(paths, guard.check_onnx) == []


def test_the_models_that_come_with_onnxruntime_pass() -> None:
    paths = sorted((package_folder("onnxruntime") / "datasets").glob("*.onnx"))
    assert paths and refused(paths, guard.check_onnx) == []


def test_what_the_vendor_builder_writes_passes(ternary_built: Path, awkward_built: Path) -> None:
    assert refused([ternary_built, awkward_built], guard.check_genai_folder) == []


def test_checkpoints_of_every_family_pass(tmp_path: Path) -> None:
    """Their configurations, from the classes of transformers themselves: weights are not needed to see the keys."""
    import transformers

    for family, (architecture, values) in FAMILIES.items():
        folder = hostile.model_folder(tmp_path / family)
        config_class = getattr(transformers, architecture).config_class
        config_class(**values, architectures=[architecture]).save_pretrained(folder)
        guard.check_model_directory(folder)


def test_what_our_exporters_write_passes(ternary_model: Path, tmp_path: Path) -> None:
    """The writers themselves: the gate and its runtimes are not needed here."""
    from edgewright.export.source import load_source
    from edgewright.export.targets import TARGETS

    source = load_source(ternary_model)
    for to, quant in (("gguf", "tq2_0"), ("gguf", "q4_0"), ("gguf", "f16"), ("genai", "ternary"), ("genai", "int4")):
        path = tmp_path / f"{to}-{quant}{TARGETS[to].suffix}"
        importlib.import_module(TARGETS[to].module).write(source, path, quant=quant, embedding_quant=None)
        {"gguf": guard.check_gguf, "genai": guard.check_genai_folder}[to](path)


def test_what_openvino_writes_passes(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    tokenizers = pytest.importorskip("openvino_tokenizers")
    import numpy as np
    from openvino import opset13 as ops
    from transformers import AutoTokenizer

    for kind in (np.float32, np.float16, np.int8, np.uint8, np.bool_, np.int64):
        x = ops.parameter([-1, 4], kind, name="x")
        none = ops.constant(np.zeros((0,), kind))
        graph = openvino.Model([ops.concat([x, ops.constant(np.ones((3, 4), kind))], 0), none], [x])
        openvino.save_model(graph, tmp_path / f"openvino_{np.dtype(kind).name}.xml", compress_to_fp16=False)
    both = tokenizers.convert_tokenizer(
        AutoTokenizer.from_pretrained(ROOT / "examples" / "teacher"), with_detokenizer=True
    )
    for name, graph in zip(("openvino_tokenizer", "openvino_detokenizer"), both, strict=True):
        openvino.save_model(graph, tmp_path / f"{name}.xml")
    paths = sorted(tmp_path.glob("*.xml"))
    assert len(paths) == 8 and refused(paths, guard_openvino.check_openvino) == []
    guard.check_openvino_folder(tmp_path)
