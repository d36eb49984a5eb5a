"""Sessions of bundles: a target whose own loop drafts with the model beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgewright.export.runtimes.session import Capabilities, Logits, Session


class PairSession(Session):
    """A target and its draft in one runtime.

    It is the target in every respect; `native_generate` takes the draft, unless another one is given, and `drafted`
    says what became of its tokens.

    Args:
        path: the bundle.
        target, draft: sessions of its parts; they are closed with this one.
        gamma: tokens that the draft proposes in a round.
    """

    def __init__(self, path: Path, target: Session, draft: Session, gamma: int) -> None:
        self.path = path
        self.target, self.draft, self.gamma = target, draft, gamma
        self.runtime = target.runtime
        self.vocab_size = target.vocab_size
        self.context_length = target.context_length
        self.start_id, self.eos_ids = target.start_id, target.eos_ids

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        return self.target.capabilities

    @property
    def length(self) -> int:
        return self.target.length

    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        return self.target.append(tokens, logits)

    def rewind(self, length: int) -> None:
        self.target.rewind(length)

    def batch_logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return self.target.batch_logits(texts)

    def native_generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        draft: Session | None = None,
        gamma: int | None = None,
    ) -> list[int]:
        found = self.target.native_generate(
            tokens,
            max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_at_eos=stop_at_eos,
            draft=self.draft if draft is None else draft,
            gamma=gamma or self.gamma,
        )
        self.drafted = self.target.drafted
        return found

    def tokenize(self, text: str) -> list[int]:
        return self.target.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self.target.detokenize(tokens)

    def close(self) -> None:
        self.target.close()
        self.draft.close()
