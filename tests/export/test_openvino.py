"""OpenVINO folders: weights arrive as the lattice says, and LLMPipeline runs them as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino_genai")

from edgewright.errors import BadInput, GateFailed
from edgewright.export import openvino_reader, to_openvino
from edgewright.export.artifact import Written, digest
from edgewright.export.decoder_graph import trace
from edgewright.export.lattice import LatticeTensor, Levels, round_int
from edgewright.export.openvino_package import load
from edgewright.export.runtimes.openvino import OpenVinoSession
from edgewright.export.runtimes.torch_session import TorchSession
from edgewright.export.source import Source, load_source

TOLERANCE = 1e-4
"""Of logits that are computed in float32."""

Write = Callable[..., Written]


@pytest.fixture(scope="session")
def write_folder(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """`to_openvino.write` that traces each model once: the graph does not depend on the width."""
    traced: dict[str, Path] = {}

    def once(source: Source, directory: Path) -> Path:
        if source.sha256 not in traced:
            traced[source.sha256] = trace(source, tmp_path_factory.mktemp("traced"))
        return traced[source.sha256]

    def write(source: Source, directory: Path, *, quant: str, embedding_quant: str | None = None) -> Written:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(to_openvino, "trace", once)
            return to_openvino.write(source, directory, quant=quant, embedding_quant=embedding_quant)

    return write


@pytest.fixture(scope="module")
def ternary(ternary_model: Path) -> Source:
    return load_source(ternary_model)


@pytest.fixture(scope="module")
def ternary_folder(ternary: Source, write_folder: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino") / "ternary"
    written = write_folder(ternary, folder, quant="ternary")
    assert written.fallbacks == [] and set(written.lattice.values()) == {"exact"}
    return folder


@pytest.fixture(scope="module")
def fp32_folder(ternary: Source, write_folder: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino") / "fp32"
    write_folder(ternary, folder, quant="fp32")
    return folder


@pytest.fixture(scope="module")
def session(fp32_folder: Path) -> Iterator[OpenVinoSession]:
    with OpenVinoSession(fp32_folder, threads=1) as opened:
        assert isinstance(opened, OpenVinoSession)
        yield opened


def tokens_of(source: Source, count: int = 60) -> list[int]:
    """Random tokens of a model."""
    return [int(token) for token in np.random.default_rng(3).integers(2, source.config["vocab_size"], count)]


def torch_logits(model: Path, tokens: list[int]) -> np.ndarray:
    with TorchSession(model, threads=1) as reference:
        rows = reference.append(tokens, "all")
        assert rows is not None
        return rows


def torch_greedy(model: Path, prompt: list[int], count: int) -> list[int]:
    with TorchSession(model, threads=1) as reference:
        return reference.native_generate(prompt, count, stop_at_eos=False)


def rows_of(session: OpenVinoSession, tokens: list[int]) -> np.ndarray:
    """The logits of a text read whole, from an empty cache."""
    session.rewind(0)
    rows = session.append(tokens, "all")
    assert rows is not None
    return rows


def check_weights(folder: Path, source: Source, written: Written) -> None:
    """The independent reader finds every tensor, as laid out; lattices and vectors bit for bit."""
    found = dict(openvino_reader.read_weights(folder, source))
    assert set(found) == set(source.names)
    for name, values in found.items():
        if values.ndim == 1:
            np.testing.assert_array_equal(values, source.tensor(name), err_msg=name)
        else:
            assert digest(values) == written.digests[name], name
    for name, tensor in source.lattice.items():
        np.testing.assert_array_equal(found[name], tensor.dequantize(), err_msg=name)


def stored_types(folder: Path, source: Source) -> dict[str, set[str]]:
    """Element types of the constants that each matrix is made of, by its name."""
    found = {}
    for node in load().Core().read_model(folder / "openvino_model.xml").get_ops():
        if node.get_friendly_name() in source.files:
            below, types = [node], set()
            while below:
                one = below.pop()
                below += [place.get_node() for place in one.input_values()]
                if one.get_type_name() == "Constant":
                    types.add(one.get_output_element_type(0).get_type_name())
            found[node.get_friendly_name()] = types
    return found


# ---------------------------------------------------------------- what the file holds


@pytest.mark.parametrize("quant", ["ternary", "int4", "int8", "fp16", "fp32"])
def test_ternary_weights_are_exact_in_every_width(
    quant: str, ternary: Source, write_folder: Write, tmp_path: Path
) -> None:
    """With scales per tensor, per row and per 256 columns."""
    written = write_folder(ternary, tmp_path / "out", quant=quant)
    assert written.fallbacks == [] and written.lattice == dict.fromkeys(ternary.lattice, "exact")
    check_weights(tmp_path / "out", ternary, written)
    assert openvino_reader.widths(tmp_path / "out") == {quant, written.embedding_quant}
    element = {"ternary": "u2", "int4": "i4", "int8": "i8", "fp16": "f16", "fp32": "f32"}[quant]
    types = stored_types(tmp_path / "out", ternary)
    assert all(element in types[name] for name in ternary.lattice)


def test_codes_take_the_bytes_that_they_should(ternary: Source, ternary_folder: Path) -> None:
    """Two bits a weight, one half-precision scale a row (or 256 columns), and the tied table once."""
    linear = sum(tensor.codes.size for tensor in ternary.lattice.values())
    rest = sum(ternary.tensor(name).nbytes for name in ternary.names if name not in ternary.lattice)
    scales = 2 * sum(tensor.block_scales(256).size for tensor in ternary.lattice.values())
    size = (ternary_folder / "openvino_model.bin").stat().st_size
    assert size < (linear / 4 + scales + rest) * 1.01 + 4096


def test_awkward_shapes_fall_back_and_are_counted(awkward_model: Path, write_folder: Write, tmp_path: Path) -> None:
    """Rows of 72 and 100 weights: 2 and 8 bits hold them with a scale a row, 4 bits are not rounded so coarsely."""
    source = load_source(awkward_model)
    layers = [f"model.layers.0.{part}.weight" for part in linear_modules()]
    dense = {*layers, "model.layers.1.self_attn.v_proj.weight"}
    for quant, fallbacks in (("ternary", dense), ("int4", dense), ("int8", set())):
        written = write_folder(source, tmp_path / quant, quant=quant)
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
    quant: str, ternary: Source, write_folder: Write, tmp_path: Path
) -> None:
    """By the reader, and by the plugin's kernels: against the same values in float32, which no kernel can garble."""
    lattice = {
        name: random_lattice((len(tensor.codes), tensor.codes.shape[1]), *kind[:2], zeros=kind[2])
        for name, tensor in ternary.lattice.items()
        for kind in [KINDS[name.split(".")[-2]]]
    }
    source = replace(ternary, lattice=lattice)
    written = write_folder(source, tmp_path / quant, quant=quant, embedding_quant="fp32")
    eights = {name for name, tensor in lattice.items() if tensor.levels == "int8"}
    assert {fallback.tensor for fallback in written.fallbacks} == (eights if quant == "int4" else set())
    assert set(written.lattice.values()) == {"exact"}
    check_weights(tmp_path / quant, source, written)
    write_folder(source, tmp_path / "wide", quant="fp32")
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


