"""OpenVINO folders: every weight arrives as the lattice says, in the width asked for or in a counted wider one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino_genai")

from openvino_help import TOLERANCE, Write, check_weights, rows_of, stored_types, tokens_of, torch_logits

from edgewright.errors import BadInput, GateFailed
from edgewright.export import to_openvino
from edgewright.export.lattice import LatticeTensor, Levels, round_int
from edgewright.export.onnx.decoder import has_windows
from edgewright.export.openvino import reader as openvino_reader
from edgewright.export.openvino.package import load
from edgewright.export.runtimes.openvino import OpenVinoSession
from edgewright.export.source import Source, load_source

LAYERS = ["full_attention", "sliding_attention"]


@pytest.fixture(scope="module")
def ternary(ternary_model: Path) -> Source:
    return load_source(ternary_model)


# ---------------------------------------------------------------- what the file holds


@pytest.mark.parametrize("quant", ["ternary", "int4", "int8", "fp16", "fp32"])
def test_ternary_weights_are_exact_in_every_width(
    quant: str, ternary: Source, write_openvino: Write, tmp_path: Path
) -> None:
    """With scales per tensor, per row and per 256 columns."""
    written = write_openvino(ternary, tmp_path / "out", quant=quant)
    assert written.fallbacks == [] and written.lattice == dict.fromkeys(ternary.lattice, "exact")
    check_weights(tmp_path / "out", ternary, written)
    assert openvino_reader.widths(tmp_path / "out") == {quant, written.embedding_quant}
    element = {"ternary": "u2", "int4": "i4", "int8": "i8", "fp16": "f16", "fp32": "f32"}[quant]
    types = stored_types(tmp_path / "out", ternary)
    assert all(element in types[name] for name in ternary.lattice)


def test_codes_take_the_bytes_that_they_should(ternary: Source, openvino_ternary: Path) -> None:
    """Two bits a weight, one half-precision scale a row (or 256 columns), and the tied table once."""
    linear = sum(tensor.codes.size for tensor in ternary.lattice.values())
    rest = sum(ternary.tensor(name).nbytes for name in ternary.names if name not in ternary.lattice)
    scales = 2 * sum(tensor.block_scales(256).size for tensor in ternary.lattice.values())
    size = (openvino_ternary / "openvino_model.bin").stat().st_size
    assert size < (linear / 4 + scales + rest) * 1.01 + 4096


def test_awkward_shapes_fall_back_and_are_counted(awkward_model: Path, write_openvino: Write, tmp_path: Path) -> None:
    """Rows of 72 and 100 weights: 2 and 8 bits hold them with a scale a row, 4 bits are not rounded so coarsely."""
    source = load_source(awkward_model)
    layers = [f"model.layers.0.{part}.weight" for part in linear_modules()]
    dense = {*layers, "model.layers.1.self_attn.v_proj.weight"}
    for quant, fallbacks in (("ternary", dense), ("int4", dense), ("int8", set())):
        written = write_openvino(source, tmp_path / quant, quant=quant)
        assert {fallback.tensor for fallback in written.fallbacks} == fallbacks
        assert {fallback.quant for fallback in written.fallbacks} <= {"int8"}
        assert written.lattice == dict.fromkeys(source.lattice, "exact")
        check_weights(tmp_path / quant, source, written)
        assert openvino_reader.widths(tmp_path / quant) == {quant, "int8", written.embedding_quant}
        tokens = tokens_of(source)
        with OpenVinoSession(tmp_path / quant, threads=1, exact=True) as opened:
            assert np.abs(rows_of(opened, tokens) - torch_logits(awkward_model, tokens)).max() < 0.3


def linear_modules() -> list[str]:
    return [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


def random_lattice(shape: tuple[int, int], levels: Levels, group: int | None, *, zeros: bool = False) -> LatticeTensor:
    """Codes over the whole range with scales that float16 does not hold; `zeros`: with a zero point a group."""
    draw = np.random.default_rng(shape[0] + (group or 0))
    low, high = {"int4": (-8, 7), "int8": (-128, 127), "ternary": (-1, 1), "uint4": (0, 15), "uint8": (0, 255)}[levels]
    scales = draw.uniform(0.5, 1.5, (shape[0], 1 if group is None else -(-shape[1] // group))).astype(np.float32)
    scales *= np.float32(0.1 / high)
    codes = draw.integers(low, high + 1, shape)
    points = draw.integers(4, 12, scales.shape).astype(np.int16) if zeros else None
    if points is not None:
        codes = codes - (points if group is None else np.repeat(points, group, axis=1)[:, : shape[1]])
    return LatticeTensor(
        codes=codes.astype(np.int16 if levels == "uint8" else np.int8),
        scales=scales,
        group=group,
        bits={"ternary": 2, "int4": 4, "uint4": 4}.get(levels, 8),
        levels=levels,
        zeros=points,
    )


KINDS: dict[str, tuple[Levels, int | None, bool]] = {
    "q_proj": ("int4", 32, False),
    "k_proj": ("int4", 64, False),
    "v_proj": ("int4", None, False),
    "o_proj": ("uint4", 32, True),
    "gate_proj": ("int8", None, False),
    "up_proj": ("int8", 128, False),
    "down_proj": ("ternary", 16, False),
}
"""Lattices of all kinds that are held, one for each linear layer."""


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_integer_lattices_are_exact_and_computed_as_such(
    quant: str, ternary: Source, write_openvino: Write, tmp_path: Path
) -> None:
    """By the reader, and by the plugin's kernels: against the same values in float32, which no kernel can garble."""
    lattice = {
        name: random_lattice((len(tensor.codes), tensor.codes.shape[1]), *kind[:2], zeros=kind[2])
        for name, tensor in ternary.lattice.items()
        for kind in [KINDS[name.split(".")[-2]]]
    }
    source = replace(ternary, lattice=lattice)
    written = write_openvino(source, tmp_path / quant, quant=quant, embedding_quant="fp32")
    eights = {name for name, tensor in lattice.items() if tensor.levels == "int8"}
    assert {fallback.tensor for fallback in written.fallbacks} == (eights if quant == "int4" else set())
    assert set(written.lattice.values()) == {"exact"}
    check_weights(tmp_path / quant, source, written)
    write_openvino(source, tmp_path / "wide", quant="fp32")
    tokens = tokens_of(source, 24)
    with OpenVinoSession(tmp_path / "wide", threads=1) as wide:
        expected = rows_of(wide, tokens)
    with OpenVinoSession(tmp_path / quant, threads=1, exact=True) as opened:
        assert opened.capabilities.fp32_compute
        assert np.abs(rows_of(opened, tokens) - expected).max() < TOLERANCE * max(1, np.abs(expected).max())
    with OpenVinoSession(tmp_path / quant, threads=1) as opened:
        assert not opened.capabilities.fp32_compute
        difference = np.abs(rows_of(opened, tokens) - expected).max()
        assert TOLERANCE < difference < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("group", "columns", "blocks"),
    [
        (48, 192, {"ternary": 16, "int4": 16, "int8": 16}),
        (96, 192, {"ternary": 32, "int4": 32, "int8": 32}),
        (8, 512, {}),
        (None, 52, {"ternary": None, "int4": None, "int8": None}),
        (None, 50, {"int4": None, "int8": None}),
    ],
)
def test_layouts_that_the_plugin_computes_wrongly_are_not_used(
    group: int | None, columns: int, blocks: dict[str, int | None]
) -> None:
    """Groups that are no powers of two, and rows of 2 bits that are no multiple of four."""
    lattice = random_lattice((4, columns), "ternary", group)
    for width in to_openvino.ELEMENTS:
        layout, reason = to_openvino._layout(lattice, width)
        assert (layout is not None) == (width in blocks) == (not reason)
        assert layout is None or layout.group == blocks[width]


