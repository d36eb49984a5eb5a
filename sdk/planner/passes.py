"""Forward passes of teachers without memory: what a batch of targets takes, and a batch of continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from edgewright.chunked import chunk_rows
from edgewright.compress.cache_config import CacheStageConfig, TopKConfig
from edgewright.compress.continuation import Reader, choose, sum_of
from edgewright.compress.targets import Logits, Sampled, TopK
from edgewright.compress.teacher import Ensemble, OnlineTeacher
from edgewright.planner.heap import typical_peak
from edgewright.planner.ledger import Ledger
from edgewright.planner.simulate import ATTENTION, made_inputs, weightless, without_warnings, young_garbage
from edgewright.planner.teachers import parameter_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COUNTED = 2
"""Chunks that are simulated: the second one finds the first one's blocks freed, as all further ones do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one batch takes."""

    memory: dict[str, int]
    """Bytes by part, at the moment of the peak."""
    heap: int
    """Bytes that the heap of a C library takes for it."""
    parameters: int
    """Of the models."""
    flops: float
    """Products of matrices and attention; a multiply-add counts as two."""
    operations: float
    """Kernels that are called, about."""
    moved_bytes: float
    """Weights that are read, once for every forward, and blocks that operations write."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Work between two moments."""

    flops: float
    operations: int
    written: int
    """Bytes of new blocks."""

    def times(self, factor: float, weights: int = 0) -> tuple[float, float, float]:
        return factor * self.flops, factor * self.operations, factor * (self.written + weights)


