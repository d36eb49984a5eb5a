"""The tokenizer of a model directory, whichever files it is kept in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import BadInput
from edgewright.export.clean_settings import clean_tokenizer_config
from edgewright.export.guard import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 256 * 2**20
SETTINGS = "tokenizer_config.json"
BESIDE = ("special_tokens_map.json", "chat_template.jinja")
"""What may lie beside tokenizer.json and its settings."""
VOCABULARY = ("vocab.json", "merges.txt")
"""What older byte-level tokenizers are kept in."""


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checked model directory; special tokens in a text are plain text to it.

    Raises:
        BadInput: EW-325, its files cannot be read; EW-328, they are of a kind that is not read.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_str(_converted(directory))
    except BadInput:
        raise
    except Exception as error:  # the library raises Exception itself
        raise _unreadable(path, error) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """tokenizer.json, or what it would be if the tokenizer had been saved so; errors as `open_tokenizer`."""
    path = directory / "tokenizer.json"
    if path.exists():
        return read_json(path, limit=MAX_TOKENIZER_BYTES)
    content: dict[str, Any] = json.loads(_converted(directory))
    return content


def write_tokenizer(source: Path, directory: Path) -> None:
    """Put the tokenizer of a model directory into another: tokenizer.json, its settings, and what `BESIDE` names
    if it is there.

    tokenizer.json is the same bytes where there is one; else it is made from the older files.
    """
    if (source / "tokenizer.json").exists():
        shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
    else:
        (directory / "tokenizer.json").write_text(_converted(source), encoding="utf-8")
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if (source / SETTINGS).is_file():
        settings = clean_tokenizer_config(read_json(source / SETTINGS))
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (directory / SETTINGS).write_text(text, encoding="utf-8")


def _converted(directory: Path) -> str:
    """The text of a tokenizer.json, made by transformers from vocab.json and merges.txt.

    Raises:
        BadInput: EW-325, EW-328.
    """
    from transformers import AutoTokenizer

    if not all((directory / name).is_file() for name in VOCABULARY):
        raise BadInput(
            "EW-328",
            "the tokenizer of this model is of a kind that is not read",
            where=directory.absolute(),
            expected="tokenizer.json, or vocab.json with merges.txt",
            found=", ".join(sorted(path.name for path in directory.glob("*token*"))),
            fix="where sentencepiece is installed: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # each tokenizer class fails its own way
        raise _unreadable(directory / VOCABULARY[0], error) from error
    return text


def _unreadable(path: Path, error: Exception) -> BadInput:
    return BadInput(
        "EW-325",
        "the tokenizer of this model cannot be read",
        where=path.absolute(),
        expected="a tokenizer.json of the library tokenizers, or a vocab.json with its merges.txt",
        found=str(error)[:200],
        fix="save the tokenizer again with save_pretrained",
    )