def test_a_lattice_that_no_layout_holds_is_stored_wider(ternary: Source, write_openvino: Write, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    odd = random_lattice((len(ternary.lattice[name].codes), 256), "ternary", 24)
    source = replace(ternary, lattice=ternary.lattice | {name: odd})
    written = write_openvino(source, tmp_path / "out", quant="ternary")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "fp32")]
    assert "24" in written.fallbacks[0].reason
    check_weights(tmp_path / "out", source, written)


def test_half_precision(ternary: Source, awkward_model: Path, write_openvino: Write, tmp_path: Path) -> None:
    """Weights without a lattice are rounded; a lattice that float16 does not hold stays in float32."""
    source = load_source(awkward_model)
    written = write_openvino(source, tmp_path / "out", quant="fp16")
    assert written.fallbacks == [] and written.embedding_quant == "fp16"
    tokens = tokens_of(source)
    with OpenVinoSession(tmp_path / "out", threads=1) as opened:
        assert opened.capabilities.fp32_compute
        assert np.abs(rows_of(opened, tokens) - torch_logits(awkward_model, tokens)).max() < 2e-2
    name = next(iter(ternary.lattice))
    shape = ternary.lattice[name].codes.shape
    wide = replace(ternary, lattice=ternary.lattice | {name: random_lattice((shape[0], shape[1]), "int8", None)})
    written = write_openvino(wide, tmp_path / "wide", quant="fp16")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "fp32")]


