"""How much text a stage of type `generate` will write at most: its prompts, at every temperature, to the last token.

How soon a teacher ends its documents is not known before it has written some, so these are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgewright.compress.generate_config import CorpusPromptsConfig, GenerateStageConfig, PromptFilesConfig

if TYPE_CHECKING:
    from edgewright.recipe import Recipe

LINE_BYTES = 80
"""Of a line of the written text, beside text and ids: keys, the prompt's name, the temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPlan:
    """What a generate stage will write, at most."""

    name: str
    texts: int
    """Continuations that are asked for."""
    prompt_tokens: float
    """Of a prompt, the start token included; the mean."""
    longest_prompt: int
    new_tokens: int
    """After each prompt."""
    bytes: int
    """Of the text, its ids and the packed tokens."""
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Of prompts and continuations together."""
        return round(self.texts * (self.prompt_tokens + self.new_tokens))

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "texts": self.texts,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "notes": list(self.notes),
        }


def plan_written(recipe: Recipe, stage: GenerateStageConfig, vocab_size: int) -> WrittenPlan:
    """Predict what a generate stage writes.

    Args:
        vocab_size: of the data's tokenizer.

    Raises:
        EdgewrightError: what reading the files of prompts and the tokenizer raise.
    """
    lengths, notes = _prompts(recipe, stage, vocab_size)
    each = sum(stage.samples if temperature > 0 else 1 for temperature in stage.temperatures)
    texts, mean = len(lengths) * each, sum(lengths) / max(1, len(lengths))
    return WrittenPlan(
        name=stage.name,
        texts=texts,
        prompt_tokens=mean,
        longest_prompt=max(lengths, default=1),
        new_tokens=stage.max_new_tokens,
        bytes=_bytes(texts, mean, stage.max_new_tokens, vocab_size),
        notes=(*notes, "at most: less where the teacher ends its documents sooner, or writes one twice"),
    )


def _prompts(recipe: Recipe, stage: GenerateStageConfig, vocab_size: int) -> tuple[list[int], list[str]]:
    """Tokens of every prompt, the start token included, and what there is to say of them."""
    from edgewright.compress.prompts import from_files, texts_of
    from edgewright.data import PretrainedTokenizer
    from edgewright.data.tokenizer import load_encoder
    from edgewright.planner.disk import bytes_per_token

    wanted, tokenizer = stage.prompts, recipe.data.tokenizer
    if isinstance(wanted, CorpusPromptsConfig):
        return [1 + wanted.tokens] * wanted.prompts, ["prompts of the text: at most one for each document"]
    if not isinstance(wanted, PromptFilesConfig):
        return [1] * wanted.documents, []
    if isinstance(tokenizer, PretrainedTokenizer):
        return [len(prompt.ids) for prompt in from_files(wanted, load_encoder(tokenizer.path))], []
    sizes: dict[str, int] = {}
    for name, piece in texts_of(wanted):
        sizes[name] = sizes.get(name, 0) + len(piece.encode())
    each = bytes_per_token(vocab_size)
    note = f"tokens of the prompts are guessed, at {each:.1f} bytes each: there is no tokenizer yet"
    return [1 + round(size / each) for size in sizes.values()], [note]


def _bytes(texts: int, prompt: float, new: int, vocab_size: int) -> int:
    """Pieces with ids; lines with text and ids; packed tokens."""
    from edgewright.planner.disk import bytes_per_token

    number = len(str(vocab_size - 1)) + 2  # digits and what separates two
    packed = 2 if vocab_size <= 2**16 else 4
    line = LINE_BYTES + (prompt + new) * (bytes_per_token(vocab_size) + number)
    return round(texts * (new * number + line + (prompt + new + 1) * packed))
