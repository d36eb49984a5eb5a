"""From a corpus to packed tokens on disk: read, screen, train the tokenizer, encode, pack; once, and then reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from edgewright.data.layout import Encoding
from edgewright.data.shards import FORMAT, INDEX, TokenStream, read_index
from edgewright.data.source import Source
from edgewright.data.split import HELD_OUT, TRAIN, HashSplit, Side, Split
from edgewright.data.text import Counts, Document, pieces, screen
from edgewright.data.tokenizer import (
    COPIED,
    Encoder,
    PretrainedTokenizer,
    TrainTokenizer,
    copy_tokenizer,
    load_encoder,
    train_tokenizer,
)
from edgewright.errors import BadInput
from edgewright.files import disk_errors, sha256_file, sync_tree, write_json

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A prepared corpus."""

    directory: Path
    tokenizer_dir: Path
    """Hugging Face files of the tokenizer."""
    vocab_size: int
    start_id: int
    eos_id: int
    train: TokenStream
    held_out: TokenStream
    fingerprint: str
    """Hash of the tokens and the tokenizer themselves: the same however and wherever they were made."""
    split: Split
    """How the text was divided; `iterate_documents` finds the same text with it."""
    report: dict[str, Any]
    """What was read, kept and dropped: JSON."""
    hashes: dict[str, str]
    """SHA-256 of the tokens of each split and of the tokenizer's files, by the name of the file or the split."""


def prepare_data(config: Source, directory: Path, *, say: Say) -> Corpus:
    """Tokenize a corpus into `directory`, or reuse what is there when nothing has changed.

    Interrupted or damaged preparations are done again. The same corpus and settings give the same bytes.

    Args:
        config: the `data:` section of a recipe.
        directory: made if need be; it belongs to this function.
        say: receives lines of progress.

    Raises:
        BadInput: EW-2xx when the corpus, a file of it or the tokenizer cannot be used.
        OutOfResources: EW-401, the disk is full.
        NeedsNetwork: EW-901, the data set would have to be downloaded.
    """
    fingerprint = _fingerprint(config)
    index = read_index(directory, fingerprint)
    if isinstance(index, str):
        say(f"preparing the corpus: {index}")
        with disk_errors(directory):
            index = _build(config, directory, fingerprint, say)
    else:
        say(f"corpus ready: {index['report']['tokens']:,} tokens, nothing to do")
    corpus = _open(directory, index, config)
    _check_length(corpus, config)
    return corpus


def is_prepared(config: Source, directory: Path) -> bool:
    """Whether `prepare_data` would find all done."""
    return not isinstance(read_index(directory, _fingerprint(config)), str)


