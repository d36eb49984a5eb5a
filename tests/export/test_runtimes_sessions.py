"""One contract for every runtime: what a Session promises, in torch and in llama.cpp."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.errors import BadInput, EdgewrightError, Unsafe
from edgewright.export.runtimes import Session, open_session
from edgewright.export.source import load_source
from edgewright.export.to_gguf import write

TOKENS = [5, 17, 200, 33, 280, 9, 9, 77]


@pytest.fixture(scope="module")
def gguf_file(ternary_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(load_source(ternary_model), path, quant="f32")
    return path


@pytest.fixture(scope="module", params=["torch", "llamacpp"])
def opened(request: pytest.FixtureRequest, ternary_model: Path, gguf_file: Path) -> Iterator[Session]:
    with open_session({"torch": ternary_model, "llamacpp": gguf_file}[request.param], threads=1) as session:
        assert session.runtime == request.param
        yield session


@pytest.fixture
def session(opened: Session) -> Session:
    opened.rewind(0)
    return opened


def rows(session: Session, tokens: list[int]) -> np.ndarray:
    found = session.append(tokens, "all")
    assert found is not None
    return found


def test_all_last_and_none(session):
    whole = rows(session, TOKENS)
    assert (whole.shape, whole.dtype) == ((len(TOKENS), session.vocab_size), np.float32)
    session.rewind(0)
    last = session.append(TOKENS)
    assert np.allclose(last, whole[-1:], atol=1e-4)
    session.rewind(0)
    assert session.append(TOKENS, "none") is None
    assert session.length == len(TOKENS)
    for logits in ("all", "last"):
        nothing = session.append([], logits)
        assert nothing is not None and nothing.shape == (0, session.vocab_size)


def test_logits_are_the_callers_own(session):
    first = rows(session, TOKENS)
    kept = first.copy()
    rows(session, TOKENS)
    assert np.array_equal(first, kept)


def test_decoding_continues_the_text(session):
    whole = rows(session, TOKENS)
    session.rewind(0)
    singly = np.concatenate([rows(session, [token]) for token in TOKENS])
    assert np.abs(whole - singly).max() < 1e-4
    assert not np.allclose(whole[5], whole[6])  # the same token in two places: the cache matters


def test_rewind_forgets(session):
    whole = rows(session, TOKENS)
    session.rewind(3)
    assert session.length == 3
    rows(session, [100, 101])
    session.rewind(3)
    assert np.abs(rows(session, TOKENS[3:]) - whole[3:]).max() < 1e-4


def test_texts_longer_than_a_batch(session):
    tokens = [int(token) for token in np.random.default_rng(0).integers(1, 280, 1100)]
    whole = rows(session, tokens)
    session.rewind(0)
    session.append(tokens[:1099], "none")
    assert np.abs(session.append(tokens[1099:]) - whole[-1:]).max() < 1e-3


def test_a_full_context_is_refused_and_nothing_is_lost(session):
    rows(session, TOKENS)
    with pytest.raises(BadInput, match=r"EW-602"):
        session.append([1] * session.context_length)
    assert session.length == len(TOKENS)
    with pytest.raises(BadInput, match="EW-602"):
        session.append([session.vocab_size])
    with pytest.raises(BadInput, match="EW-602"):
        session.native_generate(TOKENS, session.context_length)
    with pytest.raises(BadInput, match="EW-606"):
        session.native_generate([], 4)


def test_the_native_loop_is_greedy(session):
    new = session.native_generate(TOKENS, 12, stop_at_eos=False)
    session.rewind(0)
    row = rows(session, TOKENS)[-1]
    expected = []
    for _ in range(12):
        expected.append(int(row.argmax()))
        row = rows(session, expected[-1:])[0]
    assert new == expected


def test_sampling_is_seeded(session):
    one, same, other = (
        session.native_generate(TOKENS, 24, temperature=1.0, seed=seed, stop_at_eos=False) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_generation_ends_at_the_end_of_text(opened, monkeypatch):
    new = opened.native_generate(TOKENS, 12, stop_at_eos=False)
    end = new[4]
    monkeypatch.setattr(opened, "eos_ids", frozenset({end}))
    assert opened.native_generate(TOKENS, 12) == new[: new.index(end)]


def test_text_is_plain(session):
    text = "def add(a, b):\n    return a + b  <|end|>"
    tokens = session.tokenize(text)
    assert session.start_id not in tokens
    assert session.detokenize(tokens) == text
    assert session.detokenize([session.start_id, *tokens]) == text
    assert session.tokenize("") == []
    assert session.detokenize([]) == ""


def test_identity(session):
    assert (session.start_id, session.eos_ids) == (0, frozenset({0}))
    assert session.context_length == 2048
    assert session.capabilities.fp32_compute
    assert session.memory() > 10_000_000


def test_closed_is_closed(gguf_file, ternary_model):
    for path in (gguf_file, ternary_model):
        session = open_session(path, threads=1)
        session.close()
        session.close()
        with pytest.raises(ValueError, match="closed"):
            session.append([1])


def test_both_runtimes_compute_the_same(gguf_file, ternary_model):
    with open_session(gguf_file, threads=1) as one, open_session(ternary_model, threads=1) as other:
        assert np.abs(rows(one, TOKENS) - rows(other, TOKENS)).max() < 1e-4


def test_quantized_files_round_activations(ternary_model, tmp_path):
    write(load_source(ternary_model), tmp_path / "m.gguf", quant="tq2_0")
    with open_session(tmp_path, threads=1) as session:
        assert not session.capabilities.fp32_compute


# ---------------------------------------------------------------- opening


def test_what_is_no_model_is_named(tmp_path, gguf_file):
    (tmp_path / "text.txt").write_text("hello")
    empty, two = tmp_path / "empty", tmp_path / "two"
    empty.mkdir()
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf_file, two / name)
    for path, said in (
        (tmp_path / "text.txt", "not a model"),
        (tmp_path / "absent", "no such model"),
        (empty, "holds no model"),
        (two, "several models"),
    ):
        with pytest.raises(BadInput, match=r"EW-601") as error:
            open_session(path)
        assert said in str(error.value)
    with open_session(two / "a.gguf", threads=1) as session:
        assert session.path.name == "a.gguf"


def test_staged_files_are_not_seen(tmp_path, gguf_file):
    for name in ("a.gguf", ".b.123.staged.gguf"):
        shutil.copy(gguf_file, tmp_path / name)
    with open_session(tmp_path, threads=1) as session:
        assert session.path.name == "a.gguf"


def test_a_missing_runtime_comes_with_the_line_that_installs_it(gguf_file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="EW-603") as error:
        open_session(gguf_file)
    assert "pip install 'edgewright[llamacpp]'" in str(error.value)


def test_damaged_files_are_refused_before_the_runtime_sees_them(gguf_file, ternary_model, tmp_path):
    whole = gguf_file.read_bytes()
    for name, data in (("short.gguf", whole[:5000]), ("other.gguf", b"GGML" + whole[4:]), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match="EW-318"):
            open_session(tmp_path / name)
    model = tmp_path / "model"
    shutil.copytree(ternary_model, model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(EdgewrightError, match="EW-317"):
        open_session(model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(Unsafe):
        open_session(model)


def test_missing_weights_are_not_made_up(ternary_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(ternary_model, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"EW-324") as error:
        open_session(model)
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)


def test_what_llama_cpp_cannot_open_is_quoted(ternary_model, tmp_path, monkeypatch):
    from edgewright.export import to_gguf

    right = to_gguf._targets

    def wrong(*arguments: Any) -> Any:
        return [(name.replace("ffn_gate", "ffn_wrong"), rows) for name, rows in right(*arguments)]

    monkeypatch.setattr(to_gguf, "_targets", wrong)
    write(load_source(ternary_model), tmp_path / "m.gguf", quant="f32")
    with pytest.raises(BadInput, match="EW-604") as error:
        open_session(tmp_path / "m.gguf")
    assert "ffn_gate" in str(error.value)
