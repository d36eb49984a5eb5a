"""The stage of type `cache`: a teacher reads the training text once, and its targets are written piece by piece.

A piece is there as a whole or not at all, so a run that was killed makes the missing ones. Under torchrun the pieces
are dealt out to the processes; which one makes a piece changes nothing in it, since its draws have a seed of their own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from edgewright.chunked import chunk_rows
from edgewright.compress.cache import (
    FOLDER,
    MANIFEST,
    CacheKey,
    encode_sampled,
    encode_top_k,
    fingerprint,
    sampled_sections,
    top_k_sections,
)
from edgewright.compress.cache_config import CacheStageConfig, TopKConfig
from edgewright.compress.cache_format import FORMATS, PIECE_TOKENS, Layout, Piece, joined, piece_path, write_piece
from edgewright.compress.targets import Logits, Sampled, Targets, TargetSource, TopK
from edgewright.compress.teacher_notes import check_speaks, models_identity, not_finite, smallest_vocabulary
from edgewright.errors import BadInput, RecipeError
from edgewright.files import write_json
from edgewright.stage_cost import StageCost
from edgewright.stage_work import Made, StageWork
from edgewright.training import TrainingConfig, decide

if TYPE_CHECKING:
    from edgewright.data import Batches
    from edgewright.objective import ModelInputs

SECONDS_BETWEEN_LINES = 10.0


def layout_of(stage: CacheStageConfig, vocab_size: int) -> Layout:
    """How entries are laid out for a teacher's vocabulary.

    Raises:
        RecipeError: EW-795, k is above the vocabulary.
    """
    targets = stage.targets
    if isinstance(targets, TopKConfig):
        if targets.k > vocab_size:
            raise RecipeError(
                "EW-795",
                f"stage {stage.name} is to keep more tokens than the teacher has",
                where=f"stages.{stage.name}.targets.k",
                expected=f"at most {vocab_size:,}, the teacher's vocabulary",
                found=targets.k,
                fix="lower k",
            )
        return Layout(kind="top_k", most=targets.k, vocab_size=vocab_size)
    return Layout(kind="sampled", most=targets.samples, vocab_size=vocab_size)


def make_cache(stage: CacheStageConfig, work: StageWork) -> Made:
    """Write a cache, go on with it, or find that it is done.

    Raises:
        RecipeError: EW-795; EW-130, the teacher speaks other tokens. BadInput: EW-783, it says NaN.
        Interrupted: a signal; finished pieces stay. OutOfResources: EW-401, the disk is full.
    """
    cache = _Cache(stage, work)
    work.world.main_first(cache.begin)
    missing = work.world.shared(cache.missing() if work.world.is_main else None)
    cost = cache.make(missing) if missing else None
    work.world.main_only(lambda: cache.finish(cost))
    return Made(output=cache.folder)


class _Cache:
    """A cache that is being made."""

    def __init__(self, stage: CacheStageConfig, work: StageWork) -> None:
        self.stage, self.work = stage, work
        self.folder = work.directory / FOLDER
        data = work.recipe.data
        self.key = CacheKey.of(data, work.corpus)
        self.seed = work.recipe.seed if stage.seed is None else stage.seed
        self.layout = layout_of(stage, smallest_vocabulary(stage.teachers, work.earlier))
        self.made = {
            "teacher": models_identity(stage.teachers, work.earlier),
            "targets": stage.targets.model_dump(mode="json"),
            "temperature": stage.temperature,
            "seed": self.seed,
        }
        self.fingerprint = fingerprint(self.key, self.made)
        self.batches: Batches = _in_order(work)
        self.piece_sequences = max(1, PIECE_TOKENS // data.sequence_length)

    @property
    def pieces(self) -> int:
        return -(-len(self.batches) // self.piece_sequences)

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[int]:
        """Pieces that are not there, or not whole; what is wrong with those is said.

        A finished cache is not read again, but for its sizes: whoever uses a piece verifies it.
        """
        finished = (self.folder / MANIFEST).exists()
        found = []
        for number in range(self.pieces):
            path = piece_path(self.folder, number)
            if not path.exists():
                found.append(number)
                continue
            try:
                piece = Piece(path, self.fingerprint, number * self.piece_sequences)
                if not finished:
                    piece.payload  # noqa: B018 - reading it verifies it
            except BadInput as error:
                self.work.say(f"{self.stage.name}: {path.name} is made again: {error.found}")
                found.append(number)
        return found

    def make(self, missing: list[int]) -> StageCost | None:
        """The pieces of this process, in step with the others; what that takes, where this is the main one."""
        work, world = self.work, self.work.world
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for note in check_speaks(self.stage.teachers, work, f"teacher of stage {self.stage.name}"):
            work.say(f"note: {note}")
        decisions = decide(TrainingConfig(precision=self.stage.precision, compile="off"), parameters=1, tokens=1)
        decisions["micro_batch"] = self.stage.per_device_batch_size
        cost = StageCost(work.directory, decisions) if world.is_main else None
        device, dtype = torch.device(decisions["device"]), getattr(torch, decisions["precision"])
        source = self.stage.teacher.build(work.earlier, self.key)
        source.prepare(None, device)
        said, started, tokens = time.monotonic(), time.monotonic(), 0
        for turn in range(0, len(missing), world.size):
            mine = missing[turn : turn + world.size]
            if world.rank < len(mine):
                tokens += self._piece(mine[world.rank], source, device, dtype)
            if cost is not None:
                cost.keep()
            world.any(False)
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                rate = tokens * world.size / (said - started)
                work.say(
                    f"{self.stage.name}: {min(turn + world.size, len(missing))} of {len(missing)} pieces, "
                    f"{rate:,.0f} tokens/s"
                )
        return cost

    def _piece(self, number: int, source: TargetSource, device: torch.device, dtype: torch.dtype) -> int:
        """Make and write one piece; its tokens."""
        from edgewright.trainer import model_inputs

        first = number * self.piece_sequences
        sequences = range(first, min(first + self.piece_sequences, len(self.batches)))
        generator = torch.Generator(device).manual_seed(_seed(self.seed, number))
        size = self.stage.per_device_batch_size
        parts = []
        for begin in range(0, len(sequences), size):
            inputs = model_inputs(self.batches.rows(list(sequences[begin : begin + size])), device)
            parts += list(self._encoded(inputs, source, dtype, generator))
        length = self.batches.sequence_length
        sampled = self.layout.kind == "sampled"
        sections = sampled_sections(parts, length, self.layout) if sampled else top_k_sections(parts)
        places, payload = joined(sections)
        header = {
            "format": FORMATS[self.layout.kind],
            "fingerprint": self.fingerprint,
            "first": first,
            "sequences": len(sequences),
            "sections": places,
        }
        write_piece(piece_path(self.folder, number), header, payload)
        return len(sequences) * length

    def _encoded(
        self, inputs: ModelInputs, source: TargetSource, dtype: torch.dtype, generator: torch.Generator
    ) -> Iterator[Any]:
        """A micro-batch's targets, chunk by chunk."""
        targets, tokens = source.targets(inputs, dtype), inputs.input_ids.numel()
        try:
            yield from encoded(targets, tokens, self.layout, self.stage.temperature, generator)
        except NotFinite as problem:
            assert inputs.sequences is not None
            row, position = divmod(problem.token, inputs.input_ids.shape[1])
            sequence = inputs.sequences[row]
            raise not_finite(self.work.recipe, self.work.corpus, self.batches, sequence, position) from None

    def finish(self, cost: StageCost | None) -> None:
        """The manifest, once every piece is there.

        Args:
            cost: what making them took; None where all were there.
        """
        target = self.folder / MANIFEST
        if target.exists():
            self.work.say(f"{self.stage.name}: done already")
            return
        sizes = [piece_path(self.folder, number).stat().st_size for number in range(self.pieces)]
        tokens = len(self.batches) * self.batches.sequence_length
        write_json(
            target,
            {
                "format": FORMATS[self.layout.kind],
                "fingerprint": self.fingerprint,
                "key": asdict(self.key),
                "made": self.made,
                "layout": asdict(self.layout),
                "sequences": len(self.batches),
                "piece_sequences": self.piece_sequences,
                "pieces": self.pieces,
                "tokens": tokens,
                "bytes": sum(sizes),
            },
        )
        if cost is not None:
            cost.keep(done=True)
        self.work.say(f"{self.stage.name}: {tokens:,} tokens, {sum(sizes):,} bytes, {sum(sizes) / tokens:.2f} a token")


