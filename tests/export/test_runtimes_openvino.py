"""Sessions in OpenVINO: what the runtime computes, by itself and in LLMPipeline."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino_genai")

from openvino_help import TOLERANCE, Write, check_weights, rows_of, tokens_of, torch_greedy, torch_logits

from edgewright.errors import BadInput
from edgewright.export import to_openvino
from edgewright.export.onnx.packing import POSITIONS
from edgewright.export.openvino.package import load
from edgewright.export.runtimes.openvino import OpenVinoSession
from edgewright.export.runtimes.torch_session import TorchSession
from edgewright.export.source import Source, load_source


@pytest.fixture(scope="module")
def ternary(ternary_model: Path) -> Source:
    return load_source(ternary_model)


@pytest.fixture(scope="module")
def session(openvino_fp32: Path) -> Iterator[OpenVinoSession]:
    with OpenVinoSession(openvino_fp32, threads=1) as opened:
        assert isinstance(opened, OpenVinoSession)
        yield opened


class _Stack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[int | None, int, int]:
    found = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.address, found.flags, found.size


@pytest.mark.skipif(sys.platform != "linux", reason="the vendor's stack is Linux's")
def test_the_thread_keeps_its_signal_stack(openvino_fp32: Path, openvino_ternary: Path, ternary: Source) -> None:
    """Else a later SIGTERM is handled on three pages of the vendor's, which may be gone: a segmentation fault."""
    before, prompt = signal_stack(), tokens_of(ternary, 12)
    with OpenVinoSession(openvino_fp32, threads=1) as opened, OpenVinoSession(openvino_ternary, threads=1) as draft:
        opened.append(prompt)
        assert signal_stack() == before
        opened.native_generate(prompt, 4)
        opened.native_generate(prompt, 4, draft=draft)
        assert signal_stack() == before
    gc.collect()
    assert signal_stack() == before


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


def test_the_pipeline_takes_a_draft(session: OpenVinoSession, openvino_ternary: Path, ternary: Source) -> None:
    prompt = tokens_of(ternary, 12)
    expected = session.native_generate(prompt, 16, stop_at_eos=False)
    with OpenVinoSession(openvino_ternary, threads=1) as draft:
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


def test_ternary_is_exact_when_activations_are_left_alone(ternary: Source, openvino_ternary: Path) -> None:
    tokens = tokens_of(ternary)
    right = torch_logits(ternary.directory, tokens)
    with OpenVinoSession(openvino_ternary, threads=1, exact=True) as opened:
        assert np.abs(rows_of(opened, tokens) - right).max() < TOLERANCE
        prompt = tokens[:12]
        assert opened.native_generate(prompt, 24, stop_at_eos=False) == torch_greedy(ternary.directory, prompt, 24)
    with OpenVinoSession(openvino_ternary, threads=1) as opened:
        difference = np.abs(rows_of(opened, tokens) - right).max()
        assert 10 * TOLERANCE < difference < 0.1


@pytest.mark.parametrize("quant", ["ternary", "fp32"])
def test_paged_attention_takes_the_graph(
    quant: str, ternary: Source, openvino_ternary: Path, openvino_fp32: Path
) -> None:
    """The pipeline's own choice, which it leaves for a slower one without a word when it does not know the graph."""
    genai = load("openvino_genai")
    folder = {"ternary": openvino_ternary, "fp32": openvino_fp32}[quant]
    settings = {"EXECUTION_MODE_HINT": "ACCURACY", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
    pipeline = genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="PA", **settings)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = 24, True
    prompt = tokens_of(ternary, 12)
    found = pipeline.generate(load().Tensor(np.array([prompt], np.int64)), config).tokens[0]
    assert list(found) == torch_greedy(ternary.directory, prompt, 24)


@pytest.mark.parametrize("quant", ["ternary", "fp32"])
def test_a_plain_pipeline_runs_the_folder_as_it_is(
    quant: str, ternary: Source, openvino_ternary: Path, openvino_fp32: Path
) -> None:
    """No settings at all: bfloat16 where the processor has it, where u2 with rounded activations would crash."""
    genai = load("openvino_genai")
    pipeline = genai.LLMPipeline(str({"ternary": openvino_ternary, "fp32": openvino_fp32}[quant]), "CPU")
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = 16, True
    prompt = load().Tensor(np.array([tokens_of(ternary, 12)], np.int64))
    assert len(pipeline.generate(prompt, config).tokens[0]) == 16
    assert isinstance(pipeline.generate("def add(a, b):", config), str)


def test_the_defaults_of_the_runtime_measured_apart(ternary: Source, openvino_ternary: Path) -> None:
    """What the model itself says to the plugin: no rounded activations beside u2, and a cache in half precision."""
    core = load().Core()
    compiled = core.compile_model(core.read_model(openvino_ternary / "openvino_model.xml"), "CPU")
    assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 0
    assert compiled.get_property("KV_CACHE_PRECISION").get_type_name() == "f16"


