"""GenAI folders: every weight arrives as the lattice says, in the width asked for or in a counted wider one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from families import save_family

from edgewright.errors import GateFailed
from edgewright.export import to_genai
from edgewright.export.artifact import digest
from edgewright.export.genai.reader import read_weights, widths
from edgewright.export.lattice import LatticeTensor, detect_ternary, round_int
from edgewright.export.onnx.files import PAGE
from edgewright.export.onnx.reader import attributes, dequantize, quantizes_activations
from edgewright.export.source import EMBEDDING, HEAD, Source, load_source

FP32_TOLERANCE = 1e-3


def reference_logits(model: Path, tokens: list[int]) -> np.ndarray:
    """float32 `[tokens, vocabulary]` by torch."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        return np.asarray(network(torch.tensor([tokens])).logits[0].numpy())


def folder_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """float32 `[tokens, vocabulary]` by the runtime, in one prefill."""
    from edgewright.export.runtimes.genai import GenaiSession

    with GenaiSession(folder, threads=1) as session:
        logits = session.append(tokens, "all")
        assert logits is not None
        return logits


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL(reference || logits) over the rows."""

    def log_softmax(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64) - values.max(axis=1, keepdims=True)
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def tokens_of(source: Source, count: int = 60) -> list[int]:
    return [int(t) for t in np.random.default_rng(5).integers(3, source.config["vocab_size"], count)]


def packed_nodes(folder: Path) -> list[dict[str, object]]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return [attributes(node) for node in model.graph.node if node.op_type == "MatMulNBits"]


def products(folder: Path) -> list[tuple[onnx.NodeProto, np.ndarray, np.ndarray]]:
    """The packed products of a folder, with their codes and scales."""
    graph = onnx.load(folder / "model.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    return [(node, arrays[node.input[1]], arrays[node.input[2]]) for node in nodes]


def place(folder: Path, ending: str) -> dict[str, str]:
    """Where in the data file the initializer lies whose name ends so."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith(ending))
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.fixture(scope="module")
def ternary(ternary_model: Path) -> Source:
    return load_source(ternary_model)


@pytest.fixture(scope="module")
def awkward(awkward_model: Path) -> Source:
    return load_source(awkward_model)


