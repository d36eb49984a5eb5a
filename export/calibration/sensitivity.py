"""Which weights deserve 8 bits: each is made narrow alone, and the KL that costs decides where a budget is spent.

Weights that read the same inputs (the projections of an attention, gate and up of an MLP) are one unit: runtimes join
them in one matrix, which has one width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgewright.export.calibration.decoder_blocks import BATCH, set_matrix, weight_of
from edgewright.export.lattice import ceil_div

NARROW, WIDE = 4, 8

MAX_LOGITS = 2**24
"""Logits in memory at most (64 MB each for the model and its candidate)."""

PROBE_TOKENS = 2048
"""Tokens of calibration text on which a unit is judged, at most."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that get one width together."""

    names: tuple[str, ...]
    extra: float
    """Bytes that 8 bits take more than 4."""
    loss: float
    """KL, nats per token, when this unit alone has 4 bits."""


def measure(
    model: PreTrainedModel,
    sequences: Tensor,
    units: Sequence[Sequence[str]],
    layers: Mapping[str, nn.Module],
    rounded: Callable[[str], np.ndarray],
) -> list[float]:
    """The KL in nats per token that each unit costs when it alone is rounded.

    Args:
        model: in full precision; every weight is put back after its turn.
        sequences: calibration text `[count, length]`.
        units: the names of the weights that are rounded together.
        layers: the layer of each weight.
        rounded: the narrow float32 `[out, in]` of a name.
    """
    probe = sequences[: max(1, PROBE_TOKENS // sequences.shape[1])]
    reference = log_probabilities(model, probe)
    losses = []
    for names in units:
        kept = {name: weight_of(layers[name]).detach().clone() for name in names}
        for name in names:
            set_matrix(layers[name], rounded(name))
        losses.append(max(0.0, divergence(reference, log_probabilities(model, probe))))
        for name, value in kept.items():
            with torch.no_grad():
                weight_of(layers[name]).copy_(value)
    return losses


def choose(units: Sequence[Unit], budget: float) -> frozenset[str]:
    """The names that get 8 bits: the units whose KL falls most per byte, as long as the bytes last.

    Greedy by gain per byte, in the order given where equal; a unit that no longer fits is passed over for smaller ones.
    Never worse than the best single unit that fits, so at least half as good as the optimum.

    Args:
        units: all that may be widened.
        budget: bytes to spend on widening.
    """
    order = sorted(range(len(units)), key=lambda index: (-units[index].loss / units[index].extra, index))
    taken, left = [], budget
    for index in order:
        if units[index].extra <= left:
            taken.append(units[index])
            left -= units[index].extra
    single = max((unit for unit in units if unit.extra <= budget), key=lambda unit: unit.loss, default=None)
    if single is not None and single.loss > sum(unit.loss for unit in taken):
        taken = [single]
    return frozenset(name for unit in taken for name in unit.names)


def widening(shape: tuple[int, ...], group: int) -> float:
    """Bytes that a matrix `[out, in]` takes more at 8 bits than at 4, in every format with the same scales for both."""
    rows, columns = shape
    return rows * ceil_div(columns, group) * group * (WIDE - NARROW) / 8


def log_probabilities(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """What a model predicts on sequences `[count, length]`: float32 `[positions, vocabulary]`, evenly spread."""
    count, length = sequences.shape
    each = max(1, min(length, MAX_LOGITS // int(model.config.vocab_size) // count))
    kept = torch.arange(length - 1, -1, -ceil_div(length, each)).flip(0)
    with torch.inference_mode():
        parts = [
            model(input_ids=part, use_cache=False, logits_to_keep=kept).logits.flatten(0, 1)
            for part in sequences.split(BATCH)
        ]
        return torch.log_softmax(torch.cat(parts).float(), dim=-1)


def divergence(right: Tensor, found: Tensor) -> float:
    """Mean KL(right || found) over rows of log-probabilities, nats."""
    return float((right.exp().double() * (right - found).double()).sum(dim=-1).mean())
