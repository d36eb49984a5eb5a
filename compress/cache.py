"""Targets from disk: what a teacher said about every token of the training text, found by the number of the sequence.

Random sampling (Sparse Logit Sampling, arXiv 2503.16870): N draws for each token, so that count / N has the teacher's
distribution as its mean and so has the gradient; or the k most probable tokens with the mass of all others.

A cache belongs to the tokens in their order, to the tokenizer and to the packing, since a sequence is found by its
number and the teacher saw it whole. What it was made from stands in `cache.json`, which is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgewright.compress.cache_format import (
    FORMATS,
    Layout,
    Piece,
    from_bits,
    from_bytes,
    piece_path,
    to_bits,
    to_bytes,
)
from edgewright.compress.targets import Sampled, TargetSource, TopK
from edgewright.compress.teacher_config import CachedTeacherConfig
from edgewright.errors import BadInput, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.data import Corpus
    from edgewright.data.source import Source
    from edgewright.objective import ModelInputs
    from edgewright.recipe import Recipe

MANIFEST = "cache.json"
FOLDER = "cache"
"""Of the stage's own folder."""
MOST_OPEN = 512
"""Pieces that stay open."""
WORDS = {
    "tokens": "the tokens of the training text",
    "tokenizer": "the tokenizer",
    "sequence_length": "data.sequence_length",
    "restart_at_documents": "data.restart_at_documents",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """What a cache has to have been made of."""

    tokens: str
    """SHA-256 over the packed tokens, and over what says which are learned."""
    tokenizer: str
    """SHA-256 over the tokenizer's files."""
    sequence_length: int
    restart_at_documents: bool

    @classmethod
    def of(cls, data: Source, corpus: Corpus) -> CacheKey:
        """Of a recipe's data."""
        return cls(
            tokens=tokens_hash(corpus.hashes),
            tokenizer=tokenizer_hash(corpus.hashes),
            sequence_length=data.sequence_length,
            restart_at_documents=data.restart_at_documents,
        )


def tokens_hash(hashes: Mapping[str, str]) -> str:
    """Over the packed tokens of a corpus, and over what says which are learned."""
    return _over({name: value for name, value in hashes.items() if name.startswith("train")})


def tokenizer_hash(hashes: Mapping[str, str]) -> str:
    """Over the files of a corpus's tokenizer."""
    return _over({name: value for name, value in hashes.items() if name.startswith("tokenizer/")})


def _over(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def fingerprint(key: CacheKey, made: dict[str, Any]) -> str:
    """Of a cache: what it was made of, by which teacher, how."""
    version = FORMATS[made["targets"]["type"]]
    return hashlib.sha256(json.dumps([version, asdict(key), made], sort_keys=True).encode()).hexdigest()


def encode_sampled(ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Draws as different tokens.

    Args:
        ids: [T, N] int64, drawn tokens in any order.

    Returns:
        (first bool [T, N]: of the sorted draws, which are others than the one before; uint32: their ids, by token).
    """
    drawn = ids.sort(-1).values.cpu().numpy()
    first = np.ones(drawn.shape, bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    return first, drawn[first].astype(np.uint32)


def sampled_sections(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], length: int, layout: Layout
) -> dict[str, np.ndarray]:
    """A piece's sections, of the `encode_sampled` of its batches in order."""
    first = np.concatenate([each for each, _ in parts])
    ids = np.concatenate([each for _, each in parts])
    ends = np.cumsum(first.reshape(-1, length * layout.most).sum(-1))
    packed = [to_bits(part, layout.id_bits) for part in np.split(ids, ends[:-1])]
    starts = np.cumsum([0, *map(len, packed)]).astype("<u8")
    others = first[:, 1:].reshape(len(first) // length, length * (layout.most - 1))
    return {"starts": starts, "first": np.packbits(others, axis=-1, bitorder="little"), "ids": np.concatenate(packed)}


def decode_sampled(piece: Piece, row: int, length: int, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The draws of a sequence of a piece.

    Returns:
        (counts int64 [length]: different tokens; ids uint32 [sum(counts)], by token, rising; how often each was drawn).

    Raises:
        BadInput: EW-791, as `Piece.payload`.
    """
    size, most = layout.first_bytes(length), layout.most
    first = np.ones((length, most), bool)
    bits = np.unpackbits(
        piece.section("first")[row * size : (row + 1) * size], count=length * (most - 1), bitorder="little"
    )
    first[:, 1:] = bits.reshape(length, most - 1)
    times = np.diff(np.flatnonzero(first), append=first.size)  # a run never crosses tokens, as each begins one
    begin, end = np.frombuffer(piece.section("starts"), "<u8")[row : row + 2].tolist()
    return first.sum(-1), from_bits(piece.section("ids")[begin:end], len(times), layout.id_bits), times


def encode_top_k(targets: TopK, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids uint8 [N, k, id_bytes], probabilities float16 [N, k], tail float16 [N])."""
    ids = to_bytes(targets.ids.cpu().numpy(), layout.id_bytes)
    probabilities = targets.log_probs.exp().cpu().numpy().astype("<f2")
    return ids, probabilities, targets.tail.cpu().numpy().astype("<f2")


def top_k_sections(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """A piece's sections, of the `encode_top_k` of its batches in order."""
    ids, probabilities, tails = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return {"ids": ids, "probabilities": probabilities, "tail": tails}


class CachedTargets(TargetSource):
    """The pieces of a cache, opened when a sequence of theirs is asked for; the content is verified then."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.layout = Layout(**manifest["layout"])
        self.temperature = float(manifest["made"]["temperature"])
        self._length = int(manifest["key"]["sequence_length"])
        self._pieces: dict[int, Piece] = {}

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        """Look at every piece's header and size.

        Raises:
            BadInput: EW-791, naming the first piece that is missing, cut off or of another cache.
        """
        check_pieces(self.folder, self.manifest)

    def _piece(self, number: int) -> Piece:
        piece = self._pieces.pop(number, None)
        if piece is None:
            piece = open_piece(self.folder, self.manifest, number)
        self._pieces[number] = piece  # the last used is the last to go
        if len(self._pieces) > MOST_OPEN:
            del self._pieces[next(iter(self._pieces))]
        return piece

    def _rows(self, inputs: ModelInputs) -> list[tuple[Piece, int]]:
        """The piece of every sequence of a micro-batch, and the row in it.

        Raises:
            BadInput: EW-792, the cache does not have that sequence.
        """
        assert inputs.sequences is not None, "batches of a stream know their sequences"
        assert inputs.input_ids.shape[1] == self._length, "the key was compared"
        each = self.manifest["piece_sequences"]
        outside = [number for number in inputs.sequences if not 0 <= number < self.manifest["sequences"]]
        if outside:
            raise BadInput(
                "EW-792",
                "the cache has no targets for a sequence of this data",
                where=self.folder.absolute(),
                expected=f"sequences 0 to {self.manifest['sequences'] - 1}",
                found=outside[0],
                fix="make a cache of this data",
            )
        return [(self._piece(number // each), number % each) for number in inputs.sequences]


class CachedSamples(CachedTargets):
    """Random-sampling targets from disk."""

    gives = Sampled

    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> Sampled:
        found = [decode_sampled(piece, row, self._length, self.layout) for piece, row in self._rows(inputs)]
        count, ids, times = (np.concatenate(parts) for parts in zip(*found, strict=True))
        token = np.repeat(np.arange(len(count)), count)
        column = np.arange(len(ids)) - np.repeat(np.cumsum(count) - count, count)
        shape = (len(count), int(count.max(initial=1)))
        padded_ids, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        padded_ids[token, column] = ids
        weights[token, column] = times / self.layout.most
        device = inputs.input_ids.device
        return Sampled(
            ids=torch.from_numpy(padded_ids).to(device),
            weights=torch.from_numpy(weights).to(device),
            temperature=self.temperature,
        )


class CachedTopK(CachedTargets):
    """Top-k targets with tail mass from disk. Rounded to float16 they do not quite add up to 1: the larger of head and
    tail is made to."""

    gives = TopK

    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> TopK:
        ids, probabilities, tails = [], [], []
        k, width = self.layout.most, self.layout.id_bytes
        for piece, row in self._rows(inputs):
            window = slice(row * self._length, (row + 1) * self._length)
            whole = piece.section("ids").reshape(-1, k * width)[window]
            ids.append(from_bytes(whole, width).reshape(-1, k))
            probabilities.append(np.frombuffer(piece.section("probabilities"), "<f2").reshape(-1, k)[window])
            tails.append(np.frombuffer(piece.section("tail"), "<f2")[window])
        device = inputs.input_ids.device
        tail = torch.from_numpy(np.concatenate(tails).astype(np.float32)).to(device)
        head = torch.from_numpy(np.concatenate(probabilities).astype(np.float32)).to(device)
        mass = head.sum(-1)
        mostly_tail = tail > mass  # the smaller of both is the more exact
        head *= torch.where(mostly_tail, 1.0, (1.0 - tail) / mass.clamp_min(1e-30))[:, None]
        tail = torch.where(mostly_tail, 1.0 - mass, tail)
        return TopK(
            ids=torch.from_numpy(np.concatenate(ids)).to(device),
            log_probs=head.log(),
            tail=tail,
            temperature=self.temperature,
        )


SOURCES: dict[str, type[CachedTargets]] = {"sampled": CachedSamples, "top_k": CachedTopK}


def open_cache(folder: Path, key: CacheKey) -> CachedSamples | CachedTopK:
    """A finished cache that was made of this data.

    Raises:
        BadInput: EW-793, there is no finished cache. RecipeError: EW-794, it was made of other data; it says what
            differs.
    """
    manifest = read_manifest(folder)
    check_made_of(folder, manifest, asdict(key))
    source = SOURCES[manifest["layout"]["kind"]](folder, manifest)
    assert isinstance(source, CachedSamples | CachedTopK)
    return source


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished cache says of itself.

    Raises:
        BadInput: EW-793.
    """
    path = folder / MANIFEST
    pieces = len(list(folder.glob("*.targets"))) if folder.is_dir() else 0
    found = f"{pieces} pieces and no {MANIFEST}" if pieces else "no such file"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = FORMATS.get(manifest["layout"]["kind"])
        if manifest["format"] == version:
            _check_manifest(manifest)
            return manifest
        if version is not None and isinstance(manifest["format"], int):
            raise _other_format(path, manifest["layout"]["kind"], version, manifest["format"])
        found = f"format {manifest['format']} of {manifest['layout']['kind']}"
    except OSError:
        pass
    except (ValueError, KeyError, TypeError):
        found = "a damaged file"
    raise BadInput(
        "EW-793",
        "this is no finished cache of targets",
        where=path.absolute(),
        expected="the folder that a stage of type cache wrote, to its end",
        found=found,
        fix="run the recipe with the cache stage (again): it goes on where it stopped",
    )


def _other_format(path: Path, kind: str, version: int, found: int) -> BadInput:
    """EW-793, for a cache of another version."""
    return BadInput(
        "EW-793",
        f"this cache was written by {'an older' if found < version else 'a newer'} version of edgewright",
        where=path.absolute(),
        expected=f"{kind} targets in format {version}",
        found=f"format {found}",
        fix="run the recipe with the cache stage again: it makes the pieces anew, in its place"
        if found < version
        else "take that version, or run the recipe with the cache stage again",
    )


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Whether all is there that is asked of a manifest; else KeyError, TypeError or ValueError."""
    Layout(**manifest["layout"]), CacheKey(**manifest["key"])
    float(manifest["made"]["temperature"]), str(manifest["fingerprint"])
    if any(
        type(manifest[name]) is not int or manifest[name] < 1 for name in ("pieces", "piece_sequences", "sequences")
    ):
        raise ValueError("counts are whole numbers above 0")


def check_pieces(folder: Path, manifest: dict[str, Any]) -> None:
    """Look at every piece's header and size.

    Raises:
        BadInput: EW-791, naming the first piece that is missing, cut off or of another cache.
    """
    for number in range(manifest["pieces"]):
        open_piece(folder, manifest, number)


def open_piece(folder: Path, manifest: dict[str, Any], number: int) -> Piece:
    """A piece of a cache by its number; BadInput: EW-791, as `Piece`."""
    return Piece(piece_path(folder, number), manifest["fingerprint"], number * manifest["piece_sequences"])


def check_made_of(folder: Path, manifest: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a cache of other data.

    Args:
        ours: parts of this data's key, as many as are known.

    Raises:
        RecipeError: EW-794.
    """
    theirs = manifest["key"]
    different = [name for name in WORDS if name in ours and theirs.get(name) != ours[name]]
    if different:
        verb = "is" if len(different) == 1 and different[0] != "tokens" else "are"
        raise RecipeError(
            "EW-794",
            f"the cache was made of other data: {' and '.join(WORDS[name] for name in different)} {verb} not the same",
            where=folder.absolute(),
            expected=f"a cache made of {_told(ours, different)}, as this recipe has",
            found=_told(theirs, different),
            fix="run a cache stage on this data, or use the data that the cache was made of",
        )


def _told(key: dict[str, Any], names: list[str]) -> str:
    """Parts of a key, hashes by their first digits."""
    values = [(WORDS[name], key.get(name)) for name in names]
    return ", ".join(f"{word} {value[:12] if isinstance(value, str) else value}" for word, value in values)


def check_caches_made_of(recipe: Recipe, corpus: Corpus) -> None:
    """Refuse caches of other runs that were made of other data, before the first stage.

    Raises:
        BadInput: EW-791, EW-793. RecipeError: EW-794.
    """
    for stage in recipe.trainings:
        teacher = stage.teacher
        if isinstance(teacher, CachedTeacherConfig) and teacher.path is not None:
            source = open_cache(teacher.path, CacheKey.of(recipe.data, corpus))
            check_pieces(source.folder, source.manifest)
