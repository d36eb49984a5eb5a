"""A session in ONNX Runtime GenAI: cache, logits, its own loop, and text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgewright.errors import BadInput
from edgewright.export import to_genai
from edgewright.export.runtimes import genai
from edgewright.export.runtimes.genai import GenaiSession
from edgewright.export.source import load_source

TOKENS = [int(t) for t in np.random.default_rng(7).integers(2, 280, 48)]
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=["ternary", "awkward"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 folders: rotation inside the attention, and outside of it (with position ids)."""
    path = tmp_path_factory.mktemp("genai") / request.param
    source = load_source(request.getfixturevalue(f"{request.param}_model"))
    to_genai.write(source, path, quant="fp32")
    return path


@pytest.fixture
def session(folder: Path) -> Iterator[GenaiSession]:
    with GenaiSession(folder, threads=1) as opened:
        assert isinstance(opened, GenaiSession)
        yield opened


def logits_of(session: GenaiSession, tokens: list[int]) -> np.ndarray:
    logits = session.append(tokens, "all")
    assert logits is not None
    return logits


def test_every_way_to_append_gives_the_same_logits(session: GenaiSession) -> None:
    whole = logits_of(session, TOKENS)
    assert whole.shape == (48, session.vocab_size) and whole.dtype == np.float32
    assert session.length == 48
    session.rewind(0)
    chunks = np.concatenate([logits_of(session, TOKENS[:20]), logits_of(session, TOKENS[20:])])
    np.testing.assert_allclose(chunks, whole, atol=TOLERANCE)
    session.rewind(0)
    singles = [session.append([token], "last") for token in TOKENS]
    assert all(row is not None and row.shape == (1, session.vocab_size) for row in singles)
    np.testing.assert_allclose(np.concatenate(singles), whole, atol=TOLERANCE)  # type: ignore[arg-type]


def test_last_and_none(session: GenaiSession) -> None:
    whole = logits_of(session, TOKENS)
    session.rewind(0)
    assert session.append(TOKENS[:10], "none") is None
    last = session.append(TOKENS[10:], "last")
    assert last is not None and last.shape == (1, session.vocab_size)
    np.testing.assert_allclose(last, whole[-1:], atol=TOLERANCE)


def test_rewind_forgets(session: GenaiSession) -> None:
    whole = logits_of(session, TOKENS)
    session.rewind(10)
    logits_of(session, TOKENS[::-1])
    session.rewind(10)
    assert session.length == 10
    np.testing.assert_allclose(logits_of(session, TOKENS[10:]), whole[10:], atol=TOLERANCE)


def test_logits_are_the_callers_own(session: GenaiSession) -> None:
    first = logits_of(session, TOKENS[:5])
    kept = first.copy()
    logits_of(session, TOKENS[5:10])
    np.testing.assert_array_equal(first, kept)


def test_end_of_text_inside_a_text_is_a_token_like_others(session: GenaiSession) -> None:
    end = min(session.eos_ids)
    whole = logits_of(session, [*TOKENS[:5], end, *TOKENS[5:]])
    session.rewind(0)
    logits_of(session, [*TOKENS[:5], end])
    np.testing.assert_allclose(logits_of(session, TOKENS[5:]), whole[6:], atol=TOLERANCE)


def test_the_cache_grows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GenaiSession(folder, threads=1) as session:
        whole = logits_of(session, TOKENS)
    monkeypatch.setattr(genai, "_FIRST_CAPACITY", 8)
    with GenaiSession(folder, threads=1) as session:
        rows = [logits_of(session, TOKENS[start : start + 6]) for start in range(0, 48, 6)]
        np.testing.assert_allclose(np.concatenate(rows), whole, atol=TOLERANCE)


def test_what_has_no_room_is_refused_and_not_appended(session: GenaiSession) -> None:
    logits_of(session, TOKENS)
    with pytest.raises(BadInput, match=r"\[EW-602\]"):
        session.append([2] * session.context_length)
    with pytest.raises(BadInput, match=r"vocabulary.*\[EW-602\]"):
        session.append([session.vocab_size])
    assert session.length == 48
    session.rewind(0)
    room = session.context_length
    assert session.append([2] * room, "none") is None and session.length == room


def test_greedy_generation_is_the_argmax_loop(session: GenaiSession) -> None:
    found = session.native_generate(TOKENS, 30, stop_at_eos=False)
    assert len(found) == 30
    rows = logits_of(session, [*TOKENS, *found])[len(TOKENS) - 1 : -1]
    margin = rows.max(axis=1) - rows[np.arange(30), found]
    assert margin.max() <= TOLERANCE


def test_generation_stops_before_end_of_text_or_goes_on(folder: Path, tmp_path: Path) -> None:
    """The token that comes third is declared to be the end."""
    with GenaiSession(folder, threads=1) as session:
        found = session.native_generate(TOKENS, 12, stop_at_eos=False)
    end = next(token for token in found if token != found[0])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [end]
    (copy / "genai_config.json").write_text(json.dumps(config))
    with GenaiSession(copy, threads=1) as session:
        assert session.eos_ids == {end}
        assert session.native_generate(TOKENS, 12) == found[: found.index(end)]
        assert session.native_generate(TOKENS, 12, stop_at_eos=False) == found


