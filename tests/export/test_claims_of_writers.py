"""What a writer says of a file is what `verify` finds in it, also where a model has more than linear layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import edgewright
from edgewright.export.gate.claims import read_claims
from edgewright.export.onnx.packing import POSITIONS, UNLIKE_EMBEDDING, Packer
from edgewright.export.source import load_source
from edgewright.export.to_openvino import _Packing

Models = Callable[[str], Path]

EVERYWHERE = [
    ("gpt2", "onnx", "int8"),
    ("gpt2", "genai", "int4"),
    ("gpt2", "openvino", "int4"),
    ("gpt2", "gguf", "q8_0"),
    ("opt", "onnx", "int4"),
    ("opt", "genai", "int8"),
    ("opt", "openvino", "int8"),
]
FAST = (("gpt2", "onnx", "int8"), ("opt", "openvino", "int8"))
RUNTIMES = {"onnx": "onnxruntime", "genai": "onnxruntime_genai", "openvino": "openvino_genai", "gguf": "llama_cpp"}


@pytest.mark.parametrize(("family", "to", "quant"), FAST)
def test_the_manifest_names_the_width_of_a_table_of_positions(
    family: str, to: str, quant: str, tiny_model: Models, tmp_path: Path
) -> None:
    pytest.importorskip(RUNTIMES[to])
    made = edgewright.export(tiny_model(family), to=to, quant=quant, out=tmp_path / "out", verify=False)
    assert [(each.quant, each.reason) for each in made.fallbacks] == [("fp32", POSITIONS)]
    assert read_claims(made.path, to).contradictions == []


@pytest.mark.slow
@pytest.mark.parametrize(("family", "to", "quant"), EVERYWHERE)
def test_what_was_certified_is_verified(family: str, to: str, quant: str, tiny_model: Models, tmp_path: Path) -> None:
    pytest.importorskip(RUNTIMES[to])
    made = edgewright.export(tiny_model(family), to=to, quant=quant, out=tmp_path / "out", threads=1)
    parity = edgewright.verify(made.path, against=tiny_model(family), threads=1)
    assert (made.gate, parity.gate, parity.reasons) == ("passed", "passed", [])


@pytest.mark.parametrize("packing", [Packer, _Packing])
def test_a_head_of_another_width_than_the_embedding_is_named(packing: type, awkward_model: Path) -> None:
    """One of the two is on a lattice: the manifest has one width for both, which is the embedding's."""
    from dataclasses import replace

    source = load_source(awkward_model)
    trained = next(iter(source.lattice.values()))
    given = replace(source, lattice={source.head: trained})
    made = packing(source=given, quant="ternary", embedding_quant=None)
    assert made.embedding_width == "fp32"
    ask = (lambda name: made._asked(name, table=False)) if packing is _Packing else made._asked
    assert ask(given.embedding) == ("fp32", "")
    assert ask(given.head) == ("ternary", UNLIKE_EMBEDDING)
