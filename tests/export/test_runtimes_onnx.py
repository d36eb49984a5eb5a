"""Sessions in ONNX Runtime: the cache, batches, and the gate on a whole export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgewright.errors import BadInput
from edgewright.export.runtimes.onnx import OnnxSession
from edgewright.export.runtimes.opening import open_session
from edgewright.export.runtimes.torch_session import TorchSession
from edgewright.export.targets import export

TOKENS = [5, 90, 17, 201, 33, 8, 150, 64, 12, 77]


@pytest.fixture(scope="module")
def exported(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with sliding windows, through the gate."""
    artifact = export(
        tiny_model("mistral-window"), to="onnx", quant="fp32", out=tmp_path_factory.mktemp("onnx") / "out", threads=1
    )
    assert artifact.gate == "passed"
    assert artifact.parity is not None
    assert artifact.parity["greedy_identity"] and "left-padded batch" in artifact.parity["kl_by_way"]
    return artifact.path


@pytest.fixture
def session(exported: Path) -> Iterator[OnnxSession]:
    with OnnxSession(exported, threads=1) as opened:
        yield opened


@pytest.fixture
def torch_session(tiny_model: Callable[[str], Path]) -> Iterator[TorchSession]:
    with TorchSession(tiny_model("mistral-window"), threads=1) as opened:
        yield opened


def rows(session: OnnxSession | TorchSession, tokens: list[int]) -> np.ndarray:
    found = session.append(tokens, "all")
    assert found is not None
    return found


def test_a_folder_opens_by_its_marker(exported: Path) -> None:
    with open_session(exported, threads=1) as opened:
        assert opened.runtime == "onnx"
        assert opened.start_id == 1 and opened.eos_ids == {0}


def test_threads_stop_between_runs_only_where_they_are_in_the_way(exported: Path) -> None:
    entry = "session.force_spinning_stop"
    with open_session(exported, shares_cores=True) as shared, open_session(exported) as alone:
        assert isinstance(shared, OnnxSession) and isinstance(alone, OnnxSession)
        assert shared._session.get_session_options().get_session_config_entry(entry) == "1"
        with pytest.raises(RuntimeError):
            alone._session.get_session_options().get_session_config_entry(entry)


def test_logits_are_those_of_torch_in_one_piece_and_in_several(
    session: OnnxSession, torch_session: TorchSession
) -> None:
    text = TOKENS * 5  # longer than the window
    right = rows(torch_session, text)
    assert np.abs(rows(session, text) - right).max() < 1e-4
    session.rewind(0)
    pieces = [rows(session, text[:7]), rows(session, text[7:40]), *(rows(session, [token]) for token in text[40:])]
    assert np.abs(np.concatenate(pieces) - right).max() < 1e-4
    assert session.length == len(text)


def test_a_rewind_forgets(session: OnnxSession) -> None:
    first = rows(session, TOKENS)
    session.rewind(4)
    assert session.length == 4
    rows(session, [11, 12])
    session.rewind(4)
    assert np.allclose(rows(session, TOKENS[4:]), first[4:], atol=1e-5)
    session.rewind(0)
    assert np.allclose(rows(session, TOKENS), first, atol=1e-5)


def test_logits_asked_for(session: OnnxSession) -> None:
    assert session.append(TOKENS, "none") is None
    last = session.append(TOKENS, "last")
    assert last is not None and last.shape == (1, session.vocab_size)
    empty = session.append([], "all")
    assert empty is not None and empty.shape == (0, session.vocab_size)
    assert session.length == 2 * len(TOKENS)


def test_a_left_padded_batch_says_what_each_text_says_alone(session: OnnxSession) -> None:
    texts = [TOKENS, TOKENS[:3], TOKENS * 4, [7]]
    for text, found in zip(texts, session.batch_logits(texts), strict=True):
        session.rewind(0)
        assert np.allclose(found, rows(session, text), atol=1e-4)


def test_greedy_generation_is_that_of_torch(session: OnnxSession, torch_session: TorchSession) -> None:
    right = torch_session.native_generate(TOKENS, 20, stop_at_eos=False)
    assert session.native_generate(TOKENS, 20, stop_at_eos=False) == right


def test_sampling_is_repeatable_and_follows_the_distribution(session: OnnxSession) -> None:
    one = session.native_generate(TOKENS, 12, temperature=1.0, seed=4, stop_at_eos=False)
    assert session.native_generate(TOKENS, 12, temperature=1.0, seed=4, stop_at_eos=False) == one
    assert session.native_generate(TOKENS, 12, temperature=1.0, seed=5, stop_at_eos=False) != one
    greedy = session.native_generate(TOKENS, 12, stop_at_eos=False)
    assert session.native_generate(TOKENS, 12, temperature=1e-4, seed=4, stop_at_eos=False) == greedy
    session.rewind(0)
    last = session.append(TOKENS)
    assert last is not None
    chances = np.exp(last[0].astype(np.float64) - last[0].max())
    chances /= chances.sum()
    drawn = [session.native_generate(TOKENS, 1, temperature=1.0, seed=seed, stop_at_eos=False)[0] for seed in range(80)]
    likely = int(chances.argmax())
    expected = 80 * chances[likely]
    assert abs(drawn.count(likely) - expected) < 4 * np.sqrt(expected * (1 - chances[likely])) + 1


def test_generation_stops_before_the_end_of_text(session: OnnxSession) -> None:
    free = session.native_generate(TOKENS, 12, stop_at_eos=False)
    session.eos_ids = frozenset({free[5]})
    assert session.native_generate(TOKENS, 12) == free[: free.index(free[5])]


def test_text_beyond_the_context_is_refused(session: OnnxSession) -> None:
    with pytest.raises(BadInput, match="EW-602"):
        session.append([1] * (session.context_length + 1))
    assert session.length == 0
    with pytest.raises(BadInput, match="EW-602"):
        session.append([session.vocab_size])
    with pytest.raises(BadInput, match="EW-602"):
        session.batch_logits([[1], [1] * (session.context_length + 1)])
    with pytest.raises(BadInput, match="EW-606"):
        session.native_generate([], 3)


def test_no_draft_is_taken(session: OnnxSession) -> None:
    with pytest.raises(BadInput, match="EW-605"):
        session.native_generate(TOKENS, 2, draft=session)
