"""Tokenizers: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer directory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edgewright.data.text import Segment, pieces
from edgewright.errors import BadInput
from edgewright.paths import RecipePath

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""Special token 0 of a trained tokenizer: it starts and ends every document."""
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""The files that make a tokenizer in a Hugging Face directory."""


class TrainTokenizer(BaseModel):
    """Train a byte-level BPE tokenizer on the training documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["train"] = "train"
    vocab_size: int = Field(default=4096, ge=257, le=1 << 24)
    """Tokens wanted: 256 bytes, one special token, and merges. A small corpus may give fewer."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    """How much text to learn from: the training documents in their order up to about this much."""


class PretrainedTokenizer(BaseModel):
    """Use the tokenizer of a local Hugging Face directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["pretrained"] = "pretrained"
    path: RecipePath
    """Directory that holds `tokenizer.json`."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The special tokens of a tokenizer."""

    bos: str | None
    eos: str
    texts: tuple[str, ...]
    """All of them."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches any, the longest first."""
        return re.compile("|".join(re.escape(text) for text in sorted(self.texts, key=len, reverse=True)))


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer ready to encode documents.

    Special tokens are never read out of the text: a document that spells `<|endoftext|>` gets ordinary tokens.
    """

    tokenizer: tokenizers.Tokenizer
    vocab_size: int
    """Highest id plus one."""
    start_id: int
    """Token before a document: BOS, or EOS where there is no BOS."""
    eos_id: int
    adds_space: bool
    """The tokenizer puts a space before a text that begins with a word."""
    drops_space: bool
    """It does so whatever a text begins with, so a piece that continues a document gives up its own."""

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The narrowest unsigned type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, in parallel, `dtype` [tokens]."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def cut(self, texts: Iterable[str]) -> Iterator[str]:
        """Cut a document into pieces that encode to the tokens of the whole (see `text.pieces`)."""
        for number, piece in enumerate(pieces(texts)):
            yield piece.removeprefix(" ") if number and self.drops_space else piece

    def encode_segments(self, examples: Sequence[Sequence[Segment]]) -> list[list[np.ndarray]]:
        """Token ids of each segment of each example, `dtype` [tokens].

        Each is encoded by itself, so that its border is one of tokens, as between a prompt and what is generated.
        Where the tokenizer puts a space before a text, that is taken back from segments that go on with one: they are
        encoded after a line break, whose tokens are then cut off.
        """
        flat = [
            (segment, self.adds_space and index > 0 and not segment.begins)
            for example in examples
            for index, segment in enumerate(example)
        ]
        found: list[np.ndarray] = [np.empty(0, self.dtype)] * len(flat)
        for special in (False, True):
            self.tokenizer.encode_special_tokens = not special
            chosen = [index for index, (segment, _) in enumerate(flat) if segment.special == special]
            texts = [("\n" if flat[index][1] else "") + flat[index][0].text for index in chosen]
            anchor = self.encode(["\n"])[0]
            for index, ids in zip(chosen, self.encode(texts), strict=True):
                segment, anchored = flat[index]
                if anchored:
                    fits = np.array_equal(ids[: len(anchor)], anchor)
                    ids = ids[len(anchor) :] if fits else self.encode([segment.text])[0]
                found[index] = ids
        self.tokenizer.encode_special_tokens = True
        parts = iter(found)
        return [[next(parts) for _ in example] for example in examples]


def train_tokenizer(texts: Iterable[str], config: TrainTokenizer, directory: Path) -> None:
    """Train byte-level BPE (pre-tokenizer, alphabet and decoder of GPT-2) and save it as a Hugging Face directory.

    The same texts in the same order give the same files.

    Args:
        texts: the text to learn from, in pieces of bounded size.
        config: what is wanted.
        directory: made if need be.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files out of a model's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def special_tokens(directory: Path) -> SpecialTokens:
    """The special tokens of a local Hugging Face directory.

    Raises:
        BadInput: EW-220, EW-221, as `load_encoder`.
    """
    encoder = load_encoder(directory)
    names = {token: text for text, token in encoder.tokenizer.get_vocab(with_added_tokens=True).items()}
    bos = _special(directory, "bos_token", {text: token for token, text in names.items()})
    added = encoder.tokenizer.get_added_tokens_decoder().values()
    eos = names[encoder.eos_id]
    encoder.tokenizer.encode_special_tokens = False
    if encoder.encode([eos])[0].tolist() != [encoder.eos_id]:
        raise BadInput(
            "EW-221",
            "the tokenizer does not read its own end-of-text token, so an example could not end with it",
            where=directory,
            expected=f"{eos!r} among the added_tokens of tokenizer.json, as a special one",
            found=f"{encoder.encode([eos])[0].tolist()} instead of [{encoder.eos_id}]",
            fix="add it to the tokenizer as a special token and save it again",
        )
    texts = {token.content for token in added if token.special} | {eos}
    return SpecialTokens(bos=None if bos is None else names[bos], eos=eos, texts=tuple(sorted(texts)))


def load_encoder(directory: Path) -> Encoder:
    """Open the tokenizer of a local Hugging Face directory.

    Raises:
        BadInput: EW-220 when there is no usable `tokenizer.json`, EW-221 when it has no end-of-text token.
    """
    tokenizer = _open(directory)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    eos_id = _special(directory, "eos_token", vocabulary)
    if eos_id is None:
        raise BadInput(
            "EW-221",
            "the tokenizer has no end-of-text token, so documents could not be kept apart",
            where=directory,
            expected="eos_token in tokenizer_config.json, a token of the vocabulary",
            fix='add "eos_token": "<token>" to tokenizer_config.json, or take another tokenizer',
        )
    bos_id = _special(directory, "bos_token", vocabulary)
    return Encoder(
        tokenizer=tokenizer,
        vocab_size=max(vocabulary.values()) + 1,
        start_id=eos_id if bos_id is None else bos_id,
        eos_id=eos_id,
        **_spaces(tokenizer),
    )


def _open(directory: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise BadInput(
            "EW-220",
            "there is no tokenizer.json",
            where=directory,
            expected="a Hugging Face tokenizer directory",
            fix="give the directory of a model with a fast tokenizer; an older one is converted by "
            "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise BadInput(
            "EW-220", "the tokenizer cannot be read", where=file, found=error, fix="fetch it again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _special(directory: Path, name: str, vocabulary: dict[str, int]) -> int | None:
    """Id of `bos_token` or `eos_token`: from the tokenizer's settings, else from the model's."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(directory / file).get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in vocabulary:
            return vocabulary[content]
    for file in ("generation_config.json", "config.json"):
        value = _settings(directory / file).get(f"{name}_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and first in vocabulary.values():
            return first
    return None


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput("EW-220", "the file is no JSON", where=file, found=error, fix="fetch it again") from error
    return content if isinstance(content, dict) else {}


def _spaces(tokenizer: tokenizers.Tokenizer) -> dict[str, bool]:
    """`adds_space` and `drops_space`, found out by trying: the tokens of "two words" are those of "two" and " words",
    or of "two" and "words", or of either."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    whole, first = ids("two words"), ids("two")
    adds = whole == first + ids("words")
    return {"adds_space": adds, "drops_space": adds and whole != first + ids(" words")}
