"""A teacher that cuts text into other tokens than the data: it reads the same documents in its own.

Each document of a micro-batch is decoded, encoded again by the teacher's tokenizer, and run through the teacher. A
token of the student and one of the teacher belong together where both have read the same bytes; what both expect next
can then be compared by losses that do not ask for the names of tokens (`uld`). Where a row cuts a document, the teacher
reads the piece from its cut on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgewright.compress.targets import Aligned, TargetSource
from edgewright.data.tokenizer import Encoder, load_encoder
from edgewright.objective import ModelInputs

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.compress.teacher import OnlineTeacher

REPLACEMENT = "\ufffd"
"""What stands in a decoded text for bytes that are no character."""


@dataclass(frozen=True, slots=True)
class AlignedLogits:
    """Logits that a teacher's head makes of its hidden states, for the tokens that have a place among them."""

    hidden: Tensor
    """[M, H_teacher], in the teacher's order."""
    places: Tensor
    """[N] int64: of the student's token n among them, -1 where it has none."""
    head: Head
    dtype: torch.dtype

    def rows(self, window: slice) -> Aligned:
        places = self.places[window]
        present = places >= 0
        with torch.no_grad():
            found = self.head(self.hidden[places[present]].to(self.dtype))
            values = found.new_zeros(len(places), found.shape[-1])
            values[present] = found
        return Aligned(values, present)


class CrossTokenizerTeacher(TargetSource):
    """A model beside the student with a tokenizer of its own.

    Args:
        inner: the model.
        ours: directory of the tokenizer of the data.
        theirs: directory of the teacher's.

    Raises:
        BadInput: EW-220, EW-221, one of them cannot be read.
    """

    gives = Aligned

    def __init__(self, inner: OnlineTeacher, ours: Path, theirs: Path) -> None:
        self.inner = inner
        self.ours, self.theirs = load_encoder(ours), load_encoder(theirs)

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        self.inner.prepare(student, device)

    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> AlignedLogits:
        from edgewright.student import hidden_states, output_head

        model = self.inner.model()
        assert model is not None, "prepare() comes first"
        rows = inputs.input_ids.tolist()
        length, longest = inputs.input_ids.shape[1], model.config.get_text_config().max_position_embeddings
        pieces = [
            (row * length + first, *aligned(ids, self.ours, self.theirs))
            for row, tokens in enumerate(rows)
            for first, ids in documents(tokens, self.ours)
        ]
        width = min(longest, max(len(theirs) for _, theirs, _ in pieces))
        padded = torch.full((len(pieces), width), self.theirs.eos_id)  # on the right, where causal attention sees none
        places = torch.full((inputs.input_ids.numel(),), -1)
        for number, (first, theirs, partners) in enumerate(pieces):
            kept = theirs[:width]
            padded[number, : len(kept)] = torch.tensor(kept)
            for index, partner in enumerate(partners):
                if 0 <= partner < width:
                    places[first + index] = number * width + partner
        device = inputs.input_ids.device
        padded = padded.to(device)
        with torch.no_grad():
            hidden = hidden_states(
                model, ModelInputs(input_ids=padded, labels=padded, position_ids=None, attention_mask=None)
            )
        return AlignedLogits(hidden, places.to(device), output_head(model, dtype), dtype)


def documents(tokens: list[int], encoder: Encoder) -> Iterator[tuple[int, list[int]]]:
    """The documents of a row, each with where it begins: at a token that starts one, or at the row's first."""
    starts = [index for index, token in enumerate(tokens) if token == encoder.start_id or index == 0]
    for first, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield first, tokens[first:end]


def aligned(ids: list[int], ours: Encoder, theirs: Encoder) -> tuple[list[int], list[int]]:
    """A piece of a document in the teacher's tokens, and where each of ours has its place there.

    Args:
        ids: the piece, from its start token on if it has one.

    Returns:
        (the teacher's tokens, its start token first; for each of `ids` the index of the one after which the teacher has
        read the same bytes, -1 where there is none).
    """
    begun = bool(ids) and ids[0] == ours.start_id
    body = ids[1:] if begun else ids
    ended = bool(body) and body[-1] == ours.eos_id
    body = body[:-1] if ended else body
    text, ends = text_and_ends(ours.tokenizer, body)
    encoded = theirs.tokenizer.encode(text, add_special_tokens=False)
    read = ends_in_bytes(theirs.tokenizer, encoded.ids, text, encoded.offsets)
    places = {end: index + 1 for index, end in enumerate(read) if end is not None}
    partners = [-1 if end is None else places.get(end, -1) for end in ends]
    return [theirs.start_id, *encoded.ids], [*([0] if begun else []), *partners, *([-1] if ended else [])]


def text_and_ends(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[int | None]]:
    """The text of some tokens, and after how many of its bytes each ends; None where that is not known.

    A piece may begin and end inside a character, whose bytes are left out.
    """
    table = byte_table()
    tokens = [tokenizer.id_to_token(token) or "" for token in ids]
    if is_byte_level(tokenizer) and all(character in table for token in tokens for character in token):
        raw = bytes(table[character] for token in tokens for character in token)
        cut = next((i for i, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), 0)
        text = raw[cut:].decode("utf-8", errors="ignore")
        kept = len(text.encode())
        ends = [end - cut for end in itertools.accumulate(len(token) for token in tokens)]
        return text, [end if 0 <= end <= kept else None for end in ends]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    if encoded.ids == ids:
        return text, ends_in_bytes(tokenizer, ids, text, encoded.offsets)
    known: list[int | None] = []  # it begins or ends where the tokenizer would not cut: token by token
    for count in range(1, len(ids) + 1):
        part = tokenizer.decode(ids[:count], skip_special_tokens=False)
        known.append(len(part.encode()) if text.startswith(part) and not part.endswith(REPLACEMENT) else None)
    return text, known


def ends_in_bytes(tokenizer: Tokenizer, ids: list[int], text: str, offsets: list[tuple[int, int]]) -> list[int | None]:
    """After how many bytes of the text each of its tokens ends; None where it ends inside a character.

    Of a byte-level tokenizer that is known exactly; its offsets are not used, since some of them leave out spaces.
    """
    size = len(text.encode())
    if is_byte_level(tokenizer):
        ends = list(itertools.accumulate(len(tokenizer.id_to_token(token) or "") for token in ids))
        spare = (ends[-1] if ends else 0) - size  # a space that the tokenizer puts before every text
        if spare in (0, 1):
            return [end - spare for end in ends]
    sizes = [0, *itertools.accumulate(len(character.encode()) for character in text)]
    following = [*(start for start, _ in offsets[1:]), *([None] if offsets else [])]  # a row may end with a start token
    return [
        None if start is not None and start < end else sizes[end]
        for (_, end), start in zip(offsets, following, strict=True)
    ]


@functools.cache
def byte_table() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones stand for themselves, the
    others for the characters from 256 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether every character of a token is a byte."""
    from tokenizers.decoders import ByteLevel

    return isinstance(tokenizer.decoder, ByteLevel)
