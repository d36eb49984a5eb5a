"""Whether two models speak of the same tokens: without that, distillation and drafting compare apples with pears."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.data.tokenizer import Encoder, load_encoder
from edgewright.errors import BadInput, RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgewright.export.runtimes.session import Session


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
    table, its = (_table(each.tokenizer) for each in (mine, other))
    found = first_other_token(table, its)
    if found is None:  # the data may use what the model does not have
        beyond = ((token, text) for token, text in enumerate(table[len(its) :], len(its)) if text is not None)
        found = next((OtherToken(token, text, None) for token, text in beyond), None)
    if found is not None:
        raise _different(ours, theirs, role, f"token {found.id}", found.target, found.draft)
    for what, left, right in (("end", mine.eos_id, other.eos_id), ("start", mine.start_id, other.start_id)):
        if left != right:
            raise _different(ours, theirs, role, f"the {what} token", table[left], its[right])
    return _notes(mine, other, theirs, role)


def _different(ours: Path, theirs: Path, role: str, what: str, left: str | None, right: str | None) -> RecipeError:
    return RecipeError(
        "EW-130",
        f"the {role} has another tokenizer than the data: {what} is not the same",
        where=theirs.absolute(),
        expected=f"{quoted(left)} as in {ours}",
        found=quoted(right),
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


def token_table(path: Path) -> list[str | None]:
    """The texts of a model's tokens by id, as its tokenizer spells them; None for ids without a token.

    GGUF files and tokenizer.json spell them alike, so tables of all targets can be compared.

    Args:
        path: a .gguf file, or a folder with a tokenizer.

    Raises:
        BadInput: EW-325, EW-328, a tokenizer that cannot be read; for a GGUF file what the guard refuses.
    """
    if path.suffix == ".gguf" and path.is_file():
        from edgewright.export.gguf.file import token_texts

        return token_texts(path)
    from edgewright.export.tokenizer_files import open_tokenizer

    return _table(open_tokenizer(path))


def _table(tokenizer: Tokenizer) -> list[str | None]:
    texts = tokenizer.get_vocab(with_added_tokens=True)
    table: list[str | None] = [None] * (1 + max(texts.values(), default=-1))
    for text, token in texts.items():
        table[token] = text
    return table


def check_draft(target: Session, draft: Session) -> list[str]:
    """Whether a draft speaks of the target's tokens: of the same text by the same id, and of the same start and end.

    Returns:
        Differences that do no harm, in words: ids that one of them has beyond the other's, or that only pad.

    Raises:
        RecipeError: EW-800 names the first token that differs, and both texts.
    """
    notes = check_draft_table(token_table(target.path), token_table(draft.path), draft.path)
    if target.start_id != draft.start_id:
        raise _other_tokens(draft.path, "the token that starts a text", target.start_id, draft.start_id)
    if target.eos_ids != draft.eos_ids:
        if target.eos_ids and not target.eos_ids & draft.eos_ids:
            ends = (sorted(target.eos_ids), sorted(draft.eos_ids))
            raise _other_tokens(draft.path, "the token that ends a text", *ends)
        notes.append("draft and target do not end texts with all the same tokens; the target's count")
    if target.vocab_size != draft.vocab_size:
        notes.append(f"logits of {target.vocab_size:,} tokens in the target, of {draft.vocab_size:,} in the draft")
    return notes


def check_draft_table(target: Sequence[str | None], draft: Sequence[str | None], where: Path) -> list[str]:
    """Compare two tables of tokens (`token_table`); `where` is the draft. Result and errors as `check_draft`."""
    other = first_other_token(target, draft)
    if other is not None:
        raise _other_tokens(where, f"token {other.id}", quoted(other.target), quoted(other.draft))
    return tokens_beyond(target, draft)


@dataclass(frozen=True, slots=True)
class OtherToken:
    """An id behind which two models, the second of them a draft or a teacher, have other texts; None is no token."""

    id: int
    target: str | None
    draft: str | None


def first_other_token(target: Sequence[str | None], draft: Sequence[str | None]) -> OtherToken | None:
    """The first such id, of two tables of tokens; where one of them ends, the other may go on."""
    both = zip(_without_padding(target), _without_padding(draft), strict=False)
    return next((OtherToken(token, ours, theirs) for token, (ours, theirs) in enumerate(both) if ours != theirs), None)


def tokens_beyond(target: Sequence[str | None], draft: Sequence[str | None]) -> list[str]:
    """In words, what one of two tables has beyond the end of the other."""
    ours, theirs = (len(_without_padding(table)) for table in (target, draft))
    if theirs > ours:
        return [f"the draft has {theirs - ours:,} tokens beyond the target's, which it can only propose in vain"]
    if ours > theirs:
        return [f"the target has {ours - theirs:,} tokens beyond the draft's, which it can neither propose nor read"]
    return []


def _without_padding(table: Sequence[str | None]) -> Sequence[str | None]:
    """A table up to its last token."""
    length = len(table)
    while length and table[length - 1] is None:
        length -= 1
    return table[:length]


def quoted(text: str | None) -> str:
    """A token's text for a message."""
    return "no token" if text is None else ascii(text)


def _other_tokens(where: Path, what: str, ours: object, theirs: object) -> RecipeError:
    return RecipeError(
        "EW-800",
        f"the draft has another vocabulary than the target: {what} is not the same",
        where=where.absolute(),
        expected=f"{ours}, as in the target",
        found=theirs,
        fix="take a draft that was trained with the target's own tokenizer",
    )
