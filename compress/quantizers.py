"""The rounding rules of ternary training, one small function each, in one table.

A rule gets blocks of weights that share a scale and gives one code for each weight; the weight of the forward is
`code * step`. Shapes: blocks are [R, G, C], R rows of G groups of C weights; steps are [R, G, 1].

Steps are rounded to numbers that fp16 *and* bf16 hold before they are used (`exact_scale`), in which all rules differ
from their papers: so the fp16 scales of file formats, a bf16 autocast and a bf16 save all hold the very weights of the
training forward (but for seq_2bit: bf16 rounds 3 s; the lattice beside a checkpoint has it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from edgewright.export.lattice import Levels

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_LARGEST_BF16 = 65280.0  # the largest bf16 number within fp16's range

TWN_THRESHOLD = 0.75
"""Of the mean magnitude: what loses least of Gaussian weights. TWN's text says 0.7, its authors' code this."""
SEQ_CLIP = 0.99
"""Of SEQ's scale: weights beyond it get no gradient."""

Granularity = Literal["tensor", "row", "group"]
"""What shares a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedScale:
    """What a rule with a trained scale `a` needs besides (ParetoQ's stretched elastic quantization, SEQ)."""

    step: float
    """Of `a`: the distance that code 1 stands for."""
    start: float
    """`a` at first, in mean magnitudes of its group."""
    largest: float
    """The outermost level, of `a`: LSQ's Q_p, in the scale of the gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A rounding rule."""

    paper: str
    codes: Callable[[Tensor, Tensor], Tensor]
    """(blocks, steps) -> codes, float32 [R, G, C]."""
    step: Callable[[Tensor], Tensor]
    """blocks -> steps [R, G], not yet exact; what a learned scale starts from is `LearnedScale.start`."""
    levels: Levels = "ternary"
    """The codes that files store, a key of `export.lattice.LEVELS`."""
    largest: int = 1
    """The largest code."""
    columns: int = 1
    """What the weights of a group must be a multiple of."""
    learned: LearnedScale | None = None
    """None: the steps follow from the weights."""
    dead_bias: bool = False
    """Whether weights of code 0 feed a bias."""
    residual: bool = False
    """Whether a share of the weights themselves is added while training, which fades away (Arenas)."""


def exact_scale(scale: Tensor) -> Tensor:
    """The nearest float32 that fp16 and bf16 both hold exactly: bf16 rounding within fp16's normal range."""
    import torch

    return scale.clamp(FP16_SMALLEST_NORMAL, FP16_LARGEST_BF16).to(torch.bfloat16).float()


def blocks_of(weight: Tensor, granularity: Granularity, group: int) -> Tensor:
    """[rows, columns] as blocks [R, G, C] of weights that share a scale; `group` counts columns, for `group` alone."""
    rows, columns = weight.shape
    shape = {"tensor": (1, 1, rows * columns), "row": (rows, 1, columns), "group": (rows, -1, group)}[granularity]
    return weight.reshape(shape)


# ---------------------------------------------------------------- steps


def _mean(blocks: Tensor) -> Tensor:
    return blocks.abs().mean(-1)


def _median(blocks: Tensor) -> Tensor:
    """The lower one of an even number."""
    return blocks.abs().median(-1).values


def _mean_of_kept(blocks: Tensor) -> Tensor:
    """Mean magnitude of the weights beyond TWN's threshold; 0 where there is none."""
    magnitude = blocks.abs()
    kept = magnitude > TWN_THRESHOLD * magnitude.mean(-1, keepdim=True)
    return (magnitude * kept).sum(-1) / kept.sum(-1).clamp(min=1)


def _mean_of_three(blocks: Tensor) -> Tensor:
    """Mean magnitude of all but the smallest of every four."""
    return (blocks * _three_of_four(blocks)).abs().sum(-1) / (0.75 * blocks.shape[-1])


# ---------------------------------------------------------------- codes


def _nearest(blocks: Tensor, steps: Tensor) -> Tensor:
    return (blocks / steps).round_().clamp_(-1, 1)


def _beyond_threshold(blocks: Tensor, steps: Tensor) -> Tensor:
    magnitude = blocks.abs()
    return blocks.sign() * (magnitude > TWN_THRESHOLD * magnitude.mean(-1, keepdim=True))


def _odd(blocks: Tensor, steps: Tensor) -> Tensor:
    """-3, -1, 1, 3: the middles of intervals of two steps; half to even, as ParetoQ rounds."""
    return (blocks / (2 * steps)).sub_(0.5).round_().mul_(2).add_(1).clamp_(-3, 3)


def _three_of_four(blocks: Tensor) -> Tensor:
    """Signs of all but the smallest of every four neighbours; of equals, the first goes."""
    fours = blocks.reshape(*blocks.shape[:-1], -1, 4)
    signs = (fours >= 0).to(blocks.dtype).mul_(2).sub_(1)
    return signs.scatter_(-1, fours.abs().argmin(-1, keepdim=True), 0).reshape(blocks.shape)


def _signs(blocks: Tensor, steps: Tensor) -> Tensor:
    return _three_of_four(blocks)


# ---------------------------------------------------------------- Sherry's residual

RESIDUAL_WARMUP = 0.1
"""Of all steps: the rise of eps."""


def residual_share(step: int, total_steps: int) -> float:
    """eps of Arenas (Sherry's annealed residual) over its largest value: up in the first tenth, then by a cosine to 0.

    A function of the optimizer steps done, 0 in the last one; the authors' code counts forward calls.
    """
    number, warmup = min(step + 1, total_steps), int(RESIDUAL_WARMUP * total_steps)
    if number <= warmup:
        return number / warmup
    return 0.5 * (1 + math.cos(math.pi * (number - warmup) / (total_steps - warmup)))


# ---------------------------------------------------------------- the table

QUANTIZERS: dict[str, Quantizer] = {
    "absmean": Quantizer(paper="BitNet b1.58, arXiv 2402.17764", step=_mean, codes=_nearest),
    "median": Quantizer(paper="BitNet b1.58 Reloaded, arXiv 2407.09527", step=_median, codes=_nearest),
    "twn": Quantizer(paper="ternary weight networks, arXiv 1605.04711", step=_mean_of_kept, codes=_beyond_threshold),
    "seq_ternary": Quantizer(
        paper="ParetoQ, arXiv 2502.02631",
        step=_mean,
        codes=_nearest,
        learned=LearnedScale(step=2 / 3, start=2.30, largest=2 / 3),
    ),
    "seq_2bit": Quantizer(
        paper="ParetoQ, arXiv 2502.02631",
        step=_mean,
        codes=_odd,
        levels="int4",
        largest=3,
        learned=LearnedScale(step=1 / 4, start=2.50, largest=3 / 4),
    ),
    "tequila": Quantizer(paper="Tequila, arXiv 2509.23809", step=_mean, codes=_nearest, dead_bias=True),
    "sherry": Quantizer(paper="Sherry, arXiv 2601.07892", step=_mean_of_three, codes=_signs, columns=4, residual=True),
}
"""By the name in `quantizer:`. All have the levels -1, 0, 1 but seq_2bit, whose -3, -1, 1, 3 no ternary format holds.

absmean      s = mean|W|; code = clamp(round(w / s), -1, 1)
median       s = median|W|; likewise
twn          code = sign(w) where |w| > 0.75 mean|W|, else 0; s = mean |w| of those that are kept
seq_ternary  levels -2/3 a, 0, 2/3 a; `a` is trained
seq_2bit     levels -3/4 a, -1/4 a, 1/4 a, 3/4 a; `a` is trained
tequila      absmean, and every output gets a bias of `dead_bias` times the sum of its weights of code 0
sherry       the smallest of every four neighbours is 0, the other three are -s or s; s is the mean |w| of those; the
             forward has eps W besides, and eps fades to 0 (`residual_share`)

SEQ's scale starts where the levels lose least of Gaussian weights (2.30 and 2.50 mean magnitudes), not at the largest
weight of the row as in the paper, from where it loses twice as much and has a long way to go.
"""
