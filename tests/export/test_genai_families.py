"""GenAI folders of every family: the graph that its row of the table says, certified, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from families import FAMILIES, WINDOW

import edgewright
from edgewright.errors import BadInput
from edgewright.export import to_genai
from edgewright.export.genai.config import genai_config
from edgewright.export.genai.reader import read_weights
from edgewright.export.onnx.decoder import describe
from edgewright.export.onnx.packing import POSITIONS
from edgewright.export.onnx.reader import attributes
from edgewright.export.source import load_source

pytest.importorskip("onnxruntime_genai")

Models = Callable[[str], Path]

TRACED = ("bitnet", "gpt2", "opt")
REFUSED = {"phi3-longrope": "EW-547"}
WRITTEN = tuple(family for family in FAMILIES if family not in (*TRACED, *REFUSED))
FAST = ("phi", "gpt2")
"""A family of each kind, the written one being the one that differs most from the others."""


def nodes(folder: Path, kind: str) -> list[dict[str, object]]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return [attributes(node) for node in model.graph.node if node.op_type == kind]


def test_every_family_has_its_place(tiny_model: Models) -> None:
    for family in FAMILIES:
        assert (describe(load_source(tiny_model(family))) is not None) == (family in WRITTEN), family


@pytest.mark.parametrize(
    "family",
    [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in (*WRITTEN, *TRACED) if name not in FAST)],
)
def test_every_family_is_certified(family: str, tiny_model: Models, tmp_path: Path) -> None:
    """In fp32 to 1e-4, nothing lost; and in a width of few bits, which the model's own width does not hide: smollm3's
    four random layers lose more in 4 bits than the gate allows."""
    model, narrow = tiny_model(family), "int8" if family == "smollm3" else "int4"
    for quant in ("fp32", narrow):
        made = edgewright.export(model, to="genai", out=tmp_path / quant, quant=quant, threads=1)
        assert made.gate == "passed"
        assert {each.reason for each in made.fallbacks} <= {POSITIONS}
        assert bool(nodes(made.path, "GroupQueryAttention")) == (family in WRITTEN)
        if quant == "fp32":
            assert made.parity is not None and made.parity["max_abs_diff"] < 1e-4
    source = load_source(model)
    assert set(source.names) <= {name for name, _ in read_weights(tmp_path / narrow, source)}, "biases and norms too"


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_certified_is_refused_by_name(family: str, tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"\[{REFUSED[family]}\]"):
        edgewright.export(tiny_model(family), to="genai", out=tmp_path / "out", quant="int4")
    assert not list(tmp_path.iterdir())


def test_a_window_is_in_the_graph_and_the_cache_whole(tiny_model: Models, tmp_path: Path) -> None:
    """The gate's texts are longer than it."""
    made = edgewright.export(tiny_model("mistral-window"), to="genai", out=tmp_path / "out", quant="fp32", threads=1)
    assert [layer["local_window_size"] for layer in nodes(made.path, "GroupQueryAttention")] == [WINDOW, WINDOW]
    assert "sliding_window" not in json.loads((made.path / "genai_config.json").read_text())["model"]["decoder"]


def test_special_tokens_are_ids_of_the_vocabulary(tiny_model: Models, tmp_path: Path) -> None:
    """None twice; and a checkpoint without an end comes with a note."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    given = {"bos_token_id": 1000, "eos_token_id": [3, 3, -1, 4], "pad_token_id": -1, "repetition_penalty": 1.3}
    (model / "generation_config.json").write_text(json.dumps(given))
    written = to_genai.write(load_source(model), tmp_path / "out", quant="fp32")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [0, 3, 4]  # the tokenizer's, which ends a turn, comes first
    assert (config["model"]["bos_token_id"], config["model"]["pad_token_id"]) == (3, 3)
    assert config["search"]["repetition_penalty"] == 1.3
    assert not any("EOS" in note for note in written.notes)

    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": -1}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    written = to_genai.write(load_source(model), tmp_path / "again", quant="fp32")
    assert [note for note in written.notes if "no EOS token" in note and "token 0" in note]


def test_a_batch_is_padded_on_the_right(tiny_model: Models, tmp_path: Path) -> None:
    """As the note says, and as the runtime's tokenizer pads: a short text goes on as it does alone."""
    import onnxruntime_genai as og

    written = to_genai.write(load_source(tiny_model("llama")), tmp_path / "out", quant="fp32")
    assert to_genai.RIGHT_PADDING in written.notes
    model = og.Model(str(tmp_path / "out"))

    def last_of(rows: list[list[int]]) -> list[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=60, batch_size=len(rows))
        generator, found = og.Generator(model, params), []
        generator.append_tokens(np.array(rows, np.int32))
        for _ in range(6):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[-1]))
        return found

    long, short = list(range(20, 40)), list(range(60, 72))
    assert last_of([long, [*short, *[0] * 8]]) == last_of([short])
    assert last_of([long, [*[0] * 8, *short]]) != last_of([short]), "the note is out of date"
    padded = og.Tokenizer(model).encode_batch(["def", "def add(a, b): return"]).as_numpy()
    assert padded[0, 0] != 0 and padded[0, -1] == 0


def test_a_family_that_the_runtime_knows_by_another_name(tiny_model: Models, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("mistral-window"), model)
    config = json.loads((model / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (model / "config.json").write_text(json.dumps(config))
    made = edgewright.export(model, to="genai", out=tmp_path / "out", quant="fp32", threads=1)
    assert made.gate == "passed" and made.parity is not None and made.parity["max_abs_diff"] < 1e-4
    assert [layer["local_window_size"] for layer in nodes(made.path, "GroupQueryAttention")] == [-1, WINDOW]


def test_caches_of_several_shapes_are_refused(tiny_model: Models) -> None:
    sizes = {"past_key_values.0.key": 16, "past_key_values.0.value": 32}
    inputs = [onnx.helper.make_tensor_value_info(name, 1, ["b", 4, "p", size]) for name, size in sizes.items()]
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([], "g", inputs, [])))
    with pytest.raises(BadInput, match=r"\[EW-546\]") as caught:
        genai_config(load_source(tiny_model("gpt2")), model)
    assert caught.value.found == "4 heads of 16, 4 heads of 32"


def test_a_traced_folder_says_what_the_runtime_must_know(tiny_model: Models, tmp_path: Path) -> None:
    source = load_source(tiny_model("gpt2"))
    to_genai.write(source, tmp_path / "out", quant="int8")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["context_length"], model["vocab_size"]) == (128, source.config["vocab_size"])
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 0, 0)
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert (decoder["num_key_value_heads"], decoder["head_size"], decoder["num_hidden_layers"]) == (4, 16, 2)
    assert config["search"]["past_present_share_buffer"] is False


def test_a_traced_folder_opens_in_the_runtime_as_it_is(tiny_model: Models, tmp_path: Path) -> None:
    """Through the vendor's package alone: its tokenizer, its loop."""
    import onnxruntime_genai as og

    source = load_source(tiny_model("gpt2"))
    to_genai.write(source, tmp_path / "out", quant="fp32")
    model = og.Model(str(tmp_path / "out"))
    tokens = og.Tokenizer(model).encode("def add(a, b):")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + 12)
    generator = og.Generator(model, params)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    with edgewright.open_session(tmp_path / "out", threads=1) as session:
        assert not session.capabilities.left_padding and session.capabilities.rewind
        prompt = [int(token) for token in tokens]
        assert session.tokenize("def add(a, b):") == prompt
        found = session.native_generate(prompt, 12, stop_at_eos=False)
    generated = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    assert generated == found[: len(generated)] and len(generated) >= 1