@pytest.mark.parametrize("embedding_quant", ["fp16", "int8", "int4"])
def test_a_tied_table_is_stored_once(
    embedding_quant: str, ternary: Source, openvino_ternary: Path, write_openvino: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    written = write_openvino(ternary, folder, quant="ternary", embedding_quant=embedding_quant)
    assert written.embedding_quant == embedding_quant
    check_weights(folder, ternary, written)
    table = ternary.tensor(ternary.embedding)
    bits = {"fp16": 16, "int8": 8.1, "int4": 4.5}[embedding_quant]
    saved = (openvino_ternary / "openvino_model.bin").stat().st_size - (folder / "openvino_model.bin").stat().st_size
    assert saved > table.nbytes * (1 - bits / 32) - 1024
    tokens = tokens_of(ternary)
    with OpenVinoSession(folder, threads=1, exact=True) as opened:
        assert np.abs(rows_of(opened, tokens) - torch_logits(ternary.directory, tokens)).max() < 0.3


def test_a_ternary_embedding_is_stored_in_4_bits(ternary: Source, write_openvino: Write, tmp_path: Path) -> None:
    """A lookup in 2 bits would be decompressed to float32 in memory."""
    rows, columns = ternary.shape(ternary.embedding)
    lattice = random_lattice((rows, columns), "ternary", None)
    source = replace(ternary, lattice=ternary.lattice | {ternary.embedding: lattice})
    written = write_openvino(source, tmp_path / "out", quant="ternary")
    assert written.fallbacks == []
    check_weights(tmp_path / "out", source, written)
    assert "i4" in stored_types(tmp_path / "out", source)[ternary.embedding]


def test_calibrated_widths_come_through(ternary: Source, write_openvino: Write, tmp_path: Path) -> None:
    """A lattice of 8 bits in a file of 4 keeps its 8, and the embedding's own lattice counts for the default."""
    name = "model.layers.1.mlp.down_proj.weight"
    eight = round_int(ternary.matrix(name) + np.float32(0.01), bits=8, group=None)
    table = round_int(ternary.matrix(ternary.embedding), bits=4, group=32, scale_dtype=np.float16)
    lattice = ternary.lattice | {name: eight, ternary.embedding: table}
    source = replace(ternary, lattice=lattice, calibrated=frozenset(lattice))
    written = write_openvino(source, tmp_path / "out", quant="int4")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "int8")]
    assert written.embedding_quant == "int4" and set(written.lattice.values()) == {"exact"}


# ---------------------------------------------------------------- the folder, and refusals


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, False),
        ("mistral-window", {}, True),
        ("smollm3", {"use_sliding_window": False, "sliding_window": 24, "layer_types": LAYERS * 2}, True),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 24, "layer_types": LAYERS[:1] * 4}, False),
        ("mistral-window", {"layer_types": LAYERS[:1] * 2}, False),
        (
            "qwen3",
            {"hidden_act": "mish", "sliding_window": 24, "use_sliding_window": True, "layer_types": LAYERS},
            True,
        ),
        ("mistral-window", {"hidden_act": "mish"}, True),
        ("llama", {"hidden_act": "mish"}, False),
    ],
)
def test_windows_are_those_of_the_graph(
    family: str, changes: dict[str, Any], expected: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever a setting that no layer heeds says; of a traced graph, what the settings say."""
    shutil.copytree(tiny_model(family), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert has_windows(load_source(tmp_path / "model")) is expected


def test_the_folder_is_whole(ternary: Source, openvino_ternary: Path) -> None:
    models = [f"openvino_{part}.{end}" for part in ("model", "tokenizer", "detokenizer") for end in ("xml", "bin")]
    names = {path.name for path in openvino_ternary.iterdir()}
    assert names == {*models, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    original = (ternary.directory / "tokenizer.json").read_bytes()
    assert (openvino_ternary / "tokenizer.json").read_bytes() == original
    for path in openvino_ternary.iterdir():
        assert path.is_file() and not path.is_symlink() and path.stat().st_size
        content = path.read_bytes()
        assert str(ternary.directory).encode() not in content and b"edgewright-openvino-" not in content


def test_a_weight_that_is_not_in_the_graph_is_an_error(ternary: Source, write_openvino: Write, tmp_path: Path) -> None:
    extra = next(iter(ternary.lattice.values()))
    source = replace(ternary, lattice=ternary.lattice | {"model.layers.9.mlp.up_proj.weight": extra})
    with pytest.raises(GateFailed, match=r"layers\.9.*\[EW-540\]"):
        write_openvino(source, tmp_path / "out", quant="ternary")


def test_a_tokenizer_that_cannot_be_expressed_is_refused(
    ternary: Source, write_openvino: Write, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(ternary.directory, model)
    content = json.loads((model / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "UnicodeScripts"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"\[EW-541\]") as caught:
        write_openvino(load_source(model), tmp_path / "out", quant="ternary")
    assert "UnicodeScripts" in str(caught.value.found)


def test_openvino_is_loaded_in_silence(tmp_path: Path) -> None:
    """Its telemetry would keep an identifier in the home directory and report every import."""
    code = (
        "from edgewright.export.openvino.package import load\n"
        "for name in ('openvino', 'openvino_genai', 'openvino_tokenizers'): load(name)\n"
        "import openvino.tools.ovc as ovc, sys\n"
        "assert 'telemetry_stub' in type(ovc.telemetry).__module__, type(ovc.telemetry)\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"openvino_genai.*\[EW-603\]") as caught:
        load("openvino_genai")
    assert "edgewright[openvino]" in str(caught.value.fix)
