"""Layer-by-layer quantization with error feedback: GPTQ over a whole model, in the memory of the model and one block.

Two streams of hidden states walk through the blocks: what the model computes, and what it computes with everything so
far quantized. Linear layers are quantized in the order in which they run, those that share their inputs together, so
that each sees the errors of all before it. With inputs X of the model and Z of the quantized stream, a layer should
still give `X W^T`: the weight that does so best from Z,

    V = W + W (X - Z)^T Z (Z^T Z + damping)^-1,

is rounded in the place of W (the asymmetric calibration of GPTAQ, arXiv:2504.02692, in closed form).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgewright.export.calibration.decoder_blocks import (
    BATCH,
    Arguments,
    block_arguments,
    find_blocks,
    first_hidden,
    inputs_of,
    last_hidden,
    linear_weights,
    run_block,
    set_matrix,
    sharing,
    weight_prefixes,
)
from edgewright.export.calibration.gptq import damped, gptq
from edgewright.export.calibration.search import search
from edgewright.export.lattice import LatticeTensor

DAMP = 0.01
"""Added to the diagonal of a Hessian, as a share of its mean."""

TIED_DAMP = 0.3
"""The same where the head is also the embedding: as an embedding a row is read as it is, so no error is made up for."""

SINK = 4
"""Positions at the start of a sequence that no Hessian counts: their activations are huge, and all alike."""


@dataclass(slots=True)
class Moments:
    """Second moments of what a layer sees, float64 `[in, in]`."""

    hessian: np.ndarray
    """`Z^T Z` of the quantized stream."""
    drift: np.ndarray
    """`(X - Z)^T Z`: how far that stream has left the model's."""

    @classmethod
    def empty(cls, columns: int) -> Moments:
        """Nothing seen so far."""
        return cls(np.zeros((columns, columns)), np.zeros((columns, columns)))

    def add(self, reference: Tensor, quantized: Tensor) -> None:
        """Count more inputs, `[sequences, length, in]` of both streams (or `[tokens, in]`, where a model flattens)."""
        right, found = (
            (value[:, SINK:] if value.ndim == 3 else value).flatten(0, -2) for value in (reference, quantized)
        )
        self.hessian += (found.T @ found).numpy()
        self.drift += ((right - found).T @ found).numpy()


def corrected(weight: np.ndarray, moments: Moments) -> np.ndarray:
    """The weight that, from the quantized stream's inputs, gives the model's outputs as well as a weight can."""
    wanted = weight.astype(np.float64)
    return wanted + np.linalg.solve(damped(moments.hessian, DAMP), (wanted @ moments.drift).T).T


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be quantized, and how."""

    matrix: Callable[[str], np.ndarray]
    """The float32 weight `[out, in]` of a name: `Source.matrix`."""
    bits: Mapping[str, int]
    """The width of each weight to quantize, by name; all others are left alone."""
    group: int
    embedding: str
    head: str
    """Equal to `embedding` where the two are one weight."""
    say: Callable[[str], None]

    def rounded(self, name: str, moments: Moments) -> LatticeTensor:
        """The lattice of one linear weight."""
        wanted = corrected(self.matrix(name), moments)
        return gptq(wanted, moments.hessian, bits=self.bits[name], group=self.group, damp=DAMP)


def quantize_layerwise(model: PreTrainedModel, sequences: Tensor, task: Task) -> dict[str, LatticeTensor]:
    """Quantize a model in place.

    Args:
        model: in float32; its weights are replaced.
        sequences: calibration text `[count, length]`.
        task: which weights, at which width.

    Returns:
        The lattice of every weight of `task.bits` that the text reaches.

    Raises:
        BadInput: EW-552, the model is not built as one stack of blocks.
    """
    blocks = find_blocks(model)
    prefixes = weight_prefixes(model, blocks)
    arguments = block_arguments(model, blocks, sequences[0])
    outcome = last_hidden(model, sequences)
    streams = [first_hidden(model, blocks, sequences)]
    lattice = _embedding(model, outcome, task)
    streams.append(first_hidden(model, blocks, sequences))
    for index, block in enumerate(blocks):
        reference = copy.deepcopy(block)
        lattice |= _block(block, reference, prefixes[index], streams, arguments[index], task)
        for stream, one in zip(streams, (reference, block), strict=True):
            for start in range(0, len(stream), BATCH):
                part = slice(start, start + BATCH)
                stream[part] = run_block(one, stream[part], arguments[index])
        task.say(f"quantized block {index + 1} of {len(blocks)}")
    return lattice | _head(model, outcome, sequences, task)


def _embedding(model: PreTrainedModel, outcome: Tensor, task: Task) -> dict[str, LatticeTensor]:
    """The token embedding; where it is the head as well, what the head sees decides."""
    if task.embedding not in task.bits:
        return {}
    weight, bits = task.matrix(task.embedding), task.bits[task.embedding]
    if task.embedding == task.head:
        moments = Moments.empty(weight.shape[1])
        moments.add(outcome, outcome)
        found = gptq(weight, moments.hessian, bits=bits, group=task.group, damp=TIED_DAMP)
    else:
        found = search(weight, bits=bits, group=task.group)
    set_matrix(model.get_input_embeddings(), found.dequantize())
    return {task.embedding: found}


def _block(
    block: nn.Module,
    reference: nn.Module,
    prefix: str,
    streams: list[Tensor],
    arguments: Arguments,
    task: Task,
) -> dict[str, LatticeTensor]:
    """The linear layers of one block, in the order in which they run."""
    layers, originals = linear_weights(block, prefix), linear_weights(reference, prefix)
    lattice = {}
    for names in sharing(block, layers, streams[1][:1], arguments):
        wanted = [name for name in names if name in task.bits]
        if not wanted:
            continue
        moments = Moments.empty(task.matrix(wanted[0]).shape[1])
        for start in range(0, len(streams[0]), BATCH):
            right, found = (
                inputs_of(one, layer[names[0]], stream[start : start + BATCH], arguments)
                for one, layer, stream in zip((reference, block), (originals, layers), streams, strict=True)
            )
            moments.add(right, found)
        for name in wanted:
            lattice[name] = task.rounded(name, moments)
            set_matrix(layers[name], lattice[name].dequantize())
    return lattice


def _head(model: PreTrainedModel, outcome: Tensor, sequences: Tensor, task: Task) -> dict[str, LatticeTensor]:
    """The output head, where it is a weight of its own."""
    if task.head == task.embedding or task.head not in task.bits:
        return {}
    moments = Moments.empty(outcome.shape[-1])
    moments.add(outcome, last_hidden(model, sequences))
    return {task.head: task.rounded(task.head, moments)}