def test_a_lattice_that_no_layout_holds_is_stored_wider(ternary: Source, write_folder: Write, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    odd = random_lattice((len(ternary.lattice[name].codes), 256), "ternary", 24)
    source = replace(ternary, lattice=ternary.lattice | {name: odd})
    written = write_folder(source, tmp_path / "out", quant="ternary")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "fp32")]
    assert "24" in written.fallbacks[0].reason
    check_weights(tmp_path / "out", source, written)


def test_half_precision(ternary: Source, awkward_model: Path, write_folder: Write, tmp_path: Path) -> None:
    """Weights without a lattice are rounded; a lattice that float16 does not hold stays in float32."""
    source = load_source(awkward_model)
    written = write_folder(source, tmp_path / "out", quant="fp16")
    assert written.fallbacks == [] and written.embedding_quant == "fp16"
    tokens = tokens_of(source)
    with OpenVinoSession(tmp_path / "out", threads=1) as opened:
        assert opened.capabilities.fp32_compute
        assert np.abs(rows_of(opened, tokens) - torch_logits(awkward_model, tokens)).max() < 2e-2
    name = next(iter(ternary.lattice))
    shape = ternary.lattice[name].codes.shape
    wide = replace(ternary, lattice=ternary.lattice | {name: random_lattice((shape[0], shape[1]), "int8", None)})
    written = write_folder(wide, tmp_path / "wide", quant="fp16")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "fp32")]