def test_sampling_is_seeded_and_follows_the_temperature(session: GenaiSession) -> None:
    def draw(seed: int, temperature: float) -> list[int]:
        return session.native_generate(TOKENS, 20, temperature=temperature, seed=seed, stop_at_eos=False)

    assert draw(1, 1.0) == draw(1, 1.0)
    assert len({tuple(draw(seed, 1.0)) for seed in range(4)}) > 1
    greedy = session.native_generate(TOKENS, 20, stop_at_eos=False)
    assert draw(1, 1e-4) == greedy


def test_sampling_reaches_the_whole_vocabulary(session: GenaiSession) -> None:
    """Near-uniform logits at a high temperature: a hidden top-k or top-p cut would leave tokens out."""
    drawn = {session.native_generate(TOKENS[:3], 1, temperature=50.0, seed=s, stop_at_eos=False)[0] for s in range(200)}
    assert len(drawn) > 90


def test_generation_begins_with_an_empty_cache(session: GenaiSession) -> None:
    found = session.native_generate(TOKENS, 5, stop_at_eos=False)
    logits_of(session, TOKENS[::-1])
    assert session.native_generate(TOKENS, 5, stop_at_eos=False) == found
    assert session.length == 0
    with pytest.raises(BadInput, match=r"\[EW-602\]"):
        session.native_generate(TOKENS, session.context_length)


@pytest.mark.parametrize(
    "text",
    ["def add(a, b):", " leading", "tab\tnew\r\nline  ", "naïve 漢字 😀‍", "\x00 nul", "<|end|> is <|begin|> text", ""],
)
def test_text_goes_there_and_back(text: str, session: GenaiSession) -> None:
    tokens = session.tokenize(text)
    assert session.detokenize(tokens) == text
    assert not {0, *session.eos_ids} & set(tokens), "special tokens in a text are plain text"


def test_text_without_specials_is_what_the_runtime_tokenizes(session: GenaiSession) -> None:
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(session._model)
    for text in ("def add(a, b):\n    return a + b", "naïve 漢字 😀", "  two  spaces "):
        assert session.tokenize(text) == [int(token) for token in tokenizer.encode(text)]


def test_special_tokens_do_not_show(session: GenaiSession) -> None:
    assert session.detokenize([min(session.eos_ids), *session.tokenize("a")]) == "a"


def test_what_it_says_about_itself(session: GenaiSession, folder: Path) -> None:
    expected = {"ternary": (2048, 0), "awkward": (256, 1)}[folder.name]
    assert (session.context_length, session.start_id) == expected
    assert session.eos_ids == {0}
    assert session.capabilities.logits and session.capabilities.rewind and session.capabilities.fp32_compute
    assert session.memory() > 2**20
    session.close()
    session.close()


def test_packed_folders_do_not_claim_fp32(ternary_model: Path, tmp_path: Path) -> None:
    to_genai.write(load_source(ternary_model), tmp_path / "out", quant="ternary")
    with GenaiSession(tmp_path / "out", threads=1) as session:
        assert not session.capabilities.fp32_compute


def test_a_damaged_folder_is_told(folder: Path, tmp_path: Path) -> None:
    for name, content in (("model.onnx", b"garbage"), ("genai_config.json", b"{}"), ("genai_config.json", b"[")):
        broken = tmp_path / f"{name}{len(content)}"
        shutil.copytree(folder, broken)
        (broken / name).write_bytes(content)
        with pytest.raises(BadInput, match=r"\[EW-\d+\]"):
            GenaiSession(broken)
    broken = tmp_path / "truncated"
    shutil.copytree(folder, broken)
    (broken / "model.onnx.data").write_bytes(b"")
    with pytest.raises(BadInput, match=r"\[EW-604\]"):
        GenaiSession(broken)


def test_a_tokenizer_that_the_runtime_does_not_know_is_refused(stories, tmp_path):
    """The runtime's own tokenizer ignores a normalizer that lower-cases; its ids would be those of other text."""
    import edgewright

    model = tmp_path / "model"
    shutil.copytree(stories, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    steps = [{"type": "Lowercase"}, tokenizer["normalizer"]] if tokenizer.get("normalizer") else [{"type": "Lowercase"}]
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match="EW-619"):
        edgewright.export(model, to="genai", quant="int8", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_runtimes_tokenizer_leaves_out_is_said(stories, tmp_path):
    import edgewright

    made = edgewright.export(stories, to="genai", quant="int8", out=tmp_path / "out", verify=False)
    assert "adds no special tokens" in made.notes[0]


def test_a_config_that_names_a_narrower_type_than_the_weights_is_no_rounding(ternary_model, tmp_path):
    """The builder would round the weights to the type in config.json."""
    import edgewright

    model = tmp_path / "model"
    shutil.copytree(ternary_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    made = edgewright.export(model, to="genai", quant="ternary", out=tmp_path / "out")
    assert made.gate == "passed"
