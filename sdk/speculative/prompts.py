"""The prompts that a pair is measured on: one set a file, so that chat, code and stories are not thrown together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput

HELD_OUT = "held-out code"
"""The set that is taken where no file is given: beginnings of the held-out part of Python's standard library."""
BEGINNING = 256
"""Characters of each of those."""
ALL = "all"
"""What all sets together are called, and so none of them."""
_COMPRESSED = frozenset({".gz", ".xz", ".zst"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue."""

    set: str
    """The file that it is from: see `_set_names`."""
    where: str
    """File and line, for messages."""
    text: str


def read_prompts(patterns: Sequence[str | Path], *, limit: int | None = None) -> list[Prompt]:
    """The prompts of files.

    A .txt file holds a prompt a line, as stages of type `generate` read it, or, with `<|endoftext|>` between them, such
    of several lines. A .jsonl file holds one a line: `prompt`, `text`, `question` or `instruction`, the first of
    `turns`, or the first of `messages` that a user wrote. They are taken as they are: chat templates are not applied.
    Both kinds may be compressed (.gz, .xz, .zst). Blank prompts are left out.

    Args:
        patterns: files or patterns.
        limit: the first so many of each file.

    Raises:
        BadInput: EW-203 to EW-208, a file that is not there or cannot be read; EW-806, a file without a prompt; EW-807,
            a line that is none.
    """
    from edgewright.data.files import find

    prompts: list[Prompt] = []
    files = find(tuple(map(str, patterns)))
    for (name, path), set_name in zip(files, _set_names(files), strict=True):
        lines = _plain(path).suffix.lower() == ".jsonl"
        texts = _texts_of_lines(path) if lines else _texts(path, name)
        kept = ((where, text) for where, text in texts if text.strip())
        found = [Prompt(set_name, where, _whole(where, text)) for where, text in islice(kept, limit)]
        if not found:
            raise BadInput(
                "EW-806",
                "there is no prompt in this file",
                where=path.absolute(),
                expected="text that is not blank",
                fix="give other files",
            )
        prompts += found
    return prompts


def evenly(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most so many prompts, in turn the next of each set, so that a long one leaves room for all others."""
    sets = [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.set)]
    turns = (each for turn in zip_longest(*sets) for each in turn if each is not None)
    return list(islice(turns, most))


def held_out_prompts(limit: int) -> list[Prompt]:
    """Beginnings of the held-out part of the interpreter's standard library."""
    from edgewright.data import StdlibData, TrainTokenizer, iterate_documents

    documents = iterate_documents(StdlibData(type="stdlib", tokenizer=TrainTokenizer()), split="held_out")
    first = (next(pieces) for _, pieces in groupby(documents, key=lambda pair: pair[0]))
    return [Prompt(HELD_OUT, name, text[:BEGINNING]) for name, text in islice(first, limit)]


def _set_names(files: Sequence[tuple[str, Path]]) -> list[str]:
    """A name for each file: the one below its pattern without suffixes; with them, or the whole path, where two files
    would share it, or where it is that of all sets together."""
    ways = (
        [_plain(Path(name)).with_suffix("").as_posix() for name, _ in files],
        [name for name, _ in files],
        [str(path) for _, path in files],
    )
    return next(names for names in ways if len({*names, ALL}) == len(names) + 1)


def _plain(path: Path) -> Path:
    """A file's name without what compression added."""
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path


def _whole(where: str, text: str) -> str:
    """A text as it is, refused where bytes or escapes of it were no Unicode: no tokenizer takes it."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _unreadable(where, "bytes that are no UTF-8, or half of a surrogate pair")
    return text


def _texts(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Place and text of each prompt of a text file."""
    from edgewright.data.reading import TextFormat, read_file

    found = []
    for document in read_file(path, name, TextFormat()):
        where = f"{path.absolute()}:{document.line}"
        if document.fault is not None:
            raise _unreadable(where, document.fault)
        found.append((where, "".join(document.chunks)))
    if len(found) > 1:
        yield from found
    else:
        lines = (line.rstrip("\n") for _, text in found for line in StringIO(text, newline=None))
        yield from ((f"{path.absolute()}:{number}", line) for number, line in enumerate(lines, 1))


def _texts_of_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and prompt of each line of a .jsonl file."""
    from edgewright.data.reading import read_records

    for number, record, fault in read_records(path):
        where = f"{path.absolute()}:{number}"
        if record is None:
            raise _unreadable(where, fault)
        key = next((key for key in READERS if key in record), None)
        if key is None:
            raise _unreadable(where, f"the keys {', '.join(map(str, record)) or 'none'}")
        text = READERS[key](record[key])
        if text is None:
            raise _unreadable(where, f"{key!r} without a text")
        yield where, text


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _first(value: Any) -> str | None:
    return _text(value[0]) if isinstance(value, list) and value else _text(value)


def _first_of_user(value: Any) -> str | None:
    messages = value if isinstance(value, list) else []
    spoken = (each.get("content") for each in messages if isinstance(each, dict) and each.get("role") == "user")
    return _text(next(spoken, None))


READERS: dict[str, Callable[[Any], str | None]] = {
    "prompt": _text,
    "turns": _first,
    "messages": _first_of_user,
    "question": _text,
    "instruction": _text,
    "text": _text,
}
"""How the prompt is taken out of a line, by the key that it has; the first of them counts."""


def _unreadable(where: str, found: str) -> BadInput:
    return BadInput(
        "EW-807",
        "there is no prompt here",
        where=where,
        expected=f"UTF-8 text; in a line of JSON an object with one of {', '.join(READERS)}",
        found=found,
        fix="mend or remove it",
    )