@pytest.mark.parametrize("embedding_quant", ["fp16", "int8", "int4"])
def test_a_tied_table_is_stored_once(
    embedding_quant: str, ternary: Source, ternary_folder: Path, write_folder: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    written = write_folder(ternary, folder, quant="ternary", embedding_quant=embedding_quant)
    assert written.embedding_quant == embedding_quant
    check_weights(folder, ternary, written)
    table = ternary.tensor(ternary.embedding)
    bits = {"fp16": 16, "int8": 8.1, "int4": 4.5}[embedding_quant]
    saved = (ternary_folder / "openvino_model.bin").stat().st_size - (folder / "openvino_model.bin").stat().st_size
    assert saved > table.nbytes * (1 - bits / 32) - 1024
    tokens = tokens_of(ternary)
    with OpenVinoSession(folder, threads=1, exact=True) as opened:
        assert np.abs(rows_of(opened, tokens) - torch_logits(ternary.directory, tokens)).max() < 0.3


def test_a_ternary_embedding_is_stored_in_4_bits(ternary: Source, write_folder: Write, tmp_path: Path) -> None:
    """A lookup in 2 bits would be decompressed to float32 in memory."""
    rows, columns = ternary.shape(ternary.embedding)
    lattice = random_lattice((rows, columns), "ternary", None)
    source = replace(ternary, lattice=ternary.lattice | {ternary.embedding: lattice})
    written = write_folder(source, tmp_path / "out", quant="ternary")
    assert written.fallbacks == []
    check_weights(tmp_path / "out", source, written)
    assert "i4" in stored_types(tmp_path / "out", source)[ternary.embedding]


def test_calibrated_widths_come_through(ternary: Source, write_folder: Write, tmp_path: Path) -> None:
    """A lattice of 8 bits in a file of 4 keeps its 8, and the embedding's own lattice counts for the default."""
    name = "model.layers.1.mlp.down_proj.weight"
    eight = round_int(ternary.matrix(name) + np.float32(0.01), bits=8, group=None)
    table = round_int(ternary.matrix(ternary.embedding), bits=4, group=32, scale_dtype=np.float16)
    lattice = ternary.lattice | {name: eight, ternary.embedding: table}
    source = replace(ternary, lattice=lattice, calibrated=frozenset(lattice))
    written = write_folder(source, tmp_path / "out", quant="int4")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "int8")]
    assert written.embedding_quant == "int4" and set(written.lattice.values()) == {"exact"}


# ---------------------------------------------------------------- what the runtime makes of it


def test_fp32_is_the_model_in_every_way_to_read(session: OpenVinoSession, ternary: Source) -> None:
    tokens = tokens_of(ternary)
    right = torch_logits(ternary.directory, tokens)
    assert np.abs(rows_of(session, tokens) - right).max() < TOLERANCE
    session.rewind(20)
    assert session.length == 20
    again = session.append(tokens[20:40], "all")
    assert again is not None and np.abs(again - right[20:40]).max() < TOLERANCE
    session.rewind(0)
    for index, token in enumerate(tokens[:24]):
        row = session.append([token])
        assert row is not None and row.shape == (1, session.vocab_size)
        assert np.abs(row[0] - right[index]).max() < TOLERANCE
    assert session.append([], "all").shape == (0, session.vocab_size)  # type: ignore[union-attr]
    assert session.append(tokens[:3], "none") is None and session.length == 27


