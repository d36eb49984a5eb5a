"""How large a cache of targets will be: the tokens of the training text times the bytes of one.

With top-k targets those are a formula. With sampled ones they hang on how many different tokens the draws give, which
the teacher itself tells: the expectation is summed over its probabilities (`cache_stage.expected_entries`) on sequences
spread over the text. Where the text is prepared its tokens are counted; else it is read up to a limit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgewright.compress.cache_format import PIECE_TOKENS, Layout

if TYPE_CHECKING:
    from edgewright.compress.cache_config import CacheStageConfig
    from edgewright.data import Batches, TokenStream
    from edgewright.recipe import Recipe

SAMPLE_TOKENS = 32_768
"""That the teacher reads."""
SAMPLE_SECONDS = 60.0
"""For which it may read at most; a few sequences it reads in any case."""
TEXT_BYTES = 1 << 26
"""Of text that was not prepared yet is read so much, and the rest taken to be like it."""
USUAL_ENTRIES = 12.0
"""Different tokens in 50 draws of a large teacher on ordinary text (Sparse Logit Sampling)."""
HEADER_BYTES = 400
"""Of a piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """What a cache stage will write."""

    name: str
    tokens: int
    bytes_per_token: float
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return round(self.tokens * self.bytes_per_token) + HEADER_BYTES * -(-self.tokens // PIECE_TOKENS)

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes_per_token,
            "bytes": self.bytes,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """The training text, or a part of it."""

    tokens: int
    """Of all of it."""
    batches: Batches | None
    """Of what was read."""
    notes: tuple[str, ...]


def plan_cache(recipe: Recipe, stage: CacheStageConfig, vocab_size: int, *, share: float = 1.0) -> CachePlan:
    """Predict what a cache stage writes.

    Args:
        vocab_size: of the data's tokenizer, which stands for that of a teacher that is not there yet.
        share: of the text that the teacher may read for it, besides `SAMPLE_TOKENS`; one sequence in any case.

    Raises:
        EdgewrightError: what opening the corpus, the tokenizer and the teacher raise.
    """
    from edgewright.compress.cache_stage import layout_of
    from edgewright.compress.teacher_notes import smallest_vocabulary

    known = all(teacher.type == "checkpoint" for teacher in stage.teachers)
    layout = layout_of(stage, smallest_vocabulary(stage.teachers, {}) if known else vocab_size)
    text = _text(recipe, vocab_size)
    notes, length = list(text.notes), recipe.data.sequence_length
    entries = USUAL_ENTRIES
    if layout.kind == "sampled" and known and text.batches is not None:
        entries, read = _entries(stage, layout, text.batches, min(SAMPLE_TOKENS, share * text.tokens))
        notes.append(f"{entries:.1f} different tokens in {layout.most} draws, by the teacher on {read:,} tokens")
    elif layout.kind == "sampled":
        entries = min(USUAL_ENTRIES, layout.most)
        notes.append(f"{entries:.0f} different tokens in {layout.most} draws are assumed: the teacher is not there yet")
    return CachePlan(
        name=stage.name,
        tokens=text.tokens // length * length,
        bytes_per_token=layout.bytes_per_token(entries, length),
        notes=tuple(notes),
    )


def guessed_bytes(recipe: Recipe, stage: CacheStageConfig, layout: Layout) -> int:
    """About what a cache stage has still to write, without reading text or teacher: by the size of the files."""
    from edgewright.compress.cache import FOLDER

    each = layout.bytes_per_token(min(USUAL_ENTRIES, layout.most), recipe.data.sequence_length)
    folder = recipe.run_directory / "stages" / stage.name / FOLDER
    there = sum(path.stat().st_size for path in folder.glob("*.targets"))
    return max(0, round(_guessed(recipe, layout.vocab_size).tokens * each) - there)


def _entries(stage: CacheStageConfig, layout: Layout, batches: Batches, most: float) -> tuple[float, int]:
    """Different tokens that the draws give on average, and on how many tokens that was seen: about `most`."""
    import torch

    from edgewright.chunked import chunk_rows
    from edgewright.compress.cache import CacheKey
    from edgewright.compress.cache_stage import expected_entries
    from edgewright.compress.targets import Logits
    from edgewright.trainer import model_inputs
    from edgewright.training import TrainingConfig, decide

    decisions = decide(TrainingConfig(precision=stage.precision, compile="off"), parameters=1, tokens=1)
    device, dtype = torch.device(decisions["device"]), getattr(torch, decisions["precision"])
    key = CacheKey(tokens="", tokenizer="", sequence_length=batches.sequence_length, restart_at_documents=True)
    source = stage.teacher.build({}, key)
    source.prepare(None, device)
    wanted = min(len(batches), max(1, math.ceil(most / batches.sequence_length)))
    order = np.random.default_rng(0).permutation(np.linspace(0, len(batches) - 1, wanted).astype(int))
    total, read, started = 0.0, 0, time.monotonic()
    rows = chunk_rows(layout.vocab_size)
    for index in order.tolist():
        inputs = model_inputs(batches.rows([index]), device)
        targets, tokens = source.targets(inputs, dtype), inputs.input_ids.numel()
        for begin in range(0, tokens, rows):
            chunk = targets.rows(slice(begin, min(begin + rows, tokens)))
            assert isinstance(chunk, Logits), "a teacher that runs gives logits"
            found = expected_entries(chunk.values[:, : layout.vocab_size], layout.most, stage.temperature)
            total += float(found.nan_to_num_(layout.most).sum())  # the stage names what is not finite
        read += tokens
        if time.monotonic() - started > SAMPLE_SECONDS:
            break
    return total / read, read


def _text(recipe: Recipe, vocab_size: int) -> _Text:
    """Prepared text as it lies in the run directory; else as much of it as may be read."""
    from edgewright.data import InstructData, PretrainedTokenizer
    from edgewright.data.prepare import prepared_index
    from edgewright.data.split import TRAIN

    folder = recipe.run_directory / "data"
    data = recipe.data
    index = prepared_index(data, folder)
    if index is not None:
        stream = data.layout.open(folder, index["files"], TRAIN)
        batches = _batches(recipe, stream, index["start_id"], index["eos_id"])
        return _Text(tokens=0 if batches is None else len(batches) * data.sequence_length, batches=batches, notes=())
    if not isinstance(data.tokenizer, PretrainedTokenizer) or isinstance(data, InstructData):
        return _guessed(recipe, vocab_size)
    return _read(recipe)


def _batches(recipe: Recipe, stream: TokenStream, start_id: int, eos_id: int) -> Batches | None:
    if not stream.sequences(recipe.data.sequence_length):
        return None
    return stream.batches(
        sequence_length=recipe.data.sequence_length,
        seed=0,
        restart_at_documents=recipe.data.restart_at_documents,
        start_id=start_id,
        eos_id=eos_id,
    )


def _guessed(recipe: Recipe, vocab_size: int) -> _Text:
    """By the size of the files, as the shards' own."""
    from edgewright.planner.disk import bytes_per_token

    each = bytes_per_token(vocab_size)
    tokens = int((recipe.data.text_bytes() or 0) / each * (1 - recipe.data.held_out))
    note = f"tokens are guessed from the files' size, at {each:.1f} bytes each: there is no tokenizer yet"
    return _Text(tokens=tokens, batches=None, notes=(note,))


def _read(recipe: Recipe) -> _Text:
    """Tokenize the training text up to `TEXT_BYTES`, and take the rest to be like it."""
    from edgewright.data import TokenStream, iterate_documents
    from edgewright.data.text import is_held_out
    from edgewright.data.tokenizer import load_encoder

    encoder = load_encoder(recipe.data.tokenizer.path)  # type: ignore[union-attr]
    parts: list[np.ndarray] = []
    sizes, size, documents, last, whole = [0, 0], 0, 0, None, True
    for name, text in iterate_documents(recipe.data):
        if size > TEXT_BYTES:
            whole = False
            break
        ids = encoder.encode([text])[0].astype(np.int64)
        held_out = is_held_out(name, recipe.data.held_out)
        if name != last:
            documents, last = documents + 1, name
            sizes[held_out] += 1 if encoder.start_id == encoder.eos_id else 2
            parts.append(np.array([encoder.start_id]))
        sizes[held_out] += len(ids)
        parts.append(ids)
        size += len(text.encode())
    stream = TokenStream(tokens=np.concatenate([np.zeros(0, np.int64), *parts]), documents=documents, bytes=size)
    notes = () if whole else ("the text is counted in a part of it, and the rest taken to be like it",)
    training = sizes[0] if all(sizes) else sum(sizes) * (1 - recipe.data.held_out)  # else the end is held out
    share = 1.0 if whole else max(1.0, (recipe.data.text_bytes() or 0) / size)
    return _Text(
        tokens=max(int(training * share) - 1, 0),
        batches=_batches(recipe, stream, encoder.start_id, encoder.eos_id),
        notes=notes,
    )
