"""What stages ask about the models that teach: which they are, what they speak, and which document broke one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import BadInput
from edgewright.files import sha256_file

if TYPE_CHECKING:
    from edgewright.compress.teacher_config import ModelTeacherConfig
    from edgewright.data import Batches, Corpus
    from edgewright.recipe import Recipe
    from edgewright.stage_work import StageWork


def check_speaks(teachers: Sequence[ModelTeacherConfig], work: StageWork, role: str) -> list[str]:
    """Notes on tokens that differ harmlessly; raises EW-130 as `vocabulary.check_same_tokens`."""
    from edgewright.vocabulary import check_same_tokens

    notes = []
    for teacher in teachers:
        notes += check_same_tokens(work.corpus.tokenizer_dir, teacher.directory(work.earlier), role=role)
    return notes


def models_identity(teachers: Sequence[ModelTeacherConfig], earlier: Mapping[str, Path]) -> list[dict[str, Any]]:
    """What decides what the models say: hashes of their files, and what their weights are held in."""
    return [{"model": model_hash(teacher.directory(earlier)), "weights": teacher.weights} for teacher in teachers]


def model_hash(directory: Path) -> str:
    """SHA-256 over a model's configuration and weights, wherever it lies."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def vocabulary_of(directory: Path) -> int:
    """Rows of a model's output head.

    Raises:
        BadInput, Unsafe: the directory is no model.
    """
    from edgewright.export.architecture import open_config
    from edgewright.export.guard import check_model_directory

    check_model_directory(directory)
    return int(open_config(directory).get_text_config().vocab_size)


def smallest_vocabulary(teachers: Sequence[ModelTeacherConfig], earlier: Mapping[str, Path]) -> int:
    """Of several models: what their mean is over."""
    return min(vocabulary_of(teacher.directory(earlier)) for teacher in teachers)


def not_finite(recipe: Recipe, corpus: Corpus, batches: Batches, sequence: int, position: int) -> BadInput:
    """EW-783: what a teacher says of a token of the training text is NaN or infinity."""
    number, token = batches.document_at(sequence, position)
    name = document_name(recipe, corpus, number)
    return BadInput(
        "EW-783",
        "what the teacher says is not finite",
        where=f"document {name}" if name else f"document {number:,} of the training text, its token {token:,}",
        expected="finite numbers for every token",
        found=f"NaN or infinity for token {position} of sequence {sequence} of the training text",
        fix="look at that text; hold the teacher in wider numbers (weights: fp32), or take another one",
    )


def document_name(recipe: Recipe, corpus: Corpus, number: int) -> str | None:
    """The name of a training document by its number, from 1; None where some were dropped after they had been read,
    as examples that are too long are: names and numbers do not go together then."""
    from edgewright.data import iterate_documents

    seen, last, found = 0, None, None
    for name, _ in iterate_documents(recipe.data, split="train", rule=corpus.split):
        seen += name != last
        last = name
        if seen == number and found is None:
            found = name
    return found if seen == corpus.train.documents else None