def test_stories_tells_its_story(stories: Path, write_openvino: Write, tmp_path: Path) -> None:
    """A trained model with rows of 64 and 172 weights, in all widths."""
    source = load_source(stories)
    expected = (stories / "expected_greedy.txt").read_text().strip()
    for quant, limit in {"fp32": TOLERANCE, "int8": 1.0, "int4": 10.0, "ternary": 1.0}.items():
        written = write_openvino(source, tmp_path / quant, quant=quant)
        check_weights(tmp_path / quant, source, written)
        with OpenVinoSession(tmp_path / quant, threads=1) as opened:
            if quant == "fp32":
                story = opened.native_generate([1], 260, stop_at_eos=False)
                assert opened.detokenize(story).strip().startswith(expected)
                tokens = [1, *story[:200]]
                right = torch_logits(stories, tokens)
            assert np.abs(rows_of(opened, tokens) - right).max() < limit


@pytest.mark.parametrize("family", ["gpt2", "opt", "mistral-window"])
def test_families(family: str, tiny_model: Callable[[str], Path], write_openvino: Write, tmp_path: Path) -> None:
    check_family(tiny_model(family), write_openvino, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "llama-linear", "llama-llama3", "llama-yarn", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi",
        "phi3", "phi3-window", "smollm3",
    ],
)  # fmt: skip
def test_all_families(family: str, tiny_model: Callable[[str], Path], write_openvino: Write, tmp_path: Path) -> None:
    check_family(tiny_model(family), write_openvino, tmp_path)


def check_family(model: Path, write_openvino: Write, tmp_path: Path) -> None:
    """fp32 is the model, in prefill, cached decoding and in the pipeline; int8 is near it."""
    source = load_source(model)
    tokens = tokens_of(source, 60)
    right = torch_logits(model, tokens)
    written = write_openvino(source, tmp_path / "fp32", quant="fp32")
    check_weights(tmp_path / "fp32", source, written)
    with OpenVinoSession(tmp_path / "fp32", threads=1) as opened:
        assert np.abs(rows_of(opened, tokens) - right).max() < TOLERANCE
        opened.rewind(40)
        for index in range(40, 60):
            row = opened.append([tokens[index]])
            assert row is not None and np.abs(row[0] - right[index]).max() < TOLERANCE
        expected = torch_greedy(model, tokens[:30], 24)
        assert opened.native_generate(tokens[:30], 24, stop_at_eos=False) == expected
    written = write_openvino(source, tmp_path / "int8", quant="int8")
    assert {each.reason for each in written.fallbacks} <= {POSITIONS}
    check_weights(tmp_path / "int8", source, written)
    with OpenVinoSession(tmp_path / "int8", threads=1, exact=True) as opened:
        assert np.abs(rows_of(opened, tokens) - right).max() < 0.05 * np.abs(right).max()


# ---------------------------------------------------------------- tokenizers and refusals


def test_the_tokenizer_model_is_the_tokenizer(session: OpenVinoSession, ternary: Source) -> None:
    """Text as a whole, special tokens in it, and what it gives back."""
    text = "def add(a, b):\n    return a + b  <|end|>"
    tokens = session.tokenize(text)
    assert 0 not in tokens and session.detokenize(tokens) == text and session.tokenize("") == []
    model = load("openvino_genai").Tokenizer(str(session.path))
    plain = "naïve café, Привет, 你好 🙂\n\n  x = 1"
    assert model.encode(plain, add_special_tokens=False).input_ids.data[0].tolist() == session.tokenize(plain)
    assert model.decode(session.tokenize(plain)) == plain


def test_another_tokenizer_model_is_noticed(openvino_ternary: Path, stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(openvino_ternary, folder)
    (tmp_path / "other").mkdir()
    to_openvino._write_tokenizer(load(), load_source(stories), tmp_path / "other")
    for end in ("xml", "bin"):
        shutil.copy(tmp_path / "other" / f"openvino_tokenizer.{end}", folder)
    with OpenVinoSession(folder, threads=1) as opened, pytest.raises(BadInput, match=r"\[EW-617\]"):
        opened.tokenize("hello")


def test_a_model_without_a_state_is_refused(openvino_ternary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(openvino_ternary, folder)
    ov = load()
    ids = ov.opset13.parameter(ov.PartialShape([-1, -1]), np.int64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    ov.save_model(ov.Model([ov.opset13.result(ids)], [ids], "plain"), folder / "openvino_model.xml")
    with pytest.raises(BadInput, match=r"input_ids.*\[EW-618\]|\[EW-618\]"):
        OpenVinoSession(folder, threads=1)
