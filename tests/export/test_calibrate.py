"""Calibration of whole models: every family, what it is measured on, budgets, and the way into files."""

from __future__ import annotations

import lzma
import random
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, save_family

import edgewright
from edgewright.errors import BadInput, RecipeError
from edgewright.export.artifact import read_entry
from edgewright.export.calibration.calibrate import calibrate
from edgewright.export.calibration.calibrated import Calibrations
from edgewright.export.calibration.decoder_blocks import (
    block_arguments,
    find_blocks,
    first_hidden,
    last_hidden,
    run_block,
    set_matrix,
    weight_layers,
)
from edgewright.export.calibration.sensitivity import Unit, choose, divergence, log_probabilities
from edgewright.export.calibration.text import read_text
from edgewright.export.lattice import round_q4_0
from edgewright.export.source import Source, load_source
from edgewright.student import load_model

ONE_OF_EACH = [name for name in FAMILIES if "-" not in name]


def words(count: int, seed: int) -> str:
    """Lines of made-up words."""
    rng = random.Random(seed)
    made = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(count)]
    return "\n".join(" ".join(made[start : start + 9]) for start in range(0, count, 9))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 6,000 tokens to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(words(1200, seed=1))
    return path


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much to judge on."""
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(words(1200, seed=2))
    return path


@pytest.fixture(scope="module")
def story_files(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Real stories: some 8,000 tokens to calibrate on, and as many others to judge on."""
    directory = tmp_path_factory.mktemp("stories")
    for name, packed in (("calibration", "train_prefix_2MiB"), ("held_out", "valid_head")):
        with lzma.open(stories.parent / "tinystories" / f"{packed}.txt.xz", "rt", encoding="utf-8") as file:
            (directory / f"{name}.txt").write_text(file.read(20_000), encoding="utf-8")
    return directory / "calibration.txt", directory / "held_out.txt"


