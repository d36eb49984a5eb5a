"""Sessions without a model, for tests of speculative decoding: the next token depends on the last one alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgewright.export.runtimes.session import Capabilities, Logits, Session


class MarkovSession(Session):
    """A first-order Markov chain, and a log of what was asked of it.

    Args:
        table: logits `[vocabulary, vocabulary]`; row i predicts what follows token i.
        context: tokens that the cache holds.
        ends: tokens that end a text.
    """

    runtime = "markov"
    path = Path("markov")
    capabilities = Capabilities(logits=True, rewind=True, fp32_compute=True)
    start_id = 0

    def __init__(
        self, table: np.ndarray, *, context: int = 512, ends: frozenset[int] = frozenset(), path: Path | None = None
    ) -> None:
        self.table = table.astype(np.float32)
        self.vocab_size = table.shape[1]
        self.context_length = context
        self.eos_ids = ends
        self.cache: list[int] = []
        self.appends: list[tuple[int, Logits]] = []
        """For every append, how many tokens, and which logits were asked for."""
        self.rewinds: list[int] = []
        self.path = path or Path("markov")

    @property
    def length(self) -> int:
        return len(self.cache)

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        self.check_room(tokens)
        self.appends.append((len(tokens), logits))
        self.cache.extend(tokens)
        if logits == "none":
            return None
        rows = self.table[list(tokens)]
        return rows if logits == "all" else rows[-1:]

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.rewinds.append(length)
        del self.cache[length:]

    def native_generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        draft: Session | None = None,
    ) -> list[int]:
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % self.vocab_size for letter in text]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)

    def close(self) -> None:
        pass


class ScriptedSession(MarkovSession):
    """Writes one text, whatever was appended: the likeliest token at a place is the script's."""

    def __init__(self, script: Sequence[int], vocabulary: int, *, ends: frozenset[int] = frozenset()) -> None:
        super().__init__(np.zeros((vocabulary, vocabulary)), ends=ends)
        self.script = list(script)

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        start = self.length
        rows = super().append(tokens, "all")
        assert rows is not None
        rows = np.zeros_like(rows)
        for place in range(len(tokens)):
            rows[place, self.script[min(start + place + 1, len(self.script) - 1)]] = 1
        return None if logits == "none" else rows if logits == "all" else rows[-1:]


def chain(vocabulary: int, seed: int, *, sharpness: float = 2.0) -> np.ndarray:
    """Random logits of a chain; sharper ones have a clearer winner."""
    return sharpness * np.random.default_rng(seed).standard_normal((vocabulary, vocabulary))
