"""The text that calibration measures a model on: files of the user, as token sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import BadInput
from edgewright.export.source import Source, open_tokenizer, special_ids
from edgewright.files import sha256_file

MAX_TOKENS = 65_536
"""Tokens used where nobody says otherwise."""

MIN_TOKENS = 4_096
"""Less says little about a model; a Hessian of so few tokens fits noise."""

LENGTH = 512
"""Tokens of a sequence, where the model's context is not shorter."""

READ = 8
"""So many times the tokens that are used are read at most; the sequences used are spread over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """Token sequences, and where they are from."""

    sequences: np.ndarray
    """int64 `[count, length]`: documents one after the other, each behind the start token."""
    files: tuple[str, ...]
    """sha256 of each file, in the order of their paths."""

    @property
    def tokens(self) -> int:
        """How many."""
        return self.sequences.size

    def described(self) -> dict[str, Any]:
        """For a manifest: no names, no paths."""
        return {"tokens": self.tokens, "files": list(self.files)}


def read_text(
    source: Source, files: Sequence[str | Path], *, max_tokens: int = MAX_TOKENS, seed: int = 0
) -> CalibrationText:
    """Tokenize calibration text.

    Args:
        source: the model; its own tokenizer splits the text.
        files: .txt, .md, .py or .jsonl (key `text`), each also compressed, or patterns of such.
        max_tokens: used at most; where there is more text, sequences are drawn from the first `READ` times as much.
        seed: of that draw.

    Raises:
        BadInput: EW-2xx, a file that cannot be read; EW-550, too little text.
    """
    paths = _found(files)
    length = min(LENGTH, int(source.config.get("max_position_embeddings") or LENGTH))
    wanted = max(max_tokens, length)
    stream: list[int] = []
    for tokens in _documents(source, files):
        stream += tokens
        if len(stream) >= READ * wanted:
            break
    if len(stream) < MIN_TOKENS:
        raise BadInput(
            "EW-550",
            "there is too little text to calibrate on",
            expected=f"at least {MIN_TOKENS:,} tokens; {MAX_TOKENS:,} are better",
            found=f"{len(stream):,} tokens",
            fix="name more files of the kind of text that the model is for",
        )
    count = len(stream) // length
    sequences = np.array(stream[: count * length], np.int64).reshape(count, length)
    drawn = np.random.default_rng(seed).permutation(count)[: max(1, max_tokens // length)]
    return CalibrationText(sequences=sequences[np.sort(drawn)], files=tuple(sha256_file(path) for path in paths))


def _found(files: Sequence[str | Path]) -> list[Path]:
    """The files, sorted; errors name --calibrate, not the recipe's key for training text."""
    from edgewright.data.files import find

    try:
        return [path for _, path in find(tuple(map(str, files)))]
    except BadInput as error:
        fix = None if error.fix is None else error.fix.replace("data.files", "--calibrate")
        raise BadInput(
            error.code,
            error.what.replace("data.files", "--calibrate"),
            where=error.where,
            expected=error.expected,
            found=error.found,
            fix=fix,
        ) from error


def _documents(source: Source, files: Sequence[str | Path]) -> Iterator[list[int]]:
    """The tokens of each document, or of each piece of a very long one, behind the start token."""
    from edgewright.data import iterate_documents

    tokenizer = open_tokenizer(source.directory)
    vocabulary = [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]
    special = [special_ids(source.config, source.tokenizer_config, kind, vocabulary) for kind in ("bos", "eos")]
    start: list[int] = next((ids[:1] for ids in special if ids), [])
    for _, text in iterate_documents([str(file) for file in files]):
        yield start + tokenizer.encode(text, add_special_tokens=False).ids