def plainly_rounded(weight: np.ndarray) -> np.ndarray:
    """Q4_0's own rule, for any number of columns."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 32)))
    return round_q4_0(padded).dequantize()[:, : weight.shape[1]]


def kl(source: Source, values: dict[str, np.ndarray], sequences: torch.Tensor) -> float:
    """KL of the model with other weights, nats per token."""
    model = load_model(source.directory).eval()
    right = log_probabilities(model, sequences)
    layers = weight_layers(model, find_blocks(model), embedding=source.embedding, head=source.head)
    for name, value in values.items():
        set_matrix(layers[name], value)
    return divergence(right, log_probabilities(model, sequences))


# ---------------------------------------------------------------- quality


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_every_family_loses_less_on_other_text(tiny_model, text, other_text, family):
    """All linear weights, embedding and head in 4 bits; the KL to the model on text that calibration never saw."""
    source = load_source(tiny_model(family))
    held_out = torch.from_numpy(read_text(source, [other_text], max_tokens=2048).sequences)
    found = calibrate(source, files=[text], max_tokens=4096)
    assert found.calibrated == {*source.linears, source.embedding} == set(found.lattice)
    assert all(lattice.codes.shape == source.matrix(name).shape for name, lattice in found.lattice.items())
    assert {*source.linears} <= set(found.importance)
    plain = kl(source, {name: plainly_rounded(source.matrix(name)) for name in found.lattice}, held_out)
    careful = kl(source, {name: lattice.dequantize() for name, lattice in found.lattice.items()}, held_out)
    assert careful < 0.5 * plain


def test_error_feedback_beats_searched_scales_beats_rounding(stories, story_files):
    """A trained model, real text, other real text."""
    source = load_source(stories)
    calibration, held_out_text = story_files
    held_out = torch.from_numpy(read_text(source, [held_out_text], max_tokens=2048).sequences)
    plain = {name: plainly_rounded(source.matrix(name)) for name in (*source.linears, source.embedding)}
    losses = {"plain": kl(source, plain, held_out)}
    for method in ("search", "gptq"):
        found = calibrate(source, files=[calibration], method=method)
        losses[method] = kl(source, {name: each.dequantize() for name, each in found.lattice.items()}, held_out)
    assert losses["gptq"] < 0.6 * losses["plain"]
    assert losses["gptq"] < losses["search"] < 0.9 * losses["plain"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_blocks_one_by_one_are_the_model(tiny_model, family):
    """What calibration walks through is what the model computes."""
    source = load_source(tiny_model(family))
    model = load_model(source.directory).eval()
    sequences = torch.randint(0, 200, (3, 48), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks(model)
    hidden, seen = first_hidden(model, blocks, sequences), []
    handle = blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    last_hidden(model, sequences)
    handle.remove()
    for block, arguments in zip(blocks, block_arguments(model, blocks, sequences[0]), strict=True):
        hidden = run_block(block, hidden, arguments)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what stays, what is counted


def test_what_is_on_a_lattice_stays(ternary_model, text):
    source = load_source(ternary_model)
    found = calibrate(source, files=[text], max_tokens=4096)
    assert found.calibrated == {source.embedding}
    assert all(found.lattice[name] is lattice for name, lattice in source.lattice.items())
    with pytest.raises(BadInput, match="nothing to calibrate.*EW-554"):
        calibrate(source, files=[text], embedding_bits=None, max_tokens=4096)


def test_same_arguments_same_bits(tiny_model, text):
    source = load_source(tiny_model("qwen2"))
    first, second = (calibrate(source, files=[text], max_tokens=4096, seed=3) for _ in range(2))
    for name, lattice in first.lattice.items():
        np.testing.assert_array_equal(lattice.codes, second.lattice[name].codes)
        np.testing.assert_array_equal(lattice.scales, second.lattice[name].scales)
    assert first.calibration == second.calibration


def test_importance_is_the_mean_square_of_the_inputs(tiny_model, text):
    """Against the hidden states that transformers reports: what the head sees is the last of them."""
    source = load_source(tiny_model("llama"))
    found = calibrate(source, files=[text], method="imatrix", max_tokens=4096)
    assert not found.lattice and not found.calibrated
    sequences = torch.from_numpy(read_text(source, [text], max_tokens=4096).sequences)
    with torch.inference_mode():
        output = load_model(source.directory).eval()(input_ids=sequences, output_hidden_states=True)
    expected = output.hidden_states[-1].double().pow(2).mean(dim=(0, 1))
    np.testing.assert_allclose(found.importance["lm_head.weight"], expected, rtol=1e-5)
    assert {name: value.shape for name, value in found.importance.items()} == {
        name: source.matrix(name).shape[1:] for name in source.linears
    }


# ---------------------------------------------------------------- text


def test_text_is_packed_drawn_and_hashed(tiny_model, text, other_text):
    source = load_source(tiny_model("llama"))
    everything = read_text(source, [text, other_text], max_tokens=10**6)
    few = read_text(source, [text, other_text], max_tokens=1024, seed=1)
    assert few.sequences.shape == (8, 128)
    assert few.files == everything.files and len(few.files) == 2
    rows = [row.tolist() for row in everything.sequences]
    other = read_text(source, [text, other_text], max_tokens=1024, seed=2)
    drawn = [rows.index(row.tolist()) for row in few.sequences]
    assert drawn == sorted(drawn) and drawn[-1] > 20
    assert drawn != [rows.index(row.tolist()) for row in other.sequences]
    assert everything.sequences[0, 0] == source.config["bos_token_id"]


def test_too_little_text(tiny_model, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(BadInput, match=r"(?s)too little text.*EW-550.*at least 4,096 tokens.*found: \d+ tokens"):
        calibrate(load_source(tiny_model("llama")), files=[tmp_path / "short.txt"])


def test_a_missing_file_is_one_of_calibrate(tiny_model, tmp_path):
    source = load_source(tiny_model("llama"))
    with pytest.raises(BadInput, match=r"(?s)no file matches --calibrate \[EW-203\].*check --calibrate"):
        calibrate(source, files=[tmp_path / "gone.txt"])
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"(?s)EW-204.*narrow --calibrate"):
        calibrate(source, files=[tmp_path / "model.bin"])


def test_layers_outside_the_blocks_are_named(text, tmp_path, monkeypatch):
    """OPT-350m's embedding is narrower than its blocks: two projections stand between."""
    monkeypatch.setitem(FAMILIES, "opt-narrow", ("OPTForCausalLM", {**FAMILIES["opt"][1], "word_embed_proj_dim": 32}))
    source = load_source(save_family("opt-narrow", tmp_path / "opt"))
    lines: list[str] = []
    done = calibrate(source, files=[text], method="search", max_tokens=512, say=lines.append)
    names = {"model.decoder.project_in.weight", "model.decoder.project_out.weight"}
    assert names <= set(source.linears) and not names & done.lattice.keys()
    assert any(all(name in line for name in names) and "rounded plainly" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "magic"}, "gptq, search, imatrix"), ({"bits": 3}, "4 or 8"), ({"embedding_bits": 16}, "4 or 8")],
)
def test_unknown_methods_and_widths(tiny_model, text, change, message):
    with pytest.raises(RecipeError, match=rf"(?s)EW-551.*{message}"):
        calibrate(load_source(tiny_model("llama")), files=[text], **change)


# ---------------------------------------------------------------- budgets


def test_bytes_go_where_they_gain_most():
    units = [Unit(("a",), 100, 1.0), Unit(("b", "c"), 50, 0.9), Unit(("d",), 10, 0.05), Unit(("e",), 1, 0.0)]
    assert choose(units, 0) == frozenset()
    assert choose(units, 60) == {"b", "c", "d"}
    assert choose(units, 61) == {"b", "c", "d", "e"}
    assert choose(units, 100) == {"a"}, "the best alone is better than the best per byte"
    assert choose(units, 161) == {"a", "b", "c", "d", "e"}


