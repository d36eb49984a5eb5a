"""The widths of GGUF files: what llama.cpp's own quantizer makes of the same weights, and lattices that stay whole."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from families import save_family

from edgewright.export.gguf import ggml as gguf_ggml
from edgewright.export.gguf.file import open_gguf
from edgewright.export.gguf.reader import read_weights, widths
from edgewright.export.gguf.widths import MIXES, SEARCHED, WIDTHS, width_for
from edgewright.export.lattice import LatticeTensor
from edgewright.export.parity import differences
from edgewright.export.runtimes import open_session
from edgewright.export.source import Source, load_source
from edgewright.export.to_gguf import TABLES, place, write

K_QUANTS = sorted(SEARCHED - {"iq4_nl"})


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, untied, eight layers, rows of 256 and 512: what K-quants take."""
    changes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    return save_family("llama", tmp_path_factory.mktemp("wide_model") / "wide", changes)


@pytest.fixture(scope="session")
def quantized_by_llama_cpp(
    wide_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, tuple[str, bytes]]]:
    """From llama.cpp's number of a kind of file: type and bytes of every tensor that its own quantizer makes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("quantized")
    write(load_source(wide_model), folder / "f32.gguf", quant="f32")

    def quantized(file_type: int) -> dict[str, tuple[str, bytes]]:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = file_type, 1
        path = folder / f"{file_type}.gguf"
        paths = str(folder / "f32.gguf").encode(), str(path).encode()
        assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)) == 0
        tensors = open_gguf(path).tensors
        return {name: (tensor.kind, tensor.data.tobytes()) for name, tensor in tensors.items()}

    return quantized


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    return {name: (tensor.kind, tensor.data.tobytes()) for name, tensor in open_gguf(path).tensors.items()}


@pytest.mark.parametrize("quant", MIXES)
def test_mixes_are_those_of_llama_cpp(wide_model, quantized_by_llama_cpp, tmp_path, quant):
    write(load_source(wide_model), tmp_path / "m.gguf", quant=quant)
    assert stored(tmp_path / "m.gguf") == quantized_by_llama_cpp(MIXES[quant].file_type)


@pytest.mark.parametrize("quant", ["q8_0", "q6_k", "q5_0", "q4_1", "q4_0"])
def test_blocks_are_those_of_llama_cpp(wide_model, quantized_by_llama_cpp, tmp_path, quant):
    write(load_source(wide_model), tmp_path / "m.gguf", quant=quant)
    right = quantized_by_llama_cpp(WIDTHS[quant].file_type)
    same = {name: entry for name, entry in stored(tmp_path / "m.gguf").items() if name.startswith("blk.")}
    assert same == {name: right[name] for name in same}


@pytest.mark.parametrize("quant", [*K_QUANTS, "iq4_nl", "q5_0", "q4_1", "bf16"])
def test_weights_without_a_lattice_arrive_as_they_were_laid_out(wide_model, tmp_path, quant):
    source = load_source(wide_model)
    written = write(source, tmp_path / "m.gguf", quant=quant, embedding_quant="q8_0")
    assert written.fallbacks == []
    assert widths(tmp_path / "m.gguf") == {quant, "q8_0"}
    assert differences(tmp_path / "m.gguf", "gguf", source, digests=written.digests) == []
    with open_session(tmp_path / "m.gguf", threads=1) as session:
        found = session.append([5, 6, 7, 8], "all")
    assert found is not None and np.isfinite(found).all()


def test_more_bits_are_nearer(wide_model, tmp_path):
    source = load_source(wide_model)
    name = "model.layers.0.mlp.up_proj.weight"
    right = source.matrix(name)
    errors = []
    for quant in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "f16"):
        write(source, tmp_path / "m.gguf", quant=quant)
        errors.append(np.square(dict(read_weights(tmp_path / "m.gguf", source))[name] - right).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_importance_is_used_where_there_is_one(wide_model, tmp_path):
    source = load_source(wide_model)
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weights = np.exp(3 * np.random.default_rng(0).standard_normal(256)).astype(np.float32)
    informed = replace(source, importance={name: weights})
    found = []
    for given in (source, informed):
        written = write(given, tmp_path / "m.gguf", quant="q2_k")
        assert differences(tmp_path / "m.gguf", "gguf", given, digests=written.digests) == []
        found.append(dict(read_weights(tmp_path / "m.gguf", source)))
    plain, better = (float((np.square(values[name] - source.matrix(name)) * weights).mean()) for values in found)
    assert better < 0.8 * plain
    assert np.array_equal(found[0][other], found[1][other])


def test_rows_that_k_quants_do_not_take_are_stored_wider_and_counted(tiny_model, tmp_path):
    source = load_source(tiny_model("llama"))
    written = write(source, tmp_path / "m.gguf", quant="q4_k_m")
    assert {fallback.quant for fallback in written.fallbacks} == {"q8_0"}
    assert len(written.fallbacks) == 16
    assert all("no multiple of the block of 256" in fallback.reason for fallback in written.fallbacks)
    assert differences(tmp_path / "m.gguf", "gguf", source, digests=written.digests) == []


@pytest.mark.parametrize("quant", ["q4_k", "q2_k", "q4_k_m", "iq4_nl"])
def test_a_lattice_is_never_rounded_again(ternary_model, tmp_path, quant):
    source = load_source(ternary_model)
    written = write(source, tmp_path / "m.gguf", quant=quant)
    assert {fallback.tensor for fallback in written.fallbacks} == set(source.lattice)
    assert {fallback.quant for fallback in written.fallbacks} == {"tq2_0"}
    assert written.lattice == dict.fromkeys(source.lattice, "exact")
    assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


@pytest.mark.parametrize("quant", ["q2_0", "q5_0", "q4_1", "bf16"])
def test_ternary_weights_are_exact_in_the_wider_types(ternary_model, tmp_path, quant):
    source = load_source(ternary_model)
    written = write(source, tmp_path / "m.gguf", quant=quant)
    assert written.fallbacks == []
    assert widths(tmp_path / "m.gguf") == {quant, written.embedding_quant}
    assert written.lattice == dict.fromkeys(source.lattice, "exact")
    assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


def lattice(low: int, high: int, *, columns: int = 256, group: int | None = 32, scale: float = 2**-7) -> LatticeTensor:
    """Random codes that reach both ends; scales that fp16 holds, of 11 bits."""
    draw = np.random.default_rng(0)
    codes = draw.integers(low, high + 1, (8, columns)).astype(np.int8)
    codes[0, :2] = low, high
    count = 1 if group is None else -(-columns // group)
    scales = draw.uniform(1, 2, (8, count)).astype(np.float16).astype(np.float32) * np.float32(scale)
    levels = "ternary" if high == 1 else "int4" if high <= 7 else "int8"
    return LatticeTensor(codes=codes, scales=scales, group=group, bits=8, levels=levels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("held", "asked", "expected"),
    [
        (lattice(-1, 1, group=256), "tq1_0", "tq1_0"),
        (lattice(-1, 1, group=256), "q4_k", "tq2_0"),
        (lattice(-1, 1, group=64), "tq1_0", "q2_0"),
        (lattice(-1, 1, group=32), "tq2_0", "q4_0"),
        (lattice(-8, 7), "tq2_0", "q4_0"),
        (lattice(-8, 7), "q6_k", "q4_0"),
        (lattice(-8, 7), "q8_0", "q8_0"),
        (lattice(-127, 127), "q4_0", "q8_0"),
        (lattice(-127, 127), "f16", "f32"),
        (lattice(-127, 127, columns=100, group=None), "q8_0", "f32"),
        (lattice(-1, 1, columns=100, group=None), "tq2_0", "f16"),
        (lattice(-1, 1, group=None, scale=2.0**17), "tq2_0", "f32"),
        (None, "q4_k", "q4_k"),
    ],
)
def test_a_lattice_goes_to_the_narrowest_type_that_holds_it(held, asked, expected):
    stored_as, reason = width_for(asked, 256 if held is None else held.codes.shape[1], held)
    assert (stored_as, reason is None) == (expected, asked == expected)


@pytest.mark.parametrize("quant", ["tq2_0", "tq1_0", "q2_0"])
def test_a_weight_left_out_of_ternary_training_is_not_rounded_to_it(wide_model, tmp_path, quant):
    plain = load_source(wide_model)
    left_out = "model.layers.3.self_attn.k_proj.weight"
    linear = [name for name in plain.names if name.endswith("_proj.weight")]
    one = lattice(-1, 1, group=None)
    trained = {
        name: replace(one, codes=np.ones(plain.shape(name), np.int8), scales=one.scales[:1])
        for name in linear
        if name != left_out
    }
    written = write(replace(plain, lattice=trained), tmp_path / "m.gguf", quant=quant)
    kinds = {name: tensor.kind for name, tensor in open_gguf(tmp_path / "m.gguf").tensors.items()}
    assert kinds["blk.3.attn_k.weight"] == "q8_0" and kinds["blk.3.attn_q.weight"] == quant
    ((tensor, kind),) = {(fallback.tensor, fallback.quant) for fallback in written.fallbacks}
    assert (tensor, kind) == (left_out, "q8_0")
    placed, fallbacks = place(plain, quant, None)  # nothing is trained: all of it is rounded, as ever
    assert fallbacks == [] and all(tensor.width == quant for tensor in placed if tensor.source in linear)
    placed, fallbacks = place(replace(plain, lattice=trained), quant, quant)
    assert {tensor.width for tensor in placed if tensor.name in TABLES} == {quant}  # as it was asked for


def test_calibrated_lattices_are_what_the_file_holds(wide_model, tmp_path):
    plain = load_source(wide_model)
    name = "model.layers.3.self_attn.k_proj.weight"
    held = replace(
        lattice(-8, 7), codes=np.tile(lattice(-8, 7).codes, (16, 1)), scales=np.tile(lattice(-8, 7).scales, (16, 1))
    )
    source = replace(plain, lattice={name: held}, calibrated=frozenset({name}))
    for quant, kind in (("q4_0", "q4_0"), ("f32", "f32"), ("q4_k", "q4_0")):
        written = write(source, tmp_path / "m.gguf", quant=quant)
        assert open_gguf(tmp_path / "m.gguf").tensors["blk.3.attn_k.weight"].kind == kind
        assert np.array_equal(dict(read_weights(tmp_path / "m.gguf", source))[name], held.dequantize())
        assert written.lattice[name] == "exact"
        assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


def test_a_fused_weight_may_be_quantized(tmp_path):
    changes = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 128}
    for family, parts in (("phi3", ["attn_qkv"]), ("phi3-window", ["attn_q", "attn_k", "attn_v"])):
        plain = load_source(save_family(family, tmp_path / family, changes))
        name = "model.layers.1.self_attn.qkv_proj.weight"
        draw = np.random.default_rng(1)
        codes = draw.integers(-1, 2, plain.shape(name)).astype(np.int8)
        scales = draw.uniform(0.5, 1, (len(codes), 1)).astype(np.float16).astype(np.float32)
        held = LatticeTensor(codes=codes, scales=scales, group=None, bits=2, levels="ternary")
        source = replace(plain, lattice={name: held}, calibrated=frozenset({name}))
        written = write(source, tmp_path / "m.gguf", quant="tq2_0")
        tensors = open_gguf(tmp_path / "m.gguf").tensors
        assert [tensors[f"blk.1.{part}.weight"].kind for part in parts] == ["tq2_0"] * len(parts)
        assert differences(tmp_path / "m.gguf", "gguf", source, kept=written.lattice, digests=written.digests) == []


def test_default_widths_of_embedding_and_head(wide_model, ternary_model, tmp_path):
    def kinds(source: Source, quant: str, embedding_quant: str | None = None) -> list[str]:
        placed, _ = place(source, quant, embedding_quant)
        return [tensor.width for tensor in placed if tensor.name in ("token_embd.weight", "output.weight")]

    untied, tied = load_source(wide_model), load_source(ternary_model)
    assert kinds(untied, "q4_k_m") == ["q6_k", "q4_k"]
    assert kinds(tied, "q4_k_m") == ["q6_k"]
    assert kinds(untied, "q4_0") == ["f16", "f16"]
    assert kinds(untied, "bf16") == ["bf16", "bf16"]
    assert kinds(untied, "q4_k", "q8_0") == ["q8_0", "q8_0"]


def test_the_library_gives_back_what_the_package_reads():
    values = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    for quant in (*SEARCHED, "q4_1", "q5_0"):
        blocks = gguf_ggml.quantize(values, quant)
        right = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(WIDTHS[quant].number))
        assert np.array_equal(gguf_ggml.dequantize(blocks, quant, 512), right), quant


def test_k_quants_without_the_library_say_what_to_install(wide_model, tmp_path, monkeypatch):
    from edgewright.errors import BadInput

    monkeypatch.setattr(gguf_ggml, "LIBRARIES", ("no-such-library.so",))
    gguf_ggml._library.cache_clear()
    with pytest.raises(BadInput, match=r"(?s)EW-603.*edgewright\[llamacpp\]"):
        write(load_source(wide_model), tmp_path / "m.gguf", quant="q4_k")


def test_layers_for_a_gpu_that_is_not_there(ternary_model, tmp_path):
    import llama_cpp

    from edgewright.errors import BadInput
    from edgewright.export.runtimes.llamacpp import LlamaCppSession

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp has a GPU")
    write(load_source(ternary_model), tmp_path / "m.gguf", quant="f32")
    with pytest.raises(BadInput, match="EW-535"):
        LlamaCppSession(tmp_path / "m.gguf", gpu_layers=-1)


def test_a_mix_is_called_by_its_name(wide_model, tiny_model, tmp_path):
    write(load_source(wide_model), tmp_path / "m.gguf", quant="q4_k_m")
    assert widths(tmp_path / "m.gguf") == {"q4_k_m"}
    write(load_source(tiny_model("gpt2")), tmp_path / "m.gguf", quant="q4_k_m")
    assert widths(tmp_path / "m.gguf") == {"q8_0"}
    assert open_gguf(tmp_path / "m.gguf").tensors["position_embd.weight"].kind == "f32"
