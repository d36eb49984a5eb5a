"""What a teacher says about the tokens of a micro-batch, and where that comes from: apart from the loss that uses it.

A `TargetSource` (a model beside the student, several of them, a cache on disk) gives the `Targets` of a micro-batch; a
loss asks them for rows, chunk by chunk, and gets one of four kinds: whole `Logits`, the `TopK` most probable tokens
with the mass of the rest, a few `Sampled` tokens with weights, or `Aligned` logits over another vocabulary. Which kinds
a loss accepts stands with the loss.

Shapes: N tokens of a micro-batch (row-major: token n is position n % S of sequence n // S), C rows of a chunk,
V vocabulary. The target at a token is the teacher's distribution of the token that *follows* it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.chunked import Head
    from edgewright.objective import ModelInputs


@dataclass(frozen=True, slots=True)
class Logits:
    """Whole logits of a chunk."""

    kind: ClassVar[str] = "logits"

    values: Tensor
    """[C, V_teacher] float32 or float64; whoever gets it owns its memory."""

    def rows(self, window: slice) -> Logits:
        """The targets of some of the rows, a view."""
        return Logits(self.values[window])

    def finite(self) -> Tensor:
        """Which rows are finite numbers, bool [C]."""
        return self.values.isfinite().all(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The most probable tokens, and one number for all the others (the "ghost bucket")."""

    kind: ClassVar[str] = "top_k"

    ids: Tensor
    """[N, K] int64, each token once. Where a cache holds fewer than K, any id with log-probability -inf fills up."""
    log_probs: Tensor
    """[N, K] log of the teacher's probabilities (of the whole vocabulary, not renormalised), float32 or float64."""
    tail: Tensor
    """[N] probability of all other tokens together, 1 - sum exp(log_probs) but for rounding."""
    temperature: float = 1.0
    """What the teacher's logits were divided by; it cannot be changed afterwards."""

    def rows(self, window: slice) -> TopK:
        """The targets of some of the rows, views."""
        return replace(self, ids=self.ids[window], log_probs=self.log_probs[window], tail=self.tail[window])

    def finite(self) -> Tensor:
        """Which rows are finite numbers, but for what fills up; bool [N]."""
        return self.log_probs.exp().isfinite().all(-1) & self.tail.isfinite()

    def within(self, vocabulary: int) -> TopK:
        """With the tokens from `vocabulary` on, which the student lacks, moved into the tail."""
        outside = self.ids >= vocabulary
        lost = (self.log_probs.exp() * outside).sum(-1)
        return replace(
            self,
            ids=self.ids.masked_fill(outside, 0),
            log_probs=self.log_probs.masked_fill(outside, -torch.inf),
            tail=self.tail + lost,
        )

    @classmethod
    def of(cls, logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
        """The `k` largest of softmax(logits / temperature), largest first. logits: [N, V].

        Raises:
            RecipeError: EW-780, the vocabulary has no k tokens.
        """
        check_k(k, logits.shape[-1])
        log_probs, ids = F.log_softmax(logits / temperature, dim=-1).topk(k, dim=-1)
        return cls(
            ids=ids,
            log_probs=log_probs,
            tail=(1.0 - log_probs.exp().sum(-1)).clamp_min_(0.0),
            temperature=temperature,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Tokens drawn from the teacher, whose weights have the teacher's probabilities as their mean (RS-KD)."""

    kind: ClassVar[str] = "sampled"

    ids: Tensor
    """[N, U] int64. A token may occur more than once; weight 0 fills up."""
    weights: Tensor
    """[N, U] count / samples, or (t / p) / samples where drawn from a proposal p; not renormalised."""
    temperature: float = 1.0
    """What the teacher's logits were divided by; it cannot be changed afterwards."""

    def rows(self, window: slice) -> Sampled:
        """The targets of some of the rows, views."""
        return replace(self, ids=self.ids[window], weights=self.weights[window])

    def finite(self) -> Tensor:
        """Which rows are finite numbers, bool [N]."""
        return self.weights.isfinite().all(-1)

    def within(self, vocabulary: int) -> Sampled:
        """Without the tokens from `vocabulary` on, which the student lacks."""
        outside = self.ids >= vocabulary
        return replace(self, ids=self.ids.masked_fill(outside, 0), weights=self.weights.masked_fill(outside, 0.0))

    @classmethod
    def of(
        cls,
        logits: Tensor,
        samples: int,
        *,
        temperature: float = 1.0,
        proposal_power: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Sampled:
        """`samples` draws with replacement from p ~ t^proposal_power, where t = softmax(logits / temperature).

        The weight of a draw is (t / p) / samples, so that its mean is t whatever p is.

        Args:
            logits: [N, V].
        """
        log_t = F.log_softmax(logits / temperature, dim=-1)
        log_p = log_t if proposal_power == 1.0 else F.log_softmax(log_t * proposal_power, dim=-1)
        ids = torch.multinomial(log_p.exp(), samples, replacement=True, generator=generator)
        weights = (log_t.gather(-1, ids) - log_p.gather(-1, ids)).exp_().div_(samples)
        return cls(ids=ids, weights=weights, temperature=temperature)


@dataclass(frozen=True, slots=True)
class Aligned:
    """Whole logits of a teacher with another vocabulary, at the tokens of the student that have a place in its text."""

    kind: ClassVar[str] = "aligned"

    values: Tensor
    """[C, V_teacher] float32 or float64."""
    present: Tensor
    """[C] bool: where they mean something."""

    def rows(self, window: slice) -> Aligned:
        """The targets of some of the rows, views."""
        return Aligned(self.values[window], self.present[window])

    def finite(self) -> Tensor:
        """Which rows are finite numbers, bool [C]."""
        return self.values.isfinite().all(-1)


RowTargets = Logits | TopK | Sampled | Aligned


class Targets(Protocol):
    """The targets of a micro-batch. `TopK` and `Sampled` are their own; logits are made chunk by chunk."""

    def rows(self, window: slice) -> RowTargets:
        """Those of a chunk of its N tokens."""


@dataclass(frozen=True, slots=True)
class HeadLogits:
    """Logits that a teacher's head makes of its hidden states when a chunk is asked for."""

    hidden: Tensor
    """[N, H_teacher]"""
    head: Head
    dtype: torch.dtype
    """Of the product."""

    def rows(self, window: slice) -> Logits:
        with torch.no_grad():
            return Logits(self.head(self.hidden[window].to(self.dtype)))


class TargetSource(ABC):
    """Where the targets of a micro-batch come from."""

    gives: ClassVar[type[Logits] | type[TopK] | type[Sampled] | type[Aligned]]
    """The kind of its targets; it decides which losses can use them, before anything is trained."""
    inside: ClassVar[bool] = False
    """Whether it is one model that losses of hidden states can look into (`model`, `architecture`)."""

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:  # noqa: B027 - an optional hook
        """Load or open what gives the targets, and check that it fits the student."""

    @abstractmethod
    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> Targets:
        """The targets of a micro-batch, without gradient. A cache finds them by `inputs.sequences`.

        Args:
            dtype: compute type of the matrix products.
        """

    def architecture(self) -> PretrainedConfig | None:
        """The configuration of that one model, known before it is loaded."""
        return None

    def model(self) -> PreTrainedModel | None:
        """The teacher where there is one model beside the student: it is measured on the held-out text, and losses of
        hidden states look into it while `targets` runs it."""
        return None


FINITE_ROWS = 64
"""Rows that are looked at together."""


def check_k(k: int, vocabulary: int, where: str | None = None) -> None:
    """Refuse to keep more tokens than there are (EW-780)."""
    if not 1 <= k <= vocabulary:
        what, expected = "there are not so many tokens to keep", f"k of 1 to {vocabulary}"
        raise RecipeError("EW-780", what, where=where, expected=expected, found=f"k of {k}")


def finite_rows(targets: Targets, tokens: int) -> Tensor:
    """For each of the N tokens whether its targets are finite numbers, bool [N]."""
    found = [
        targets.rows(slice(start, min(start + FINITE_ROWS, tokens))).finite() for start in range(0, tokens, FINITE_ROWS)
    ]
    return torch.cat(found)