def test_a_budget_is_spent_on_what_is_sensitive(stories, story_files):
    source = load_source(stories)
    calibration, held_out_text = story_files
    held_out = torch.from_numpy(read_text(source, [held_out_text], max_tokens=2048).sequences)
    settings = {"files": [calibration], "method": "search"}
    narrow = calibrate(source, **settings)
    some = calibrate(source, **settings, spare_bytes=30_000)
    wide = calibrate(source, **settings, bits=8, embedding_bits=8)
    widened = [name for name, lattice in some.lattice.items() if lattice.levels == "int8"]
    assert 15_000 < sum(some.lattice[name].codes.size / 2 for name in widened) <= 30_000
    assert sorted(widened) == some.calibration["bits"]["8"]
    losses = [
        kl(source, {name: each.dequantize() for name, each in found.lattice.items()}, held_out)
        for found in (narrow, some, wide)
    ]
    assert losses[2] < 0.05 * losses[0] and losses[1] < 0.75 * losses[0]


# ---------------------------------------------------------------- files


def test_a_file_holds_the_calibrated_lattice(stories, story_files, tmp_path):
    """Same bytes as plain rounding, less KL in the runtime itself, certified; the manifest says what was done."""
    pytest.importorskip("llama_cpp")
    settings = {"to": "gguf", "quant": "q4_0", "embedding_quant": "q4_0", "threads": 1}
    plain = edgewright.export(stories, out=tmp_path / "plain", **settings)
    found = edgewright.export(stories, out=tmp_path / "calibrated", calibrate=[story_files[0]], **settings)
    assert found.gate == "passed" and found.bytes == plain.bytes and found.fallbacks == plain.fallbacks
    assert found.parity["kl"] < 0.8 * plain.parity["kl"]
    entry = read_entry(found.path)
    assert entry["calibration"]["method"] == "gptq" and entry["calibration"]["tokens"] > 4096
    assert [len(name) for name in entry["calibration"]["files"]] == [64]
    assert read_entry(plain.path)["calibration"] is None
    assert edgewright.verify(found.path, against=stories, threads=1).lattice_identity


def test_a_file_of_onnx_runtime_holds_it_too(stories, story_files, tmp_path):
    """Embedding and head share their bytes, columns need not fill a block; an independent reader finds the codes."""
    from edgewright.export.genai.reader import read_weights
    from edgewright.export.to_genai import write

    found = calibrate(load_source(stories), files=[story_files[0]], method="search")
    written = write(found, tmp_path, quant="int4", embedding_quant="int4")
    assert not written.fallbacks and set(written.lattice.values()) == {"exact"}
    stored = dict(read_weights(tmp_path, found))
    for name, lattice in found.lattice.items():
        np.testing.assert_array_equal(stored[name], lattice.dequantize())


def test_a_file_keeps_its_budget(stories, story_files, tmp_path):
    pytest.importorskip("llama_cpp")
    settings = {"to": "gguf", "quant": "q4_0", "calibrate": [story_files[0]], "method": "search", "verify": False}
    found = edgewright.export(stories, out=tmp_path / "fits", budget_mb=0.28, **settings)
    assert 0.26e6 < found.bytes <= 0.28e6
    assert {each.quant for each in found.fallbacks} == {"q8_0", "f16"}
    with pytest.raises(BadInput, match=r"(?s)even with 4 bits everywhere.*EW-553.*at least 0.24 MB.*0.2 MB"):
        edgewright.export(stories, out=tmp_path / "no", budget_mb=0.2, **settings)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "fits" not in path.parts]


@pytest.mark.parametrize(("to", "quant"), [("gguf", "q4_0"), ("gguf", "q8_0"), ("onnx", "int4")])
def test_importance_alone_is_refused_where_nothing_takes_it(to, quant, tiny_model, text, tmp_path):
    with pytest.raises(RecipeError, match=r"(?s)by imatrix cannot help.*EW-555.*gptq or search"):
        edgewright.export(
            tiny_model("llama"), to=to, quant=quant, out=tmp_path / "out", calibrate=[text], method="imatrix"
        )
    source = load_source(tiny_model("llama"))
    best = Calibrations(source, files=[text], method="imatrix", threads=1, say=print)
    assert best.of(to, quant, "f16") is source


@pytest.mark.parametrize(("to", "quant"), [("gguf", "tq2_0"), ("gguf", "f16"), ("genai", "ternary"), ("hf", "fp16")])
def test_widths_without_use_for_it_are_refused(to, quant, tiny_model, text, tmp_path):
    with pytest.raises(RecipeError, match=r"(?s)calibration cannot help.*EW-555.*ternary method"):
        edgewright.export(tiny_model("llama"), to=to, quant=quant, out=tmp_path / "out", calibrate=[text])
    assert not (tmp_path / "out").exists()
