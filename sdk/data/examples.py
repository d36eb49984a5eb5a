"""Examples on disk: their tokens one after another, and a byte beside each that says whether it is learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgewright.data.layout import Encoding, Layout
from edgewright.data.shards import StreamWriter, TokenStream, open_stream
from edgewright.data.split import CountSplit, Side, Split
from edgewright.data.text import Document
from edgewright.data.tokenizer import Encoder
from edgewright.errors import BadInput

if TYPE_CHECKING:
    from edgewright.data.batches import Batches
    from edgewright.data.held_out import HeldOut
    from edgewright.data.source import Source

COUNTED, FIRST = 1, 2
"""Bits of the byte: the token is learned; it begins an example."""
_AT_ONCE = 512
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, slots=True)
class ExampleStream(TokenStream):
    """The examples of one split; `bytes` are those of the text that is learned."""

    flags: np.ndarray
    """Memory-mapped, uint8 [tokens]."""

    @property
    def predicted(self) -> int:
        """Tokens that are learned."""
        return int(np.count_nonzero(self.flags & COUNTED))

    def starts(self) -> np.ndarray:
        """Where each example begins, and where the last one ends: int64 [documents + 1]."""
        return np.append(np.flatnonzero(self.flags & FIRST), len(self.flags)).astype(np.int64)

    def examples(self) -> Iterator[tuple[list[int], list[bool]]]:
        """The tokens of every example, and which of them are learned."""
        starts = self.starts()
        for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            yield self.tokens[begin:end].tolist(), (self.flags[begin:end] & COUNTED).astype(bool).tolist()

    def sequences(self, sequence_length: int) -> int:
        return self.documents

    def for_evaluation(self, source: Source, split: Split, most: int | None) -> HeldOut:
        from edgewright.data.held_out import HeldOutExamples

        return HeldOutExamples(list(islice(self.examples(), most)), self.bytes / max(1, self.predicted))

    def batches(
        self, *, sequence_length: int, seed: int, restart_at_documents: bool, start_id: int, eos_id: int
    ) -> Batches:
        from edgewright.data.packing import PackedBatches

        return PackedBatches(
            self, sequence_length=sequence_length, seed=seed, restart_at_documents=restart_at_documents, eos_id=eos_id
        )


class ExampleWriter(StreamWriter):
    """Writes one split, an example at a time."""

    def __init__(self, directory: Path, side: Side, encoder: Encoder) -> None:
        super().__init__(
            directory / f"{side}.bin", dtype=encoder.dtype, start_id=encoder.start_id, eos_id=encoder.eos_id
        )
        self.flags = StreamWriter(directory / f"{side}.flags.bin", dtype=np.uint8, start_id=0, eos_id=0)
        self.counted = 0

    def example(self, ids: np.ndarray, counted: np.ndarray, size: int) -> None:
        """Append an example.

        Args:
            ids: [tokens].
            counted: bool [tokens].
            size: UTF-8 bytes of what is learned.
        """
        self.documents += 1
        self.bytes += size
        self.counted += int(counted.sum())
        flags = counted.astype(np.uint8) * COUNTED
        flags[0] |= FIRST
        self.add(ids)
        self.flags.add(flags)

    def close(self) -> dict[str, Any]:
        return {**self.finish(), "counted": self.counted}

    def beside(self) -> dict[str, Any]:
        return {f"{self.path.stem}.flags": self.flags.finish()}

    def abort(self) -> None:
        super().abort()
        self.flags.abort()


class ExampleLayout(Layout):
    """Whole examples, which are packed into sequences when they are read."""

    running_text = False

    def writer(self, directory: Path, side: Side, encoder: Encoder) -> StreamWriter:
        return ExampleWriter(directory, side, encoder)

    def few(self, documents: Iterable[Document], *, total: int, held_out: float) -> Split | None:
        """The last examples."""
        return CountSplit.find(sum(1 for _ in documents), held_out=held_out)

    def encode(self, work: Encoding) -> dict[str, Any]:
        """Write every example, but those that are too long for the recipe.

        Raises:
            BadInput: EW-242, examples that are too long; EW-243, a mask that is all ones or all zeros.
        """
        long = _Long(work.config.sequence_length, work.config.on_long)
        spoken = time.monotonic()
        stream = work.split.divide(work.documents)
        while batch := list(islice(stream, _AT_ONCE)):
            encoded = work.encoder.encode_segments([document.segments for _, document in batch])
            for (side, document), parts in zip(batch, encoded, strict=True):
                writer = work.writers[side]
                assert isinstance(writer, ExampleWriter)
                ids = np.concatenate(parts)
                counted = np.repeat([segment.counted for segment in document.segments], [len(part) for part in parts])
                kept = long.fit(document, ids, counted)
                if kept:
                    writer.example(ids[:kept], counted[:kept], _learned_bytes(document, parts, kept, work.special))
            if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                work.say(f"tokenized {sum(writer.documents for writer in work.writers.values()):,} examples")
        long.check()
        for side, writer in work.writers.items():
            assert isinstance(writer, ExampleWriter)
            _check_mask(side, writer)
        for line in long.lines():
            work.say(line)
        writers = [writer for writer in work.writers.values() if isinstance(writer, ExampleWriter)]
        learned, size = sum(writer.counted for writer in writers), sum(writer.bytes for writer in writers)
        return {
            "documents": sum(writer.documents for writer in writers),
            "bytes_per_token": size / max(1, learned),
            "counted_tokens": learned,
            **long.counts,
        }

    def open(self, directory: Path, files: dict[str, Any], side: Side) -> TokenStream:
        entry, flags = files[side], files[f"{side}.flags"]
        tokens = open_stream(directory, entry)
        return ExampleStream(
            tokens=tokens.tokens,
            documents=entry["documents"],
            bytes=entry["bytes"],
            flags=open_stream(directory, flags).tokens,
        )


_COUNTS = ("truncated", "cut_tokens", "too_long", "without_completion")


class _Long:
    """What is done with examples that are too long, and how many there were."""

    def __init__(self, sequence_length: int, policy: Literal["refuse", "truncate", "skip"]) -> None:
        self.limit = sequence_length + 1  # the last token of an example is predicted and no input
        self.policy = policy
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.longest: tuple[int, str] = (0, "")

    def fit(self, document: Document, ids: np.ndarray, counted: np.ndarray) -> int:
        """Tokens of an example that are kept."""
        if len(ids) <= self.limit:
            return len(ids)
        self.longest = max(self.longest, (len(ids), f"{document.file}:{document.line}"))
        if self.policy != "truncate":
            self.counts["too_long"] += 1
            return 0
        if not counted[1 : self.limit].any():
            self.counts["without_completion"] += 1
            return 0
        self.counts["truncated"] += 1
        self.counts["cut_tokens"] += len(ids) - self.limit
        return self.limit

    def check(self) -> None:
        """EW-242, where the recipe refuses."""
        if self.policy == "refuse" and self.counts["too_long"]:
            size, where = self.longest
            raise BadInput(
                "EW-242",
                f"{self.counts['too_long']:,} examples are longer than a sequence",
                where=where,
                expected=f"at most {self.limit:,} tokens (data.sequence_length and the token that comes last)",
                found=f"{size:,} tokens in the longest, at this line",
                fix=f"data.sequence_length: {size - 1}; or data.on_long: truncate (cut the end off), skip (drop it)",
            )

    def lines(self) -> Iterator[str]:
        """The counts in words."""
        truncated, cut, dropped, without = (self.counts[name] for name in _COUNTS)
        if truncated:
            yield f"{truncated:,} examples are too long: {cut:,} tokens at their ends are cut off"
        if without:
            yield f"{without:,} examples are dropped: cut off, nothing of their completions would be left"
        if dropped:
            yield f"{dropped:,} examples are too long and dropped"


def _check_mask(side: Side, writer: ExampleWriter) -> None:
    """EW-243, where everything is learned or nothing."""
    predictable = writer.tokens - writer.documents
    if not writer.documents or 0 < writer.counted < predictable:
        return
    everything = writer.counted > 0
    raise BadInput(
        "EW-243",
        f"the loss mask of the {side.replace('_', '-')} examples is all {'ones' if everything else 'zeros'}",
        where="data",
        expected="prompts that are masked and completions that are learned",
        found=f"{writer.counted:,} of {predictable:,} tokens are learned",
        fix="for text without prompts use data.type: files"
        if everything
        else "look at it: edgewright check --show-batch",
    )


def _learned_bytes(document: Document, parts: Sequence[np.ndarray], kept: int, visible: Callable[[Any], str]) -> int:
    """UTF-8 bytes of the text that is learned; of a segment that is cut its share."""
    total, begin = 0.0, 0
    for segment, part in zip(document.segments, parts, strict=True):
        left = min(len(part), max(0, kept - begin))
        begin += len(part)
        if segment.counted and len(part):
            total += len(visible(segment).encode()) * left / len(part)
    return round(total)