class _Simulation:
    """Models without memory, and a ledger of what they do."""

    def __init__(self, ledger: Ledger, models: Sequence[PreTrainedModel]) -> None:
        self.ledger = ledger
        self.models = models
        self._counts: list[_Counts] = []

    @contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Count what happens inside the block, whose tensors are for this part; `last` has it afterwards."""
        ledger, counter = self.ledger, FlopCounterMode(display=False, custom_mapping=ATTENTION)
        operations, events = ledger.operations, len(ledger.events)
        with ledger.part(part), counter:
            yield
        written = sum(size for _, size in ledger.events[events:] if size > 0)
        self._counts.append(_Counts(counter.get_total_flops(), ledger.operations - operations, written))

    @property
    def last(self) -> _Counts:
        return self._counts[-1]

    def summed(self, *parts: tuple[float, float, float]) -> Pass:
        flops, operations, moved = (sum(column) for column in zip(*parts, strict=True))
        return Pass(
            memory=dict(self.ledger.peak),
            heap=typical_peak(self.ledger.events, (), 0),
            parameters=sum(map(parameter_count, self.models)),
            flops=flops,
            operations=operations,
            moved_bytes=moved,
        )


@contextmanager
def _simulation(models: Sequence[PreTrainedModel]) -> Iterator[_Simulation]:
    ledger = Ledger()
    with without_warnings(), young_garbage(), FakeTensorMode(allow_non_fake_inputs=True), ledger, torch.no_grad():
        yield _Simulation(ledger, models)


class _Loaded(OnlineTeacher):
    """A teacher whose weights are booked while it is open."""

    def __init__(self, template: PreTrainedModel, ledger: Ledger) -> None:
        super().__init__(model=template)
        self._template, self._ledger = template, ledger
        self._model = None

    def open(self) -> PreTrainedModel:
        if self._model is None:
            with self._ledger.part("teacher"):
                self._model = weightless(self._template).eval().requires_grad_(False)
        return self._model

    def release(self) -> None:
        self._model = None


def weight_bytes(models: Sequence[PreTrainedModel]) -> int:
    """Of parameters and buffers."""
    return sum(t.numel() * t.element_size() for model in models for t in (*model.parameters(), *model.buffers()))


def reading(
    stage: CacheStageConfig, models: Sequence[PreTrainedModel], length: int, borders: bool, precision: str
) -> Pass:
    """One batch of a cache stage: hidden states of `per_device_batch_size` sequences, targets chunk by chunk.

    Args:
        models: the teachers on meta, as their weights are held.
        borders: whether documents meet inside sequences.

    Raises:
        RuntimeError: the architecture does what cannot be done without data.
    """
    rows, dtype = stage.per_device_batch_size, DTYPES[precision]
    with _simulation(models) as simulation:
        ledger = simulation.ledger
        source = _source(stage, models, ledger)
        source.prepare(None, torch.device("cpu"))
        with ledger.part("other"):
            inputs = made_inputs(rows, length, borders)
        with simulation.counted("activations"):
            targets = source.targets(inputs, dtype)
        body = simulation.last
        vocabulary = min(model.config.get_text_config().vocab_size for model in models)
        tokens, size = rows * length, min(chunk_rows(vocabulary), rows * length)
        for _ in range(COUNTED):
            with simulation.counted("logits"):
                chunk = targets.rows(slice(0, size))
                assert isinstance(chunk, Logits), "a teacher that runs gives logits"
                _kept(stage, chunk.values)
                del chunk
        return simulation.summed(body.times(1.0, weight_bytes(models)), simulation.last.times(tokens / size))


def _source(stage: CacheStageConfig, models: Sequence[PreTrainedModel], ledger: Ledger) -> OnlineTeacher | Ensemble:
    members = [_Loaded(model, ledger) for model in models]
    if stage.teacher.type != "ensemble":
        return members[0]
    return Ensemble(members, resident=stage.teacher.resident)


def _kept(stage: CacheStageConfig, logits: torch.Tensor) -> None:
    """The targets of a chunk, as the stage makes them."""
    if isinstance(stage.targets, TopKConfig):
        TopK.of(logits, min(stage.targets.k, logits.shape[-1]), temperature=stage.temperature)
    else:
        drawn = Sampled.of(logits, stage.targets.samples, temperature=stage.temperature)
        drawn.ids.sort(-1)


def writing(models: Sequence[PreTrainedModel], rows: int, prompt: int, new: int, precision: str) -> Pass:
    """One batch of a generate stage: the prompts at once, then token after token to the last.

    Args:
        models: the teachers on meta, as their weights are held; all of them in memory.
        prompt: tokens of a prompt; new: tokens after it, of which the first comes of reading the prompt.

    Raises:
        RuntimeError: as `reading`.
    """
    dtype = DTYPES[precision]
    with _simulation(models) as simulation:
        with simulation.ledger.part("teacher"):
            held = [weightless(model).eval().requires_grad_(False) for model in models]
        readers = [Reader(model, dtype) for model in held]
        with simulation.counted("activations"):
            _next(readers, rows, prompt, prompt)
        weights = weight_bytes(models)
        parts = [simulation.last.times(1.0, weights)]
        if new > 1:  # the work of a token rises evenly with those before it: its mean is that of the first and last
            for total in (prompt + 1, prompt + new - 1):
                _extend(readers, total - 1)
                with simulation.counted("activations"):
                    _next(readers, rows, 1, total)
                parts.append(simulation.last.times((new - 1) / 2, weights))
        return simulation.summed(*parts)


def _next(readers: list[Reader], rows: int, tokens: int, total: int) -> None:
    """Read so many tokens of every row and choose the one after them."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones(rows, total, dtype=torch.long)
    positions = torch.zeros(rows, tokens, dtype=torch.long)
    logits = sum_of([reader.next_logits(ids, mask, positions) for reader in readers])
    choose(logits, torch.ones(rows, 1), None)


def _extend(readers: list[Reader], length: int) -> None:
    """Let the keys and values be as long as they are after so many tokens."""
    for reader in readers:
        past: Any = reader.past
        for index, layer in enumerate(past.layers):
            *before, have, size = layer.keys.shape
            if have < length:
                more = torch.empty(*before, length - have, size, dtype=layer.keys.dtype)
                past.update(more, more, index)
