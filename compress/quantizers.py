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

    codes: Callable[[Tensor, Tensor, Tensor], None]
    """(blocks, steps, out): the codes go into `out`."""
    step: float
    """Of `a`: the distance that code 1 stands for."""
    start: float
    """`a` at first, in mean magnitudes of its group."""
    largest: float
    """The outermost level, of `a`: LSQ's Q_p, in the scale of the gradient."""

    def first(self, blocks: Tensor) -> Tensor:
        """What `a` starts from, [R, G]."""
        return blocks.abs().mean(-1) * self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A rounding rule."""

    paper: str
    round: Callable[[Tensor, Tensor], Tensor] | None = None
    """(blocks, out) -> exact steps [R, G, 1]; the codes go into `out`, float32 [R, G, C]. None: see `learned`."""
    levels: Levels = "ternary"
    """The codes that files store, a key of `export.lattice.LEVELS`."""
    largest: int = 1
    """The largest code."""
    columns: int = 1
    """What the weights of a group must be a multiple of."""
    learned: LearnedScale | None = None
    """In the place of `round`, where the steps do not follow from the weights."""
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


# ---------------------------------------------------------------- the rules

# Rounding happens in every step of training. Hence few temporaries, and none of the operations that cost a CPU ten to
# fifty times a multiplication: torch's median, argmin, aminmax, scatter, and `where` with two numbers.


def _mean(blocks: Tensor, out: Tensor) -> Tensor:
    """Mean magnitude."""
    import torch

    return torch.abs(blocks, out=out).mean(-1)


def _median(blocks: Tensor, out: Tensor) -> Tensor:
    """Median magnitude, the lower one of an even number."""
    import torch

    torch.abs(blocks, out=out)
    if type(out) is not torch.Tensor or out.device.type != "cpu":  # numpy needs memory that is there, and here
        return out.median(-1).values
    values, middle = out.numpy(), (out.shape[-1] - 1) // 2
    values.partition(middle, axis=-1)  # in place
    return out[:, :, middle].clone()


def _nearest(blocks: Tensor, steps: Tensor, out: Tensor) -> None:
    import torch

    torch.div(blocks, steps, out=out).round_().clamp_(-1, 1)


def _odd(blocks: Tensor, steps: Tensor, out: Tensor) -> None:
    """-3, -1, 1, 3: the middles of intervals of two steps; half to even, as ParetoQ rounds."""
    import torch

    torch.div(blocks, 2 * steps, out=out).sub_(0.5).round_().mul_(2).add_(1).clamp_(-3, 3)


def _absmean(blocks: Tensor, out: Tensor) -> Tensor:
    steps = exact_scale(_mean(blocks, out))[:, :, None]
    _nearest(blocks, steps, out)
    return steps


def _absmedian(blocks: Tensor, out: Tensor) -> Tensor:
    steps = exact_scale(_median(blocks, out))[:, :, None]
    _nearest(blocks, steps, out)
    return steps


def _beyond_threshold(blocks: Tensor, out: Tensor) -> Tensor:
    """Signs of the weights beyond TWN's threshold; the step is their mean magnitude, 0 where there is none."""
    import torch

    magnitude = blocks.abs()
    threshold = TWN_THRESHOLD * magnitude.mean(-1, keepdim=True)
    kept = torch.gt(magnitude, threshold, out=magnitude)
    torch.sign(blocks, out=out).mul_(kept)
    count = kept.sum(-1).clamp_(min=1)
    return exact_scale(torch.mul(blocks, out, out=kept).sum(-1) / count)[:, :, None]


def _three_of_four(blocks: Tensor, out: Tensor) -> Tensor:
    """Signs of all but the smallest of every four neighbours, of equals the first; the step is their mean magnitude."""
    import torch

    torch.ge(blocks, 0, out=out).mul_(2).sub_(1)
    magnitude = blocks.abs()
    places = magnitude.reshape(*blocks.shape[:-1], -1, 4).unbind(-1)
    smallest = torch.minimum(torch.minimum(places[0], places[1]), torch.minimum(places[2], places[3]))
    gone = torch.zeros_like(smallest, dtype=torch.bool)
    for values, codes in zip(places, out.view(*blocks.shape[:-1], -1, 4).unbind(-1), strict=True):
        kept = (values != smallest) | gone
        codes.mul_(kept)
        gone |= ~kept
    return exact_scale(torch.mul(blocks, out, out=magnitude).sum(-1) / (0.75 * blocks.shape[-1]))[:, :, None]


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
    "absmean": Quantizer(paper="BitNet b1.58, arXiv 2402.17764", round=_absmean),
    "median": Quantizer(paper="BitNet b1.58 Reloaded, arXiv 2407.09527", round=_absmedian),
    "twn": Quantizer(paper="ternary weight networks, arXiv 1605.04711", round=_beyond_threshold),
    "seq_ternary": Quantizer(
        paper="ParetoQ, arXiv 2502.02631",
        learned=LearnedScale(codes=_nearest, step=2 / 3, start=2.30, largest=2 / 3),
    ),
    "seq_2bit": Quantizer(
        paper="ParetoQ, arXiv 2502.02631",
        levels="int4",
        largest=3,
        learned=LearnedScale(codes=_odd, step=1 / 4, start=2.50, largest=3 / 4),
    ),
    "tequila": Quantizer(paper="Tequila, arXiv 2509.23809", round=_absmean, dead_bias=True),
    "sherry": Quantizer(paper="Sherry, arXiv 2601.07892", round=_three_of_four, columns=4, residual=True),
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
