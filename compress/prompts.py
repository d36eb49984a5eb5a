"""The prompts that a teacher continues: from files, from the training text, or none at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def texts_of(wanted: PromptFilesConfig) -> Iterator[tuple[str, str]]:
    """The documents of the files, long ones in pieces, each with its name."""
    from edgewright.data import FilesData, iterate_documents

    return iterate_documents(FilesData(files=wanted.files, text_key=wanted.text_key, separator=wanted.separator))


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