class NotFinite(Exception):
    """A teacher's logits are not finite numbers at a token of a micro-batch."""

    def __init__(self, token: int) -> None:
        super().__init__(token)
        self.token = token


def encoded(
    targets: Targets, tokens: int, layout: Layout, temperature: float, generator: torch.Generator
) -> Iterator[Any]:
    """The targets of a micro-batch as they are kept, chunk by chunk.

    Raises:
        NotFinite: with the first token of which that is so.
    """
    rows = chunk_rows(layout.vocab_size)
    for begin in range(0, tokens, rows):
        chunk = targets.rows(slice(begin, min(begin + rows, tokens)))
        assert isinstance(chunk, Logits), "a teacher that runs gives logits"
        logits = chunk.values[:, : layout.vocab_size]
        if not bool(logits.isfinite().all()):
            raise NotFinite(begin + int((~logits.isfinite()).any(-1).nonzero()[0]))
        if layout.kind == "top_k":
            yield encode_top_k(TopK.of(logits, layout.most, temperature=temperature), layout)
        else:
            drawn = Sampled.of(logits, layout.most, temperature=temperature, generator=generator)
            yield encode_sampled(drawn.ids)


def _in_order(work: StageWork) -> Batches:
    """The sequences of the training text, which are asked for by their numbers."""
    data, corpus = work.recipe.data, work.corpus
    return corpus.train.batches(
        sequence_length=data.sequence_length,
        seed=0,
        restart_at_documents=data.restart_at_documents,
        start_id=corpus.start_id,
        eos_id=corpus.eos_id,
    )


def _seed(seed: int, number: int) -> int:
    """Of a piece's draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "little")


def expected_entries(logits: torch.Tensor, samples: int, temperature: float) -> torch.Tensor:
    """How many different tokens so many draws give on average: sum over v of 1 - (1 - t_v)^N. [C, V] to [C].

    1 - (1 - t)^N = -expm1(N log1p(-t)).
    """
    t = torch.softmax(logits / temperature, dim=-1).clamp_max_(1.0 - 1e-7)
    return t.neg_().log1p_().mul_(samples).expm1_().neg_().sum(-1)
