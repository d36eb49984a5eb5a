"""Whether two models speak of the same tokens: without that, distillation and drafting compare apples with pears."""

from __future__ import annotations

import json
from pathlib import Path

from edgewright.data.tokenizer import Encoder, load_encoder
from edgewright.errors import BadInput, RecipeError


def check_same_tokens(ours: Path, theirs: Path, *, role: str) -> list[str]:
    """Compare two tokenizers id by id.

    Args:
        ours: directory of the tokenizer that makes the training data.
        theirs: directory of the model that gets those ids.
        role: what the model is, for the message: "teacher of stage student".

    Returns:
        Differences that do no harm, in words: ids that only pad the vocabulary, other merges.

    Raises:
        RecipeError: EW-130 names the first id with different tokens, and both tokens.
        BadInput: EW-220, EW-221, one of them cannot be read.
    """
    if ours.resolve() == theirs.resolve():
        return []
    mine, other = load_encoder(ours), load_encoder(theirs)
    names = (_by_id(mine), _by_id(other))
    for token in sorted(names[0].keys() | names[1].keys()):
        left, right = (each.get(token) for each in names)
        if left != right and not (left is None and token >= mine.vocab_size):
            raise _different(ours, theirs, role, f"token {token}", left, right)
    for what, left_id, right_id in (("end", mine.eos_id, other.eos_id), ("start", mine.start_id, other.start_id)):
        if left_id != right_id:
            raise _different(ours, theirs, role, f"the {what} token", names[0][left_id], names[1].get(right_id))
    return _notes(mine, other, theirs, role)


def _by_id(encoder: Encoder) -> dict[int, str]:
    vocabulary = encoder.tokenizer.get_vocab(with_added_tokens=True)
    return {token: text for text, token in vocabulary.items()}


def _different(ours: Path, theirs: Path, role: str, what: str, left: str | None, right: str | None) -> RecipeError:
    return RecipeError(
        "EW-130",
        f"the {role} has another tokenizer than the data: {what} is not the same",
        where=theirs.absolute(),
        expected=f"{left!r} as in {ours}",
        found=repr(right) if right is not None else "no such token",
        fix=f"give the data the model's tokenizer: data.tokenizer={{type: pretrained, path: {theirs}}}",
    )


def _notes(mine: Encoder, other: Encoder, theirs: Path, role: str) -> list[str]:
    notes = []
    if other.vocab_size > mine.vocab_size:
        notes.append(f"{role}: {other.vocab_size - mine.vocab_size} further tokens, which the data never use")
    rows = json.loads((theirs / "config.json").read_text(encoding="utf-8")).get("vocab_size", other.vocab_size)
    if rows > other.vocab_size:
        notes.append(f"{role}: {rows - other.vocab_size} rows of the embedding only pad the vocabulary")
    parts = [json.loads(encoder.tokenizer.to_str()) for encoder in (mine, other)]
    for part in ("pre_tokenizer", "normalizer"):
        if parts[0].get(part) != parts[1].get(part):
            notes.append(f"{role}: the same tokens, but another {part}: it would cut some texts in other places")
    if parts[0]["model"].get("merges") != parts[1]["model"].get("merges"):
        notes.append(f"{role}: the same tokens, but other merges: it would cut some texts in other places")
    return notes


def check_rows(student: int, teacher: int, tokens: int, *, role: str, where: Path) -> list[str]:
    """Compare the rows of two output heads whose tokens are the same: a vocabulary may be padded to a rounder number.

    Args:
        student: rows of the student's head; teacher: of the teacher's.
        tokens: that the tokenizer has.
        role: of the teacher, for the message.
        where: the teacher's directory.

    Returns:
        What is left out of the comparison, in words.

    Raises:
        BadInput: EW-702, the teacher lacks tokens.
    """
    if teacher < tokens:
        raise BadInput(
            "EW-702",
            f"the {role} has fewer rows in its head than the tokenizer has tokens",
            where=where,
            expected=f"at least {tokens:,} rows",
            found=f"{teacher:,}: the first token without one is {teacher}",
            fix="give the data the teacher's tokenizer: data.tokenizer = {type: pretrained, path: TEACHER}",
        )
    if student == teacher:
        return []
    wider, more = ("student", student - teacher) if student > teacher else ("teacher", teacher - student)
    return [f"{role}: {more:,} rows that only pad the {wider}'s vocabulary are left out of the comparison"]
