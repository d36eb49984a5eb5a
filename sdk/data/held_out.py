"""What is held out, as an evaluation of exported files reads it: texts, or examples of which only completions count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgewright.evaluate import Evaluation
    from edgewright.export.runtimes.session import Session


class HeldOut(ABC):
    """Something to evaluate on."""

    @abstractmethod
    def evaluate(self, session: Session, *, max_tokens: int, window: int, seed: int | None) -> Evaluation:
        """How well an open session predicts it; as `evaluate.evaluate_session`."""


@dataclass(frozen=True, slots=True)
class HeldOutTexts(HeldOut):
    """Running text: every token counts, by the session's own tokenizer."""

    texts: list[str]

    def evaluate(self, session: Session, *, max_tokens: int, window: int, seed: int | None) -> Evaluation:
        from edgewright.evaluate import evaluate_session

        documents = ((session.tokenize(text), len(text.encode())) for text in self.texts)
        return evaluate_session(session, documents, max_tokens=max_tokens, window=window, seed=seed)


@dataclass(frozen=True, slots=True)
class HeldOutExamples(HeldOut):
    """Examples: the very tokens that training would count."""

    examples: list[tuple[list[int], list[bool]]]
    bytes_per_token: float
    """Of those that count."""

    def evaluate(self, session: Session, *, max_tokens: int, window: int, seed: int | None) -> Evaluation:
        from edgewright.evaluate import evaluate_examples

        return evaluate_examples(
            session,
            self.examples,
            bytes_per_token=self.bytes_per_token,
            max_tokens=max_tokens,
            window=window,
            seed=seed,
        )
