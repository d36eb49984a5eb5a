"""Continue a prompt with any model: a checkpoint or an exported file, in its own runtime."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright._verbs import VerbModule
from edgewright.errors import BadInput, RecipeError

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A prompt and what the model wrote after it.

    Args:
        path: the model, as it was given.
        runtime: what ran it: `torch`, `llamacpp`, `genai`.
        prompt: as it was given.
        text: what the model added, nothing stripped; `prompt + text` is the whole.
        tokens: ids of the new tokens, without the end token.
        prompt_tokens: tokens that the prompt took, the start token included.
        stopped: `end` when the model wrote its end token, `length` when `max_new_tokens` was reached.
    """

    path: Path
    runtime: str
    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: str

    def to_json(self) -> dict[str, object]:
        return {
            "schema_version": 1,
            "path": str(self.path),
            "runtime": self.runtime,
            "prompt": self.prompt,
            "text": self.text,
            "tokens": list(self.tokens),
            "prompt_tokens": self.prompt_tokens,
            "stopped": self.stopped,
        }


def generate(
    target: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
) -> Generation:
    """Let the model at `target` continue `prompt`, in the runtime's own generation loop.

    Args:
        target: GGUF file, GenAI folder or Hugging Face directory.
        prompt: plain text; special tokens in it are not parsed.
        max_new_tokens: at most this many; fewer when the model writes its end token.
        temperature: 0 = greedy.
        seed: of the sampling; without effect when greedy.
        threads: threads of the runtime; None = the runtime's choice.

    Raises:
        RecipeError: EW-191 for a number that makes no sense.
        BadInput: EW-612 when prompt and new tokens do not fit into the model's context (nothing is ever cut silently),
            and whatever opening the model raises.
    """
    if max_new_tokens < 1:
        raise RecipeError("EW-191", "max_new_tokens must be positive", expected="at least 1", found=max_new_tokens)
    if not 0 <= temperature < float("inf"):
        raise RecipeError("EW-191", "the temperature makes no sense", expected="0 (greedy) or more", found=temperature)
    from edgewright.export.runtimes import open_session

    with open_session(Path(target), threads=threads) as session:
        context = [session.start_id, *session.tokenize(prompt)]
        _refuse_too_long(session, len(context), max_new_tokens)
        tokens = session.native_generate(context, max_new_tokens, temperature=temperature, seed=seed)
        return Generation(
            path=Path(target),
            runtime=session.runtime,
            prompt=prompt,
            text=_added_text(session, context[1:], tokens),
            tokens=tuple(tokens),
            prompt_tokens=len(context),
            stopped="end" if len(tokens) < max_new_tokens else "length",
        )


def _refuse_too_long(session: Session, prompt_tokens: int, max_new_tokens: int) -> None:
    if prompt_tokens + max_new_tokens > session.context_length:
        raise BadInput(
            "EW-612",
            "prompt and new tokens do not fit into the model's context",
            where=session.path.name,
            expected=f"at most {session.context_length} tokens together",
            found=f"{prompt_tokens} of the prompt + {max_new_tokens} new",
            fix="shorten the prompt or lower max_new_tokens",
        )


def _added_text(session: Session, prompt: list[int], new: list[int]) -> str:
    """The text that the new tokens added to the prompt's.

    Decoded together with the prompt: some tokenizers drop the space before the first token of what they decode.
    """
    before = session.detokenize(prompt)
    whole = session.detokenize([*prompt, *new])
    return whole.removeprefix(before) if whole.startswith(before) else session.detokenize(new)


sys.modules[__name__].__class__ = VerbModule
