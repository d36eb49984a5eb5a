"""Session: one model file opened in its own runtime, behind one interface.

Evaluate, verify, bench and generate are written once against it; a new runtime is one file in this folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from edgewright.errors import BadInput
from edgewright.machine import memory_in_use

if TYPE_CHECKING:
    from edgewright.speculative.counts import Counts

GAMMA = 4
"""Tokens that a draft proposes in a round, where nobody says otherwise."""

Logits = Literal["all", "last", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a runtime can do with this file."""

    logits: bool
    """`append` gives logits; else only `native_generate` works."""
    rewind: bool
    """The cache can be cut back to an earlier length."""
    fp32_compute: bool
    """The runtime neither rounds nor quantizes activations for this file: its logits are those of fp32."""
    left_padding: bool = False
    """`batch_logits` runs texts of different lengths together. Only plain ONNX does: GenAI's fused attention takes no
    positions and computes left-padded rows wrongly, so that a batch is not offered there."""


class Session(ABC):
    """A model with its key-value cache; a context manager. One thread at a time may use it."""

    runtime: str
    """`torch`, `llamacpp` or `genai`."""
    path: Path
    vocab_size: int
    """Width of the logits."""
    context_length: int
    """Tokens that the cache holds."""
    capabilities: Capabilities
    start_id: int
    """The token that starts a text: BOS, or EOS where there is no BOS."""
    eos_ids: frozenset[int]
    drafted: Counts | None = None
    """What was drafted and accepted in the last `native_generate` with a draft; None where there was none."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens in the cache."""

    @abstractmethod
    def append(self, tokens: Sequence[int], logits: Logits = "last") -> np.ndarray | None:
        """Run tokens through the model, behind those in the cache.

        Returns:
            float32 `[len(tokens), vocab]` for "all", `[1, vocab]` for "last" (no row without tokens), None for "none".
            The array is the caller's own. Row i is the prediction of the token after `tokens[i]`.

        Raises:
            BadInput: EW-602 when the cache has no room for them; nothing was appended then.
        """

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all tokens behind the first `length`; 0 empties the cache."""

    def batch_logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Run texts as one left-padded batch, apart from the cache; only where `capabilities.left_padding` says so.

        Returns:
            For each text float32 `[len(text), vocab]`, without the padding's rows.
        """
        raise NotImplementedError(f"{self.runtime} computes no left-padded batches")

    @abstractmethod
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
        """Generate with the runtime's own loop, from an empty cache.

        Args:
            tokens: the prompt, at least one token.
            max_new_tokens: at most so many tokens are generated.
            temperature: 0 is greedy.
            seed: of the sampler; greedy ignores it.
            stop_at_eos: end before the first end-of-text token, which is not returned.
            draft: a smaller model for speculative decoding, open in the same runtime, where that takes one.
            gamma: tokens that it proposes in a round; by default `GAMMA`, or what a bundle says. `drafted` then holds
                what became of them.

        Returns:
            The new tokens only.

        Raises:
            BadInput: EW-602, EW-606 of the prompt; EW-604, the draft is open in another runtime; EW-605, the runtime
                takes none.
        """

    def twin(self) -> Session | None:
        """The same file in a session of its own that rounds a little otherwise, to show how far that moves logits; None
        where `append` shows it, with more tokens at a time or fewer."""
        return None

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Tokens of plain text: special tokens in it are not parsed, no BOS is added."""

    @abstractmethod
    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens are left out, bytes that are no UTF-8 are replaced."""

    def memory(self) -> int:
        """Bytes resident in this process now."""
        return memory_in_use()

    @abstractmethod
    def close(self) -> None:
        """Give the model back; calling it twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def check_same_runtime(self, draft: Session) -> None:
        """Refuse a draft that this runtime's own loop cannot use.

        Raises:
            BadInput: EW-604.
        """
        if type(draft) is not type(self):
            raise BadInput(
                "EW-604",
                "this draft is open in another runtime",
                where=draft.path,
                expected=self.runtime,
                found=draft.runtime,
                fix="export both with --draft, or decode with any two files: edgewright speculate",
            )

    def check_generation(self, tokens: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that is empty, or that leaves no room for that many new tokens.

        Raises:
            BadInput: EW-602, EW-606.
        """
        if not tokens:
            raise BadInput(
                "EW-606",
                "there is nothing to generate from",
                where=self.path,
                expected="a prompt of at least one token",
                fix=f"start with the token {self.start_id}",
            )
        self.check_room(tokens, held=0, more=max_new_tokens - 1)

    def check_room(self, tokens: Sequence[int], *, held: int | None = None, more: int = 0) -> None:
        """Refuse tokens that the cache has no room for, or that the vocabulary does not have.

        Args:
            tokens: what comes next.
            held: tokens in the cache before them; by default what it holds now.
            more: tokens that will follow them.

        Raises:
            BadInput: EW-602.
        """
        total = (self.length if held is None else held) + len(tokens) + more
        if total > self.context_length:
            raise BadInput(
                "EW-602",
                "the text is longer than the model's context",
                where=self.path,
                expected=f"at most {self.context_length} tokens",
                found=f"{total} tokens",
                fix="shorten the prompt, or ask for fewer tokens",
            )
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise BadInput(
                    "EW-602",
                    "a token is not in the model's vocabulary",
                    where=self.path,
                    expected=f"ids from 0 to {self.vocab_size - 1}",
                    found=token,
                    fix="use the tokenizer that belongs to this model",
                )
