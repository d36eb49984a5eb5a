"""What all folders have beside the weights: settings without traces of a machine, a tokenizer whatever its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import edgewright
from edgewright.errors import BadInput
from edgewright.export import to_onnx, to_openvino
from edgewright.export.clean_settings import clean_config
from edgewright.export.source import load_source
from edgewright.export.tokenizer_files import write_tokenizer

Models = Callable[[str], Path]

WIDTHS = {"onnx": "fp32", "genai": "fp32", "openvino": "fp32", "gguf": "f32", "hf": "fp32"}
RUNTIMES = {"genai": "onnxruntime_genai", "openvino": "openvino_tokenizers"}
SLOW = ("genai", "openvino")


@pytest.fixture
def older(tiny_model: Models, tmp_path: Path) -> Path:
    """A GPT-2 as it lies on the hub: vocab.json and merges.txt; its settings name a path of somebody's machine."""
    model = tmp_path / "older"
    shutil.copytree(tiny_model("gpt2"), model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    (model / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    (model / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    (model / "tokenizer.json").unlink()
    special = {"tokenizer_class": "GPT2Tokenizer", "name_or_path": "/home/me/gpt2", "is_local": True}
    special |= {f"{kind}_token": "<|end|>" for kind in ("bos", "eos", "unk")}
    (model / "tokenizer_config.json").write_text(json.dumps(special))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/gpt2"}))
    return model


@pytest.mark.parametrize("to", [pytest.param(to, marks=pytest.mark.slow) if to in SLOW else to for to in WIDTHS])
def test_an_older_tokenizer_goes_everywhere_and_no_path_does(to: str, older: Path, tmp_path: Path) -> None:
    if to in RUNTIMES:
        pytest.importorskip(RUNTIMES[to])
    made = edgewright.export(older, to=to, quant=WIDTHS[to], out=tmp_path / "out", verify=False).path
    files = [made] if made.is_file() else [path for path in made.rglob("*") if path.is_file()]
    assert not [path.name for path in files if b"/home/me" in path.read_bytes()]
    if made.is_dir():
        assert (made / "tokenizer.json").is_file()
        assert "is_local" not in json.loads((made / "tokenizer_config.json").read_text())


def test_settings_of_weights_that_are_gone_are_left_out() -> None:
    assert clean_config({"a": 1, "quantization_config": {}, "_name_or_path": "/x", "_commit_hash": "0"}) == {"a": 1}


def test_the_tokenizers_own_settings_stay(older: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_tokenizer(older, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"


@pytest.mark.parametrize("writer", [to_onnx, to_openvino])
def test_positions_that_depend_on_the_length_are_refused_by_name(
    writer: object, tiny_model: Models, tmp_path: Path
) -> None:
    if writer is to_openvino:
        pytest.importorskip("openvino")
    source = load_source(tiny_model("phi3-longrope"))
    with pytest.raises(BadInput, match="EW-547"):
        writer.write(source, tmp_path / "out", quant="fp32")  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()