@pytest.fixture(scope="module")
def ternary_folder(ternary: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "ternary"
    written = to_genai.write(ternary, folder, quant="ternary")
    assert written.fallbacks == [] and written.embedding_quant == "fp32"
    assert written.lattice == dict.fromkeys(ternary.lattice, "exact")
    return folder


# ---------------------------------------------------------------- the lattice arrives


def test_ternary_weights_are_bit_exact(ternary: Source, ternary_folder: Path) -> None:
    found = dict(read_weights(ternary_folder, ternary))
    assert len(ternary.lattice) == 14
    assert {tensor.group for tensor in ternary.lattice.values()} == {None, 256}
    assert set(found) == set(ternary.names)
    for name in ternary.names:
        np.testing.assert_array_equal(found[name], ternary.tensor(name), err_msg=name)


def test_codes_and_scales_are_the_lattice(ternary: Source, ternary_folder: Path) -> None:
    """Not only the products: the stored integers are code + 2, the stored scales those of the lattice."""
    met = 0
    for node, packed, scales in products(ternary_folder):
        names = node.input[1].removesuffix("_Q2").split("+")
        stored = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(len(packed), -1)
        parts = [ternary.lattice[name] for name in names]
        np.testing.assert_array_equal(stored.astype(np.int8) - 2, np.concatenate([part.codes for part in parts]))
        blocks = [part.block_scales(128) for part in parts]
        np.testing.assert_array_equal(scales, np.concatenate(blocks))
        met += len(names)
    assert met == len(ternary.lattice)


def test_ternary_takes_two_and_a_quarter_bits(ternary_folder: Path) -> None:
    nodes = products(ternary_folder)
    assert len(nodes) == 2 * 4  # q, k and v are one matrix, gate and up another
    for node, codes, scales in nodes:
        values = attributes(node)
        assert (values["bits"], values["block_size"], values["accuracy_level"]) == (2, 128, 4)
        assert (codes.nbytes + scales.nbytes) * 8 / (values["K"] * values["N"]) == 2.25  # type: ignore[operator]


def test_a_changed_byte_is_seen_when_read(ternary: Source, ternary_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ternary_folder, broken)
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("down_proj.weight_Q2"))
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    data = bytearray((broken / "model.onnx.data").read_bytes())
    data[offset] ^= 0b10
    (broken / "model.onnx.data").write_bytes(data)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not np.array_equal(dict(read_weights(broken, ternary))[name], ternary.lattice[name].dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_reader_takes_bits_low_first(bits: int) -> None:
    """By hand: the first weights of a row lie in the low bits of its first byte, around the zero point."""
    zero, per_byte = 1 << (bits - 1), 8 // bits
    codes = [-1, 1, 0, -1][:per_byte]
    byte = sum((code + zero) << (bits * index) for index, code in enumerate(codes))
    packed = np.full((1, 2, 16 * bits // 8), byte, np.uint8)
    values = dequantize(packed, np.array([[0.5, 2.0]], np.float32), bits=bits, columns=20)
    expected = np.tile(np.array(codes, np.float32), 32)[:20] * np.repeat(np.float32([0.5, 2.0]), 16)[:20]
    np.testing.assert_array_equal(values[0], expected)


# ---------------------------------------------------------------- what the runtime makes of it


@pytest.mark.parametrize("name", ["ternary", "awkward"])
def test_fp32_is_the_model(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Source = request.getfixturevalue(name)
    written = to_genai.write(source, tmp_path / "out", quant="fp32")
    assert written.fallbacks == [] and not quantizes_activations(tmp_path / "out")
    tokens = tokens_of(source)
    difference = np.abs(folder_logits(tmp_path / "out", tokens) - reference_logits(source.directory, tokens)).max()
    assert difference <= FP32_TOLERANCE
    for tensor, value in read_weights(tmp_path / "out", source):
        np.testing.assert_array_equal(value, source.tensor(tensor), err_msg=tensor)


def test_ternary_differs_by_rounded_activations_alone(ternary: Source, ternary_folder: Path) -> None:
    assert quantizes_activations(ternary_folder)
    tokens = tokens_of(ternary)
    kl = divergence(reference_logits(ternary.directory, tokens), folder_logits(ternary_folder, tokens))
    assert 0 < kl <= 5e-3


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_ternary_weights_stay_exact_in_wider_widths(quant: str, ternary: Source, tmp_path: Path) -> None:
    """Rounding {-s, 0, s} to 4 or 8 bits by the largest value would not give s back."""
    written = to_genai.write(ternary, tmp_path / "out", quant=quant)
    assert written.fallbacks == [] and set(written.lattice.values()) == {"exact"}
    found = dict(read_weights(tmp_path / "out", ternary))
    for name, tensor in ternary.lattice.items():
        np.testing.assert_array_equal(found[name], tensor.dequantize(), err_msg=name)
    assert {values["bits"] for values in packed_nodes(tmp_path / "out")} == {int(quant[3:]), 8}


@pytest.mark.parametrize(("quant", "limit"), [("int8", 1e-2), ("int4", 0.3), ("ternary", 1e-2)])
def test_awkward_shapes_in_all_widths(quant: str, limit: float, awkward: Source, tmp_path: Path) -> None:
    """Rows of 72 and 100 weights end in the middle of a block, heads of 24 are rotated outside of the attention."""
    written = to_genai.write(awkward, tmp_path / "out", quant=quant)
    found = dict(read_weights(tmp_path / "out", awkward))
    assert set(found) == set(awkward.names)
    for name, tensor in awkward.lattice.items():
        np.testing.assert_array_equal(found[name], tensor.dequantize(), err_msg=name)
    tokens = tokens_of(awkward)
    reference = reference_logits(awkward.directory, tokens)
    assert divergence(reference, folder_logits(tmp_path / "out", tokens)) <= limit
    assert (quant == "ternary") == bool(written.fallbacks)
    assert widths(tmp_path / "out") == {quant, *(f.quant for f in written.fallbacks), written.embedding_quant}


def test_what_is_not_ternary_is_counted(awkward: Source, tmp_path: Path) -> None:
    """And stands apart from what is: queries and keys are still two bits."""
    written = to_genai.write(awkward, tmp_path / "out", quant="ternary")
    layers = [f"model.layers.0.{part}.weight" for part in linear_modules()]
    alone = "model.layers.1.self_attn.v_proj.weight"
    assert sorted(fallback.tensor for fallback in written.fallbacks) == sorted([*layers, alone])
    assert {fallback.quant for fallback in written.fallbacks} == {"int8"}
    reason = next(f.reason for f in written.fallbacks if f.tensor == alone)
    assert "layers.1.self_attn.v_proj.weight is not ternary" in reason
    assert written.lattice == dict.fromkeys(awkward.lattice, "exact")


@pytest.mark.parametrize("quant", ["fp32", "ternary"])
def test_a_lattice_finer_than_the_files_is_what_counts(quant: str, ternary: Source, tmp_path: Path) -> None:
    """As of a bf16 checkpoint with its sidecar: the files are rounded, the folder has the lattice."""
    name = "model.layers.1.mlp.down_proj.weight"
    finer = replace(ternary.lattice[name], scales=ternary.lattice[name].scales * np.float32(1.001))
    source = replace(ternary, lattice=ternary.lattice | {name: finer}, restored=frozenset({name}))
    written = to_genai.write(source, tmp_path / "out", quant=quant)
    assert written.lattice[name] == "exact" and not written.fallbacks
    found = dict(read_weights(tmp_path / "out", source))
    np.testing.assert_array_equal(found[name], finer.dequantize())
    assert written.digests[name] == digest(found[name])


def linear_modules() -> list[str]:
    return [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


# ---------------------------------------------------------------- embedding and head


@pytest.mark.parametrize(("embedding_quant", "bits"), [("int8", 8), ("int4", 4)])
def test_a_tied_embedding_shares_the_bytes_of_the_head(
    embedding_quant: str, bits: int, ternary: Source, ternary_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    written = to_genai.write(ternary, folder, quant="ternary", embedding_quant=embedding_quant)
    assert written.embedding_quant == embedding_quant
    table = ternary.tensor(EMBEDDING)
    saved = (ternary_folder / "model.onnx.data").stat().st_size - (folder / "model.onnx.data").stat().st_size
    assert saved > table.nbytes * (1 - (bits + 1.1) / 32) - 2 * PAGE  # one packed copy, and no other
    assert place(folder, f"_Q{bits}") == place(folder, f"_Q{bits}_rows")
    error = np.abs(dict(read_weights(folder, ternary))[EMBEDDING] - table).max() / np.abs(table).max()
    assert 0 < error <= 1 / (1 << (bits - 1))
    tokens = tokens_of(ternary)
    assert divergence(reference_logits(ternary.directory, tokens), folder_logits(folder, tokens)) <= 0.05


def test_an_untied_embedding_is_packed_apart(awkward: Source, tmp_path: Path) -> None:
    to_genai.write(awkward, tmp_path / "out", quant="fp32", embedding_quant="int8")
    found = dict(read_weights(tmp_path / "out", awkward))
    for name in (EMBEDDING, HEAD):
        weight = awkward.tensor(name)
        expected = round_int(weight, bits=8, group=32 if weight.shape[1] == 72 else 128).dequantize()
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_a_tied_fp32_table_is_stored_once(ternary: Source, tmp_path: Path) -> None:
    to_genai.write(ternary, tmp_path / "out", quant="fp32")
    weights = sum(ternary.tensor(name).nbytes for name in ternary.names)
    rotation = 2 * ternary.config["max_position_embeddings"] * 64 // 2 * 4
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < (weights + rotation) * 1.01


# ---------------------------------------------------------------- the folder


def test_the_folder_is_whole(ternary: Source, ternary_folder: Path) -> None:
    names = {path.name for path in ternary_folder.iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all(path.is_file() and not path.is_symlink() and path.stat().st_size for path in ternary_folder.iterdir())
    modes = {path.stat().st_mode for path in ternary_folder.iterdir()}
    assert len(modes) == 1
    onnx.checker.check_model(str(ternary_folder / "model.onnx"))
    original = (ternary.directory / "tokenizer.json").read_bytes()
    assert (ternary_folder / "tokenizer.json").read_bytes() == original
    for path in ternary_folder.iterdir():
        assert str(ternary.directory).encode() not in path.read_bytes()


def test_the_config_is_that_of_the_model(ternary: Source, ternary_folder: Path) -> None:
    config = json.loads((ternary_folder / "genai_config.json").read_text())
    model, search = config["model"], config["search"]
    assert model["context_length"] == 2048 and model["vocab_size"] == ternary.config["vocab_size"]
    assert model["eos_token_id"] == 0
    assert model["bos_token_id"] == 0, "without a BOS a text starts with EOS"
    assert search["past_present_share_buffer"] is True
    assert search["do_sample"] is False and search["num_beams"] == 1


def test_stories_in_all_widths(stories: Path, tmp_path: Path) -> None:
    """A trained model with rows of 64 and 172 weights and heads of 8."""
    from edgewright.export.runtimes.genai import GenaiSession

    source = load_source(stories)
    expected = (stories / "expected_greedy.txt").read_text().strip()
    limits = {"fp32": 1e-6, "int8": 1e-2, "int4": 0.3, "ternary": 1e-2}
    for quant in to_genai.QUANTS:
        folder = tmp_path / quant
        written = to_genai.write(source, folder, quant=quant)
        assert len(written.fallbacks) == (35 if quant == "ternary" else 0)
        with GenaiSession(folder, threads=1) as session:
            if quant == "fp32":
                story = session.native_generate([1], 260, stop_at_eos=False)
                assert session.detokenize(story).strip().startswith(expected)
                tokens = [1, *story[:200]]
                reference = reference_logits(stories, tokens)
            logits = session.append(tokens, "all")
            assert logits is not None and divergence(reference, logits) <= limits[quant]


def test_nothing_else_is_left(ternary: Source, tmp_path: Path) -> None:
    written = to_genai.write(ternary, tmp_path / "out", quant="ternary", embedding_quant="int8")
    assert written.embedding_quant == "int8" and len(written.lattice) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_config_is_what_the_vendors_builder_writes(ternary_folder: Path, ternary_built: Path) -> None:
    ours, theirs = (json.loads((path / "genai_config.json").read_text()) for path in (ternary_folder, ternary_built))
    assert theirs["model"].pop("bos_token_id") == 1, "which is no token that texts start with"
    assert ours["model"].pop("bos_token_id") == 0
    assert ours == theirs


def test_what_a_chat_model_says_of_generation_is_kept(ternary: Source, ternary_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ternary_model, model)
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 9]}
    (model / "generation_config.json").write_text(json.dumps(said))
    to_genai.write(load_source(model), tmp_path / "out", quant="ternary")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert {name: config["search"][name] for name in ("do_sample", "temperature", "top_k", "top_p")} == {
        name: said[name] for name in ("do_sample", "temperature", "top_k", "top_p")
    }
    assert config["model"]["eos_token_id"] == [0, 7, 9], "the tokenizer's own end, which ends a turn, is one as well"
    assert config["model"]["pad_token_id"] == 7


# ---------------------------------------------------------------- refusals


def test_a_weight_without_a_place_is_refused(ternary: Source, tmp_path: Path) -> None:
    extra = "model.layers.0.mlp.expert.weight"
    file = ternary.files[EMBEDDING]
    shapes = {**ternary.architecture.shapes, extra: (4, 4)}
    source = replace(
        ternary, files={**ternary.files, extra: file}, architecture=replace(ternary.architecture, shapes=shapes)
    )
    with pytest.raises(GateFailed, match=r"expert.*\[EW-521\]"):
        to_genai.write(source, tmp_path / "out", quant="int8")
    assert not (tmp_path / "out").exists()


def test_a_quantized_weight_that_was_not_met_is_an_error(ternary: Source, tmp_path: Path) -> None:
    extra = next(iter(ternary.lattice.values()))
    source = replace(ternary, lattice=ternary.lattice | {"model.layers.9.mlp.up_proj.weight": extra})
    with pytest.raises(GateFailed, match=r"layers\.9.*no such weight|no such weight"):
        to_genai.write(source, tmp_path / "out", quant="ternary")


def test_a_lattice_that_no_block_holds_falls_back(ternary: Source, tmp_path: Path) -> None:
    """Scale groups of 48 straddle every block: such a weight is stored in fp32, exactly, and counted."""
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = ternary.lattice[name]
    scales = np.repeat(tensor.scales, -(-256 // 48), axis=1)
    odd = LatticeTensor(codes=tensor.codes, scales=scales, group=48, bits=2, levels="ternary")
    source = replace(ternary, lattice=ternary.lattice | {name: odd})
    written = to_genai.write(source, tmp_path / "out", quant="ternary")
    assert [(fallback.tensor, fallback.quant) for fallback in written.fallbacks] == [(name, "fp32")]
    assert "straddles" in written.fallbacks[0].reason
    np.testing.assert_array_equal(dict(read_weights(tmp_path / "out", ternary))[name], tensor.dequantize())


def test_heads_that_the_attention_does_not_take_get_another(tmp_path: Path) -> None:
    """`GroupQueryAttention` wants sizes that 8 divides; ONNX's own operators take all."""
    model = save_family("llama", tmp_path / "model", {"head_dim": 12})
    source = load_source(model)
    to_genai.write(source, tmp_path / "out", quant="fp32")
    kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node}
    assert "Attention" in kinds and "GroupQueryAttention" not in kinds
    tokens = tokens_of(source)
    difference = np.abs(folder_logits(tmp_path / "out", tokens) - reference_logits(model, tokens)).max()
    assert difference <= FP32_TOLERANCE


def test_fixture_weights_are_what_they_claim(awkward: Source) -> None:
    assert len(awkward.lattice) == 6 and all(name.startswith("model.layers.1.") for name in awkward.lattice)
    assert detect_ternary(awkward.tensor("model.layers.1.self_attn.v_proj.weight")) is None
