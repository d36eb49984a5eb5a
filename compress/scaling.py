"""The scaling law of models whose number of weights changes while they train.

    L(N, D) = E + A / N^a + B / D^b

with D the tokens and N the *average* number of weights over the steps: a gradually pruned model follows the curve of a
dense one of its average size (The Journey Matters, arXiv 2501.12486). The paper's constants are not published, so they
are fitted to runs of one's own, as Hoffmann et al. do (arXiv 2203.15556, approach 3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgewright.compress.pruning import dense_equivalent
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

HUBER = 1e-3
"""Residuals of log L above this count linearly."""
GRID = {
    "log_e": (-1.0, -0.5, 0.0, 0.5, 1.0),
    "log_a": (0.0, 5.0, 10.0, 15.0, 20.0),
    "log_b": (0.0, 5.0, 10.0, 15.0, 20.0),
    "alpha": (0.1, 0.3, 0.5, 1.0),
    "beta": (0.1, 0.3, 0.5, 1.0),
}
"""Starting points of the fit."""
STARTS = 10
"""As many of them, the best, are followed to a minimum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What the law is fitted to."""

    parameters: float
    """Average number of weights over the run; for a dense one their number."""
    tokens: float
    loss: float
    """At the end, in nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLaw:
    """L(N, D) = irreducible + a / N^alpha + b / D^beta, in nats per token."""

    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of a model of that average size after that many tokens."""
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta


DENSE_CHINCHILLA = ScalingLaw(irreducible=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)
"""Hoffmann et al.'s constants for dense models on their corpus: a first guess without runs of one's own."""


def average_parameters(parameters: float, density: float, *, start: float = 0.25, end: float = 0.75) -> float:
    """Average number of weights of a gradually pruned run (`sparse` with a gradual mask): N * C / T.

    Args:
        parameters: weights that are pruned, before pruning; those that are not are added by the caller.
        density: at the end.
        start: share of the compute before pruning.
        end: share of the compute at the end of pruning.
    """
    return parameters * dense_equivalent(1.0, density, start=start, end=end)


def fit(runs: Sequence[TrainingRun]) -> ScalingLaw:
    """The law that fits runs best: least Huber loss of log L, by L-BFGS from the best points of a grid.

    Raises:
        RecipeError: EW-731, the runs do not determine five constants.
    """
    import torch

    _check_determined(runs)
    columns = ([run.parameters for run in runs], [run.tokens for run in runs], [run.loss for run in runs])
    n, d, loss = (torch.tensor(column, dtype=torch.float64).log() for column in columns)
    starts = torch.tensor(list(itertools.product(*GRID.values())), dtype=torch.float64)
    order = _misfit(starts, n, d, loss).argsort()
    ends = torch.stack([_descend(starts[index], n, d, loss) for index in order[:STARTS]])
    e, a, b, alpha, beta = ends[_misfit(ends, n, d, loss).nan_to_num(math.inf).argmin()].tolist()
    return ScalingLaw(irreducible=math.exp(e), a=math.exp(a), b=math.exp(b), alpha=alpha, beta=beta)


def _misfit(constants: Tensor, n: Tensor, d: Tensor, loss: Tensor) -> Tensor:
    """Huber loss of log L, summed over runs, for constants [..., 5] and logarithms [runs]."""
    import torch
    from torch.nn import functional as F

    e, a, b, alpha, beta = (constant[..., None] for constant in constants.unbind(-1))
    predicted = torch.logsumexp(torch.stack(torch.broadcast_tensors(e, a - alpha * n, b - beta * d)), 0)
    return F.huber_loss(predicted, loss.expand_as(predicted), reduction="none", delta=HUBER).sum(-1)


def _descend(start: Tensor, n: Tensor, d: Tensor, loss: Tensor) -> Tensor:
    import torch

    constants = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [constants], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        misfit = _misfit(constants, n, d, loss) / HUBER**2
        misfit.backward()
        return misfit

    optimizer.step(closure)
    return constants.detach()


def _check_determined(runs: Sequence[TrainingRun]) -> None:
    sizes, lengths = {run.parameters for run in runs}, {run.tokens for run in runs}
    if len(runs) >= 5 and len(sizes) >= 3 and len(lengths) >= 3:
        return
    raise RecipeError(
        "EW-731",
        "these runs do not determine the five constants of the scaling law",
        expected="at least 5 runs, of 3 sizes or more and 3 numbers of tokens or more",
        found=f"{len(runs)} runs, {len(sizes)} sizes, {len(lengths)} numbers of tokens",
        fix="add runs of other sizes and lengths",
    )