def test_logits_are_the_callers_own(session: OpenVinoSession) -> None:
    session.rewind(0)
    first = session.append([5, 6, 7], "all")
    assert first is not None
    copy = first.copy()
    session.append([8, 9, 10], "all")
    np.testing.assert_array_equal(first, copy)


def test_the_pipeline_generates_what_torch_does(session: OpenVinoSession, ternary: Source) -> None:
    prompt = tokens_of(ternary, 12)
    expected = torch_greedy(ternary.directory, prompt, 32)
    assert session.native_generate(prompt, 32, stop_at_eos=False) == expected
    one, same, other = (
        session.native_generate(prompt, 24, temperature=1.0, seed=seed, stop_at_eos=False) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_the_pipeline_takes_a_draft(session: OpenVinoSession, ternary_folder: Path, ternary: Source) -> None:
    prompt = tokens_of(ternary, 12)
    expected = session.native_generate(prompt, 16, stop_at_eos=False)
    with OpenVinoSession(ternary_folder, threads=1) as draft:
        assert session.native_generate(prompt, 16, stop_at_eos=False, draft=draft) == expected
    with (
        TorchSession(ternary.directory, threads=1) as other,
        pytest.raises(BadInput, match=r"another runtime.*\[EW-604\]"),
    ):
        session.native_generate(prompt, 4, draft=other)


def test_generation_ends_at_the_end_of_text(
    session: OpenVinoSession, ternary: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens_of(ternary, 12)
    new = session.native_generate(prompt, 12, stop_at_eos=False)
    monkeypatch.setattr(session, "eos_ids", frozenset({new[4]}))
    assert session.native_generate(prompt, 12) == new[: new.index(new[4])]


def test_limits(session: OpenVinoSession) -> None:
    assert session.context_length == 2048 and session.vocab_size == 289
    assert (session.start_id, session.eos_ids) == (0, frozenset({0}))
    session.rewind(0)
    with pytest.raises(BadInput, match="EW-602"):
        session.append([1] * 2049)
    with pytest.raises(BadInput, match="EW-602"):
        session.append([session.vocab_size])
    with pytest.raises(BadInput, match="EW-602"):
        session.native_generate([1, 2], 2048)
    with pytest.raises(BadInput, match="EW-606"):
        session.native_generate([], 4)
    assert session.length == 0


def test_ternary_is_exact_when_activations_are_left_alone(ternary: Source, ternary_folder: Path) -> None:
    tokens = tokens_of(ternary)
    right = torch_logits(ternary.directory, tokens)
    with OpenVinoSession(ternary_folder, threads=1, exact=True) as opened:
        assert np.abs(rows_of(opened, tokens) - right).max() < TOLERANCE
        prompt = tokens[:12]
        assert opened.native_generate(prompt, 24, stop_at_eos=False) == torch_greedy(ternary.directory, prompt, 24)
    with OpenVinoSession(ternary_folder, threads=1) as opened:
        difference = np.abs(rows_of(opened, tokens) - right).max()
        assert 10 * TOLERANCE < difference < 0.1


@pytest.mark.parametrize("quant", ["ternary", "fp32"])
def test_paged_attention_takes_the_graph(quant: str, ternary: Source, ternary_folder: Path, fp32_folder: Path) -> None:
    """The pipeline's own choice, which it leaves for a slower one without a word when it does not know the graph."""
    genai = load("openvino_genai")
    folder = {"ternary": ternary_folder, "fp32": fp32_folder}[quant]
    settings = {"EXECUTION_MODE_HINT": "ACCURACY", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
    pipeline = genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="PA", **settings)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = 24, True
    prompt = tokens_of(ternary, 12)
    found = pipeline.generate(load().Tensor(np.array([prompt], np.int64)), config).tokens[0]
    assert list(found) == torch_greedy(ternary.directory, prompt, 24)


@pytest.mark.parametrize("quant", ["ternary", "fp32"])
def test_a_plain_pipeline_runs_the_folder_as_it_is(
    quant: str, ternary: Source, ternary_folder: Path, fp32_folder: Path
) -> None:
    """No settings at all: bfloat16 where the processor has it, where u2 with rounded activations would crash."""
    genai = load("openvino_genai")
    pipeline = genai.LLMPipeline(str({"ternary": ternary_folder, "fp32": fp32_folder}[quant]), "CPU")
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = 16, True
    prompt = load().Tensor(np.array([tokens_of(ternary, 12)], np.int64))
    assert len(pipeline.generate(prompt, config).tokens[0]) == 16
    assert isinstance(pipeline.generate("def add(a, b):", config), str)


def test_the_defaults_of_the_runtime_measured_apart(ternary: Source, ternary_folder: Path) -> None:
    """What the model itself says to the plugin: no rounded activations beside u2, and a cache in half precision."""
    core = load().Core()
    compiled = core.compile_model(core.read_model(ternary_folder / "openvino_model.xml"), "CPU")
    assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 0
    assert compiled.get_property("KV_CACHE_PRECISION").get_type_name() == "f16"


def test_stories_tells_its_story(stories: Path, write_folder: Write, tmp_path: Path) -> None:
    """A trained model with rows of 64 and 172 weights, in all widths."""
    source = load_source(stories)
    expected = (stories / "expected_greedy.txt").read_text().strip()
    for quant, limit in {"fp32": TOLERANCE, "int8": 1.0, "int4": 10.0, "ternary": 1.0}.items():
        written = write_folder(source, tmp_path / quant, quant=quant)
        check_weights(tmp_path / quant, source, written)
        with OpenVinoSession(tmp_path / quant, threads=1) as opened:
            if quant == "fp32":
                story = opened.native_generate([1], 260, stop_at_eos=False)
                assert opened.detokenize(story).strip().startswith(expected)
                tokens = [1, *story[:200]]
                right = torch_logits(stories, tokens)
            assert np.abs(rows_of(opened, tokens) - right).max() < limit


@pytest.mark.parametrize("family", ["gpt2", "opt", "mistral-window"])
def test_families(family: str, tiny_model: Callable[[str], Path], write_folder: Write, tmp_path: Path) -> None:
    check_family(tiny_model(family), write_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "llama-linear", "llama-llama3", "llama-yarn", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi",
        "phi3", "phi3-window", "smollm3",
    ],
)  # fmt: skip
def test_all_families(family: str, tiny_model: Callable[[str], Path], write_folder: Write, tmp_path: Path) -> None:
    check_family(tiny_model(family), write_folder, tmp_path)


def check_family(model: Path, write_folder: Write, tmp_path: Path) -> None:
    """fp32 is the model, in prefill, cached decoding and in the pipeline; int8 is near it."""
    source = load_source(model)
    tokens = tokens_of(source, 60)
    right = torch_logits(model, tokens)
    written = write_folder(source, tmp_path / "fp32", quant="fp32")
    check_weights(tmp_path / "fp32", source, written)
    with OpenVinoSession(tmp_path / "fp32", threads=1) as opened:
        assert np.abs(rows_of(opened, tokens) - right).max() < TOLERANCE
        opened.rewind(40)
        for index in range(40, 60):
            row = opened.append([tokens[index]])
            assert row is not None and np.abs(row[0] - right[index]).max() < TOLERANCE
        expected = torch_greedy(model, tokens[:30], 24)
        assert opened.native_generate(tokens[:30], 24, stop_at_eos=False) == expected
    written = write_folder(source, tmp_path / "int8", quant="int8")
    assert written.fallbacks == []
    check_weights(tmp_path / "int8", source, written)
    with OpenVinoSession(tmp_path / "int8", threads=1, exact=True) as opened:
        assert np.abs(rows_of(opened, tokens) - right).max() < 0.05 * np.abs(right).max()


# ---------------------------------------------------------------- the folder, and refusals


def test_the_folder_is_whole(ternary: Source, ternary_folder: Path) -> None:
    models = [f"openvino_{part}.{end}" for part in ("model", "tokenizer", "detokenizer") for end in ("xml", "bin")]
    names = {path.name for path in ternary_folder.iterdir()}
    assert names == {*models, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    original = (ternary.directory / "tokenizer.json").read_bytes()
    assert (ternary_folder / "tokenizer.json").read_bytes() == original
    for path in ternary_folder.iterdir():
        assert path.is_file() and not path.is_symlink() and path.stat().st_size
        content = path.read_bytes()
        assert str(ternary.directory).encode() not in content and b"edgewright-openvino-" not in content


def test_the_tokenizer_model_is_the_tokenizer(session: OpenVinoSession, ternary: Source) -> None:
    """Text as a whole, special tokens in it, and what it gives back."""
    text = "def add(a, b):\n    return a + b  <|end|>"
    tokens = session.tokenize(text)
    assert 0 not in tokens and session.detokenize(tokens) == text and session.tokenize("") == []
    model = load("openvino_genai").Tokenizer(str(session.path))
    plain = "naïve café, Привет, 你好 🙂\n\n  x = 1"
    assert model.encode(plain, add_special_tokens=False).input_ids.data[0].tolist() == session.tokenize(plain)
    assert model.decode(session.tokenize(plain)) == plain


def test_another_tokenizer_model_is_noticed(ternary_folder: Path, stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(ternary_folder, folder)
    (tmp_path / "other").mkdir()
    to_openvino._write_tokenizer(load(), load_source(stories), tmp_path / "other")
    for end in ("xml", "bin"):
        shutil.copy(tmp_path / "other" / f"openvino_tokenizer.{end}", folder)
    with OpenVinoSession(folder, threads=1) as opened, pytest.raises(BadInput, match=r"\[EW-617\]"):
        opened.tokenize("hello")


def test_a_model_without_a_state_is_refused(ternary_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(ternary_folder, folder)
    ov = load()
    ids = ov.opset13.parameter(ov.PartialShape([-1, -1]), np.int64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    ov.save_model(ov.Model([ov.opset13.result(ids)], [ids], "plain"), folder / "openvino_model.xml")
    with pytest.raises(BadInput, match=r"input_ids.*\[EW-618\]|\[EW-618\]"):
        OpenVinoSession(folder, threads=1)


def test_a_weight_that_is_not_in_the_graph_is_an_error(ternary: Source, write_folder: Write, tmp_path: Path) -> None:
    extra = next(iter(ternary.lattice.values()))
    source = replace(ternary, lattice=ternary.lattice | {"model.layers.9.mlp.up_proj.weight": extra})
    with pytest.raises(GateFailed, match=r"layers\.9.*\[EW-540\]"):
        write_folder(source, tmp_path / "out", quant="ternary")


def test_a_tokenizer_that_cannot_be_expressed_is_refused(ternary: Source, write_folder: Write, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ternary.directory, model)
    content = json.loads((model / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "UnicodeScripts"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"\[EW-541\]") as caught:
        write_folder(load_source(model), tmp_path / "out", quant="ternary")
    assert "UnicodeScripts" in str(caught.value.found)


def test_openvino_is_loaded_in_silence(tmp_path: Path) -> None:
    """Its telemetry would keep an identifier in the home directory and report every import."""
    code = (
        "from edgewright.export.openvino_package import load\n"
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
