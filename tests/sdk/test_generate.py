"""Generate: the text is exactly what the model added, and nothing is cut in silence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import edgewright.export.runtimes
from edgewright.errors import BadInput, RecipeError
from edgewright.generate import generate

FAKE = Path(__file__).parent


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the sessions that are opened, instead of a runtime."""
    monkeypatch.syspath_prepend(str(FAKE))
    import fake_session

    monkeypatch.setattr(edgewright.export.runtimes, "open_session", fake_session.CountingSession, raising=False)
    return fake_session.CountingSession


def test_text_is_what_was_added(fake: Any) -> None:
    result = generate("model", "abc", max_new_tokens=4)
    assert (result.prompt, result.text, result.tokens) == ("abc", "defg", (3, 4, 5, 6))
    assert (result.prompt_tokens, result.stopped, result.runtime) == (4, "length", "fake")
    assert json.loads(json.dumps(result.to_json()))["text"] == "defg"


def test_an_empty_prompt_is_the_start_token(fake: Any) -> None:
    assert generate("model", "", max_new_tokens=2).text == "bc"


def test_the_end_token_ends_it(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "eos_ids", frozenset({5}))
    result = generate("model", "abc", max_new_tokens=50)
    assert (result.text, result.stopped) == ("de", "end")


def test_a_space_that_the_tokenizer_drops_is_kept(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece decoders drop the first space of whatever they decode."""
    monkeypatch.setattr(fake, "detokenize", lambda self, tokens: " ".join("abcdefghij"[t % 10] for t in tokens))
    assert generate("model", "ab", max_new_tokens=2).text == " c d"


def test_too_much_for_the_context_is_refused(fake: Any) -> None:
    with pytest.raises(BadInput, match="EW-612"):
        generate("model", "abc", max_new_tokens=97)
    assert len(generate("model", "abc", max_new_tokens=96).tokens) == 96


def test_nonsense_is_refused() -> None:
    with pytest.raises(RecipeError, match="EW-191"):
        generate("model", "abc", max_new_tokens=0)
    with pytest.raises(RecipeError, match="EW-191"):
        generate("model", "abc", temperature=-1.0)


def test_the_module_is_the_function() -> None:
    assert callable(sys.modules["edgewright.generate"])