def prepared_index(config: Source, directory: Path) -> dict[str, Any] | None:
    """The index of a corpus that was prepared of this source, without reading its files; None where there is none."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and index.get("fingerprint") == _fingerprint(config) else None


def _fingerprint(config: Source) -> str:
    """Hash of all that decides the bytes on disk, without reading the text."""
    settings = config.model_dump(mode="json", exclude=set(config.not_in_tokens))
    if isinstance(config.tokenizer, PretrainedTokenizer):
        files = [config.tokenizer.path / name for name in (*COPIED, "generation_config.json", "config.json")]
        settings["tokenizer"] = [[file.name, sha256_file(file)] for file in files if file.is_file()]
    parts = [FORMAT, settings, config.fingerprint()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _build(config: Source, directory: Path, fingerprint: str, say: Say) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)  # from here on the old files are not to be trusted
    split = _choose_split(config, directory, say)
    encoder = _tokenizer(config, split, directory, say)
    config.complete_tokenizer(directory / "tokenizer")
    writers = {side: config.layout.writer(directory, side, encoder) for side in (TRAIN, HELD_OUT)}
    counts = Counts()
    documents = _documents(config, counts, directory)
    try:
        more = config.layout.encode(Encoding(config, documents, split, encoder, writers, config.visible(), say))
        splits = {side: writer.close() for side, writer in writers.items()}
        beside = {name: entry for writer in writers.values() for name, entry in writer.beside().items()}
    finally:
        for writer in writers.values():
            writer.abort()
    tokenizer_files = {name: {"file": name, "sha256": sha256} for name, sha256 in _tokenizer_hashes(directory).items()}
    sync_tree(directory)
    index: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "vocab_size": encoder.vocab_size,
        "start_id": encoder.start_id,
        "eos_id": encoder.eos_id,
        "split": split.model_dump(mode="json"),
        "files": {**splits, **beside, **tokenizer_files},
        "report": {**_report(counts, splits, encoder), **more},
    }
    write_json(directory / INDEX, index)
    counts.documents = index["report"]["documents"]  # the layout may have dropped some
    say(_summary(index["report"], counts))
    return index


def _choose_split(config: Source, directory: Path, say: Say) -> Split:
    """By the names of the documents; by position where that leaves a side empty, as it does with a single document."""
    counts = Counts()
    by_name = HashSplit(held_out=config.held_out)
    if by_name.fills_both(_documents(config, counts, directory)):
        return by_name
    if not counts.documents:
        raise BadInput(
            "EW-210",
            "the corpus is empty",
            where="data",
            expected="text",
            found=counts.summary(),
            fix="check which files data.files names, and data.on_bad_text",
        )
    documents = _documents(config, Counts(), directory)
    last = config.layout.few(documents, total=counts.bytes, held_out=config.held_out)
    if last is None:
        raise BadInput(
            "EW-211",
            "the corpus is too short to be split",
            where="data.held_out",
            expected="text in the training and in the held-out split",
            found=f"{counts.summary()}, {counts.bytes:,} bytes; data.held_out is {config.held_out:g}",
            fix="give more text, or change data.held_out (0.05, say)",
        )
    say(f"too few documents ({counts.documents:,}) to hold some out by name: held out are {last.words(counts.bytes)}")
    return last


def _tokenizer(config: Source, split: Split, directory: Path, say: Say) -> Encoder:
    """Train or copy the tokenizer into `directory/tokenizer`."""
    target = directory / "tokenizer"
    for name in COPIED:
        (target / name).unlink(missing_ok=True)
    wanted = config.tokenizer
    if isinstance(wanted, PretrainedTokenizer):
        load_encoder(wanted.path)  # refuse it before anything is copied
        copy_tokenizer(wanted.path, target)
        return load_encoder(target)
    say(f"training a byte-level BPE tokenizer of {wanted.vocab_size:,} tokens")
    _train(wanted, config, split, directory, target, say)
    encoder = load_encoder(target)
    if encoder.vocab_size < wanted.vocab_size:
        say(f"the corpus gave only {encoder.vocab_size:,} tokens of the {wanted.vocab_size:,} wanted")
    return encoder


def pretrained_hashes(config: Source, wanted: PretrainedTokenizer, scratch: Path) -> dict[str, str]:
    """`Corpus.hashes` of the tokenizer's files as they will be, without the text.

    Args:
        scratch: an empty folder, in which the files are made.
    """
    (scratch / "tokenizer").mkdir()
    copy_tokenizer(wanted.path, scratch / "tokenizer")
    config.complete_tokenizer(scratch / "tokenizer")
    return _tokenizer_hashes(scratch)


def _tokenizer_hashes(directory: Path) -> dict[str, str]:
    files = {f"tokenizer/{name}": directory / "tokenizer" / name for name in COPIED}
    return {name: sha256_file(file) for name, file in files.items() if file.is_file()}


def _train(wanted: TrainTokenizer, config: Source, split: Split, directory: Path, target: Path, say: Say) -> None:
    divided = split.divide(_documents(config, Counts(), directory))
    training = (document for side, document in divided if side == TRAIN)
    train_tokenizer(_up_to(wanted.max_bytes, training, say), wanted, target)


def _up_to(limit: int, documents: Iterable[Document], say: Say) -> Iterator[str]:
    """The text of the first documents, in pieces, until it is `limit` bytes long."""
    taken = 0
    for document in documents:
        if taken >= limit:
            say(f"the tokenizer learns from the first {taken / 1e6:,.0f} MB (data.tokenizer.max_bytes)")
            return
        taken += document.bytes
        yield from pieces(document.texts)


def _documents(config: Source, counts: Counts, scratch: Path | None) -> Iterator[Document]:
    return screen(config.documents(), policy=config.on_bad_text, counts=counts, scratch=scratch)


def _check_length(corpus: Corpus, config: Source) -> None:
    for split, stream in ((TRAIN, corpus.train), (HELD_OUT, corpus.held_out)):
        if not stream.sequences(config.sequence_length):
            more = ", or raise data.held_out" if split == HELD_OUT else ""
            name = f"the {'held-out' if split == HELD_OUT else 'training'} split"
            raise (
                _too_short(name, stream, config, more)
                if config.layout.running_text
                else _no_example(name, corpus, more)
            )


def _too_short(name: str, stream: TokenStream, config: Source, more: str) -> BadInput:
    return BadInput(
        "EW-212",
        f"{name} is shorter than one sequence",
        where="data.sequence_length",
        expected=f"more than {config.sequence_length:,} tokens",
        found=f"{len(stream):,} tokens in {stream.documents:,} documents",
        fix=f"give more text, or lower data.sequence_length{more}",
    )


def _no_example(name: str, corpus: Corpus, more: str) -> BadInput:
    dropped = corpus.report["too_long"] + corpus.report["without_completion"]
    longer = ", or raise data.sequence_length" if dropped else ""
    return BadInput(
        "EW-212",
        f"{name} has no example",
        where="data.sequence_length" if dropped else "data.files",
        expected="at least one",
        found=f"none; {corpus.report['documents']:,} in all, and {dropped:,} that were too long and dropped",
        fix=f"give more examples{longer}{more}",
    )


def _report(counts: Counts, splits: dict[Side, dict[str, Any]], encoder: Encoder) -> dict[str, Any]:
    tokens = sum(entry["tokens"] for entry in splits.values())
    return {
        **counts.to_json(),
        "tokens": tokens,
        "bytes_per_token": counts.bytes / tokens,
        "vocab_size": encoder.vocab_size,
        "splits": {
            side: {name: entry[name] for name in _OF_A_SPLIT if name in entry} for side, entry in splits.items()
        },
    }


_OF_A_SPLIT = ("documents", "bytes", "tokens", "counted")


def _summary(report: dict[str, Any], counts: Counts) -> str:
    return (
        f"corpus ready: {counts.summary()}; {report['bytes'] / 1e6:,.1f} MB, {report['tokens']:,} tokens, "
        f"{report['bytes_per_token']:.2f} bytes each"
    )


def _open(directory: Path, index: dict[str, Any], config: Source) -> Corpus:
    by_name = HashSplit(held_out=config.held_out).model_dump(mode="json")  # the only way when indices had no such entry
    split = index.get("split", by_name)
    contents = {name: entry["sha256"] for name, entry in index["files"].items()}
    return Corpus(
        directory=directory,
        tokenizer_dir=directory / "tokenizer",
        vocab_size=index["vocab_size"],
        start_id=index["start_id"],
        eos_id=index["eos_id"],
        train=config.layout.open(directory, index["files"], TRAIN),
        held_out=config.layout.open(directory, index["files"], HELD_OUT),
        fingerprint=hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        split=TypeAdapter[Split](Split).validate_python(split),
        report={**index["report"], "split": split},
        hashes=contents,
    )
