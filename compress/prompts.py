"""The prompts that a teacher continues: from files, from the training text, or none at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgewright.compress.generate_config import (
    CorpusPromptsConfig,
    GenerateStageConfig,
    NoPromptsConfig,
    PromptFilesConfig,
)
from edgewright.errors import BadInput

if TYPE_CHECKING:
    from edgewright.data import Corpus
    from edgewright.data.tokenizer import Encoder
    from edgewright.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a continuation begins with."""

    name: str
    """Where it comes from."""
    ids: list[int]
    """The start token first."""


def read_prompts(stage: GenerateStageConfig, recipe: Recipe, corpus: Corpus, encoder: Encoder) -> list[Prompt]:
    """The prompts of a stage, in a fixed order.

    Raises:
        BadInput: EW-606, there is none; EW-2xx, a file of prompts cannot be read.
    """
    wanted = stage.prompts
    if isinstance(wanted, NoPromptsConfig):
        prompts = [Prompt(f"none#{number}", [encoder.start_id]) for number in range(wanted.documents)]
    elif isinstance(wanted, CorpusPromptsConfig):
        prompts = list(from_corpus(wanted, corpus))
    else:
        prompts = list(from_files(wanted, encoder))
    if not prompts:
        raise no_prompt(stage)
    return prompts


def no_prompt(stage: GenerateStageConfig) -> BadInput:
    """EW-606."""
    files = isinstance(stage.prompts, PromptFilesConfig)
    return BadInput(
        "EW-606",
        "there is no prompt to continue",
        where=f"stages.{stage.name}.prompts",
        expected="text that is not blank" if files else "longer documents",
        found="none",
        fix="give other files" if files else "lower prompts.tokens",
    )


def check_prompts(stage: GenerateStageConfig) -> None:
    """Whether files of prompts have one, which is known without the corpus.

    Raises:
        BadInput: EW-606, there is none; EW-2xx, a file cannot be read.
    """
    if isinstance(stage.prompts, PromptFilesConfig) and next(texts_of(stage.prompts), None) is None:
        raise no_prompt(stage)


def known_prompts(stage: GenerateStageConfig, encoder: Encoder | None) -> Iterator[Prompt]:
    """Prompts as long as those of the stage, as far as that is known without the corpus.

    Args:
        encoder: the data's; None where it is not there yet, and prompts from files count as one token.
    """
    wanted = stage.prompts
    if isinstance(wanted, PromptFilesConfig) and encoder is not None:
        yield from from_files(wanted, encoder)
    else:
        length = wanted.tokens if isinstance(wanted, CorpusPromptsConfig) else 0
        yield Prompt(f"stages.{stage.name}.prompts", [0] * (1 + length))


def check_room(stage: GenerateStageConfig, prompts: Iterable[Prompt], context: int) -> None:
    """Refuse prompts that leave no room for what is to follow them.

    Args:
        context: tokens that all the teachers can read.

    Raises:
        BadInput: EW-612, with the longest.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if len(longest.ids) + stage.max_new_tokens > context:
        raise BadInput(
            "EW-612",
            "a prompt and what is to follow it do not fit into the teacher's context",
            where=longest.name,
            expected=f"at most {context} tokens together",
            found=f"{len(longest.ids)} of the prompt + {stage.max_new_tokens} new",
            fix="shorten the prompt or lower max_new_tokens",
        )


def texts_of(wanted: PromptFilesConfig) -> Iterator[tuple[str, str]]:
    """The documents of the files, long ones in pieces, each with its name."""
    from edgewright.data import FilesData, iterate_documents

    class PromptFiles(FilesData):
        """The same patterns under another key."""

        key: ClassVar[str] = "prompts.files"

    return iterate_documents(PromptFiles(files=wanted.files, text_key=wanted.text_key, separator=wanted.separator))


def from_files(wanted: PromptFilesConfig, encoder: Encoder) -> Iterator[Prompt]:
    """Every text of the files once; those that came before and blank ones are left out, as in any corpus."""
    texts: dict[str, str] = {}
    for name, piece in texts_of(wanted):
        texts[name] = texts.get(name, "") + piece
    for (name, _), ids in zip(texts.items(), encoder.encode(list(texts.values())), strict=True):
        yield Prompt(name, [encoder.start_id, *ids.tolist()])


def from_corpus(wanted: CorpusPromptsConfig, corpus: Corpus) -> Iterator[Prompt]:
    """The first tokens of training documents, spread evenly over those that are long enough."""
    tokens = corpus.train.tokens
    starts = np.flatnonzero(tokens == corpus.start_id)
    ends = np.append(starts[1:], len(tokens))
    long = starts[ends - starts > wanted.tokens]
    for number in np.unique(np.linspace(0, len(long) - 1, min(wanted.prompts, len(long))).astype(int)).tolist():
        start = int(long[number])
        ids = [int(token) for token in tokens[start : start + 1 + wanted.tokens]]
        if corpus.eos_id not in ids[1:]:
            yield Prompt(f"corpus@{start}", ids)
