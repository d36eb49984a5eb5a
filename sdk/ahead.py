"""What `check` works out for stages with teachers before a run would: the room in a context, what a cache can keep, and
the data of one."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.derived import source_of
from edgewright.student import CheckpointStudentConfig, StageStudentConfig

if TYPE_CHECKING:
    from edgewright.compress.cache_config import CacheStageConfig
    from edgewright.compress.cache_format import Layout
    from edgewright.compress.generate_config import GenerateStageConfig
    from edgewright.data.tokenizer import Encoder
    from edgewright.recipe import Recipe

MOST_TEXT = 16 * 2**20
"""Bytes of a corpus that is tokenized to see whether a cache is of it: seconds."""


def check_context(
    recipe: Recipe, stage: GenerateStageConfig, *, encoder: Encoder | None, sound: Collection[Path] | None = None
) -> None:
    """Refuse prompts that leave no room in a teacher's context for what is to follow them.

    Args:
        encoder: the data's, where it is there.
        sound: model directories that can be opened; None: all.

    Raises:
        BadInput: EW-612; EW-2xx, a file of prompts cannot be read.
    """
    from edgewright.compress.prompts import check_room, known_prompts

    contexts = [context_of(recipe, teacher, sound) for teacher in stage.teachers]
    known = [context for context in contexts if context is not None]
    if known:
        check_room(stage, known_prompts(stage, encoder), min(known))


def context_of(
    recipe: Recipe, model: CheckpointStudentConfig | StageStudentConfig, sound: Collection[Path] | None
) -> int | None:
    """Tokens that a model can read: a directory, or what a stage leaves; None where that cannot be opened."""
    from edgewright.export.architecture import open_config

    if isinstance(model, CheckpointStudentConfig):
        known = sound is None or model.model in sound
        return int(open_config(model.model).get_text_config().max_position_embeddings) if known else None
    stage = recipe.stage(model.stage)
    assert stage is not None, "the recipe was checked"
    source = source_of(stage.student)
    return recipe.data.sequence_length if source is None else context_of(recipe, source, sound)


def check_kept(
    recipe: Recipe, stage: CacheStageConfig, vocab_size: int | None, *, sound: Collection[Path] | None = None
) -> Layout | None:
    """Refuse to keep more tokens than the teachers have.

    Args:
        vocab_size: of the data's tokenizer, as far as it is known.
        sound: as of `check_context`.

    Returns:
        How they will be laid out; None where no teacher's vocabulary is known.

    Raises:
        RecipeError: EW-795.
    """
    from edgewright.compress.cache_stage import layout_of

    sizes = [vocabulary_ahead(recipe, teacher, vocab_size, sound) for teacher in stage.teachers]
    known = [size for size in sizes if size is not None]
    return layout_of(stage, min(known)) if known else None


def vocabulary_ahead(
    recipe: Recipe,
    model: CheckpointStudentConfig | StageStudentConfig,
    vocab_size: int | None,
    sound: Collection[Path] | None,
) -> int | None:
    """Rows of a model's output head: of a directory, or of what a stage leaves; None where that is not known."""
    from edgewright.compress.teacher_notes import vocabulary_of

    if isinstance(model, CheckpointStudentConfig):
        return vocabulary_of(model.model) if sound is None or model.model in sound else None
    stage = recipe.stage(model.stage)
    assert stage is not None, "the recipe was checked"
    source = source_of(stage.student)
    return vocab_size if source is None else vocabulary_ahead(recipe, source, vocab_size, sound)


def known_key(recipe: Recipe) -> dict[str, Any]:
    """The `CacheKey` of a recipe's data, as much of it as seconds tell.

    Where the corpus is not prepared yet and not large, it is prepared in a temporary folder; of a large one only the
    tokens are left out, and of one that is to train its tokenizer that as well.

    Raises:
        BadInput: EW-2xx, what preparing the corpus raises.
    """
    from edgewright.compress.cache import tokenizer_hash, tokens_hash
    from edgewright.data import PretrainedTokenizer, prepare_data
    from edgewright.data.prepare import prepared_index, pretrained_hashes

    data = recipe.data
    key: dict[str, Any] = {
        "sequence_length": data.sequence_length,
        "restart_at_documents": data.restart_at_documents,
    }
    index = prepared_index(data, recipe.run_directory / "data")
    if index is not None:
        hashes = {name: entry["sha256"] for name, entry in index["files"].items()}
    else:
        with tempfile.TemporaryDirectory(prefix="edgewright-") as folder:
            if _bytes(recipe) <= MOST_TEXT:
                hashes = prepare_data(data, Path(folder), say=lambda line: None).hashes
            elif isinstance(data.tokenizer, PretrainedTokenizer):
                return key | {"tokenizer": tokenizer_hash(pretrained_hashes(data, data.tokenizer, Path(folder)))}
            else:
                return key
    return key | {"tokens": tokens_hash(hashes), "tokenizer": tokenizer_hash(hashes)}


def _bytes(recipe: Recipe) -> float:
    """Of the corpus; without end where the files do not tell."""
    size = recipe.data.text_bytes()
    return float("inf") if size is None else size
