"""Models that keep their factors in ONNX, GenAI and OpenVINO, in graphs written or traced; refused elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from families import save_byte_tokenizer, save_family

from edgewright.compress.choice import LayerChoice
from edgewright.compress.factored_model import mark
from edgewright.compress.lost import LostConfig
from edgewright.compress.lowrank import LowRankConfig
from edgewright.errors import BadInput
from edgewright.export.source import load_source
from edgewright.export.targets import export
from edgewright.student import load_model

Make = Callable[[str, LayerChoice], Path]


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`factored(family, config)` saves a tiny model of a family with the layers that a method leaves."""

    def make(family: str, config: LayerChoice) -> Path:
        directory = tmp_path_factory.mktemp("factored")
        model = load_model(save_family(family, directory / "plain"))
        method = config.build()  # type: ignore[attr-defined]
        method.prepare(model)
        finished, _ = method.finish(model)
        finished.save_pretrained(directory / "model")
        mark(finished, directory / "model")
        save_byte_tokenizer(directory / "model", bos=True)
        shutil.rmtree(directory / "plain")
        return directory / "model"

    return make


LOST = LostConfig(rank=32, columns=0.25, gamma=0.6)
COLA = LowRankConfig(rank=32, activation="silu")
MIXED = LowRankConfig(rank=32, activation="silu", exclude=("k_proj", "0.mlp.down_proj"))
FACTORS = LowRankConfig(rank=32, merge=False)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "config", "to", "quant"),
    [
        ("llama", LOST, "onnx", "int8"),
        ("qwen2", COLA, "openvino", "fp32"),
        ("llama", LOST, "genai", "fp32"),
        ("qwen2", COLA, "genai", "int4"),
        pytest.param("bitnet", LOST, "onnx", "fp32", marks=slow),  # traced
        pytest.param("bitnet", COLA, "openvino", "int8", marks=slow),
        pytest.param("phi3", COLA, "onnx", "fp32", marks=slow),
        pytest.param("qwen3", MIXED, "onnx", "int4", marks=slow),
        pytest.param("gemma2", COLA, "onnx", "fp32", marks=slow),
        pytest.param("llama", LOST, "openvino", "int8", marks=slow),
        pytest.param("llama", LOST, "openvino", "int4", marks=slow),
        pytest.param("llama", FACTORS, "onnx", "fp16", marks=slow),
    ],
)
def test_the_gate_certifies_the_file_against_the_factors(
    factored: Make, tmp_path: Path, family: str, config: LayerChoice, to: str, quant: str
) -> None:
    pytest.importorskip({"genai": "onnxruntime_genai", "openvino": "openvino"}.get(to, "onnxruntime"))
    model = factored(family, config)
    artifact = export(model, to=to, quant=quant, out=tmp_path / "out", threads=1)
    assert artifact.gate == "passed"
    if to != "genai":
        settings = json.loads((artifact.path / "config.json").read_text())
        assert settings["model_type"] == family and "edgewright_factors" not in settings


def test_the_graph_multiplies_with_the_factors_and_not_with_their_product(factored: Make, tmp_path: Path) -> None:
    model = factored("llama", LOST)
    artifact = export(model, to="onnx", quant="int8", out=tmp_path / "out", verify=False)
    graph = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph
    packed = {name for node in graph.node if node.op_type == "MatMulNBits" for name in node.input}
    layer = "model.layers.0.mlp.up_proj"
    for part in ("down", "up", "columns"):
        assert f"{layer}.{part}.weight_Q8" in packed
    assert not any(node.input[1] == f"{layer}.weight" for node in graph.node if node.op_type == "MatMul")
    assert not artifact.fallbacks


def test_a_source_knows_the_parts_and_the_settings_of_the_plain_model(factored: Make) -> None:
    source = load_source(factored("llama", LOST))
    assert source.config["model_type"] == "llama"
    name = "model.layers.1.self_attn.o_proj"
    assert {f"{name}.{part}.weight" for part in ("down", "up", "columns")} <= set(source.linears)
    assert f"{name}.weight" not in source.architecture.shapes
    assert source.architecture.factors[name].rank == 32
    assert source.shape(f"{name}.down.weight") == (32, 64)


@pytest.mark.parametrize(("to", "quant"), [("gguf", "f16"), ("hf", "fp32")])
def test_what_knows_only_matrices_refuses_it(factored: Make, tmp_path: Path, to: str, quant: str) -> None:
    with pytest.raises(BadInput) as error:
        export(factored("llama", LOST), to=to, quant=quant, out=tmp_path / "out", verify=False)
    assert error.value.code == "EW-723"
    assert "activation silu, columns" in str(error.value.found)
    assert not list(tmp_path.iterdir()) or not list((tmp_path / "out").iterdir())
