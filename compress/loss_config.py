"""The weighted losses of a recipe: `losses: [{function: forward_kl, weight: 0.9, temperature: 2.0}, ...]`.

Every function has its settings here, and builds what trains by it; the formulas stand with the functions.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.schedule import ScheduleConfig

if TYPE_CHECKING:
    from edgewright.compress.hidden_terms import HiddenLoss
    from edgewright.compress.loss_rule import DenseLoss, TokenLoss

REST: Literal["rest"] = "rest"
MODEL = "model"
"""Beside the kinds of targets: the teacher itself, into which losses of hidden states look."""


class WeightedConfig(BaseModel):
    """How much a loss counts, over the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    accepts: ClassVar[tuple[str, ...]] = ("logits",)
    """Kinds of the teacher's targets that it can use (`targets.RowTargets`); none: it asks for no targets."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["rest"] = 1.0
    """Factor of the loss; rest: what the other weights leave of 1, at every step."""
    schedule: ScheduleConfig | None = None
    """Multiplies the weight as it does a learning rate: `{type: wsd, warmup_ratio: 0.1, decay_ratio: 0.2}` climbs,
    stays and falls. null: constant."""

    def weight_at(self, step: int, total_steps: int) -> float:
        """Its weight at an optimizer step; 0 for `rest`, which is for whoever knows the others."""
        if self.weight == REST:
            return 0.0
        return self.weight * (1.0 if self.schedule is None else self.schedule.factor(step, total_steps))


class TokenLossConfig(WeightedConfig):
    """A loss of the distribution of each next token."""

    function: str

    def build(self) -> TokenLoss:
        """What computes it, chunk by chunk."""
        raise NotImplementedError


class CrossEntropyConfig(TokenLossConfig):
    """Cross-entropy with the tokens of the text, -log q of the next one; the teacher has no part in it."""

    accepts: ClassVar[tuple[str, ...]] = ()
    function: Literal["cross_entropy"] = "cross_entropy"

    def build(self) -> TokenLoss:
        from edgewright.compress.loss_rule import CrossEntropy

        return CrossEntropy()


class _Softened(TokenLossConfig):
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """T: both distributions are softened by it, and the loss is multiplied by T^2."""


class ForwardKLConfig(_Softened):
    """Forward KL divergence, sum t log(t / q): covers all that the teacher deems possible (arXiv 1503.02531)."""

    function: Literal["forward_kl"] = "forward_kl"

    def build(self) -> DenseLoss:
        from edgewright.compress.divergences import forward_kl_rows
        from edgewright.compress.loss_rule import DenseLoss

        return DenseLoss(forward_kl_rows, self.temperature)


class ReverseKLConfig(_Softened):
    """Reverse KL divergence, sum q log(q / t): seeks the teacher's modes (MiniLLM, arXiv 2306.08543)."""

    function: Literal["reverse_kl"] = "reverse_kl"

    def build(self) -> DenseLoss:
        from edgewright.compress.divergences import reverse_kl_rows
        from edgewright.compress.loss_rule import DenseLoss

        return DenseLoss(reverse_kl_rows, self.temperature)


class JsdConfig(_Softened):
    """Generalised Jensen-Shannon divergence between forward KL (small beta) and reverse KL (GKD, arXiv 2306.13649)."""

    function: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture. At 0 and 1 the divergence is 0: take forward_kl or reverse_kl."""

    def build(self) -> DenseLoss:
        from edgewright.compress.divergences import jsd_rows
        from edgewright.compress.loss_rule import DenseLoss

        return DenseLoss(partial(jsd_rows, beta=self.beta), self.temperature)


class SkewForwardKLConfig(_Softened):
    """Skewed forward KL, KL(t | alpha t + (1 - alpha) q): bounded (DistiLLM, arXiv 2402.03898)."""

    function: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Share of the teacher in the mixture; 0 is forward_kl."""

    def build(self) -> DenseLoss:
        from edgewright.compress.divergences import skew_forward_kl_rows
        from edgewright.compress.loss_rule import DenseLoss

        return DenseLoss(partial(skew_forward_kl_rows, alpha=self.alpha), self.temperature)


class SkewReverseKLConfig(_Softened):
    """Skewed reverse KL, KL(q | (1 - alpha) t + alpha q): bounded (DistiLLM, arXiv 2402.03898)."""

    function: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Share of the student in the mixture; 0 is reverse_kl."""

    def build(self) -> DenseLoss:
        from edgewright.compress.divergences import skew_reverse_kl_rows
        from edgewright.compress.loss_rule import DenseLoss

        return DenseLoss(partial(skew_reverse_kl_rows, alpha=self.alpha), self.temperature)


class TotalVariationConfig(_Softened):
    """Total variation distance: 1 less the acceptance rate of a draft that samples (DistillSpec, arXiv 2310.08461)."""

    function: Literal["total_variation"] = "total_variation"

    def build(self) -> DenseLoss:
        from edgewright.compress.divergences import total_variation_rows
        from edgewright.compress.loss_rule import DenseLoss

        return DenseLoss(total_variation_rows, self.temperature)


class LkHybridConfig(_Softened):
    """For drafts: forward KL that gives way to total variation as more is accepted (LK losses, arXiv 2602.23881)."""

    function: Literal["lk_hybrid"] = "lk_hybrid"
    decay: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    """The share of KL is exp(-decay * acceptance rate), for each token; 0 is forward_kl."""

    def build(self) -> DenseLoss:
        from edgewright.compress.divergences import lk_hybrid_rows
        from edgewright.compress.loss_rule import DenseLoss

        return DenseLoss(partial(lk_hybrid_rows, decay=self.decay), self.temperature)


class TopKConfig(_Softened):
    """Forward KL over the teacher's k best tokens, and a ghost bucket for all others (arXiv 2503.16870)."""

    accepts: ClassVar[tuple[str, ...]] = ("top_k", "logits")
    function: Literal["top_k"] = "top_k"
    k: int = Field(default=50, gt=0)
    """Tokens kept of a teacher that runs beside the student; a cache has a k of its own."""

    def build(self) -> TokenLoss:
        from edgewright.compress.loss_rule import SparseLoss
        from edgewright.compress.sparse_losses import top_k_rows
        from edgewright.compress.targets import TopK

        return SparseLoss(top_k_rows, partial(TopK.of, k=self.k, temperature=self.temperature), self.temperature)


class RsKdConfig(_Softened):
    """Random-sampling distillation: cross-entropy with tokens drawn from the teacher, unbiased (arXiv 2503.16870)."""

    accepts: ClassVar[tuple[str, ...]] = ("sampled", "logits")
    function: Literal["rs_kd"] = "rs_kd"
    samples: int = Field(default=50, gt=0)
    """Draws for each token from a teacher that runs beside the student; a cache has a number of its own."""

    def build(self) -> TokenLoss:
        from edgewright.compress.loss_rule import SparseLoss
        from edgewright.compress.sparse_losses import rs_kd_rows
        from edgewright.compress.targets import Sampled

        made = partial(Sampled.of, samples=self.samples, temperature=self.temperature)
        return SparseLoss(rs_kd_rows, made, self.temperature)


class UldConfig(_Softened):
    """For a teacher with another tokenizer: sorted probabilities are compared, whatever tokens they are of (ULD).

    arXiv 2402.12030. Tokens are compared where both models have read the same bytes; the others cost nothing. It does
    not say which tokens are meant, so it needs cross_entropy beside it.
    """

    accepts: ClassVar[tuple[str, ...]] = ("aligned", "logits")
    function: Literal["uld"] = "uld"

    def build(self) -> TokenLoss:
        from edgewright.compress.uld import Uld

        return Uld(self.temperature)


class HiddenLossConfig(WeightedConfig):
    """A loss of hidden states, for which the teacher has to run beside the student."""

    accepts: ClassVar[tuple[str, ...]] = (MODEL,)
    function: str

    def build(self) -> HiddenLoss:
        """What computes it."""
        raise NotImplementedError


class MiniLMConfig(HiddenLossConfig):
    """Attention relations among queries, keys and values of one layer (MiniLMv2, arXiv 2012.15828)."""

    function: Literal["minilm"] = "minilm"
    student_layer: int | None = Field(default=None, gt=0)
    """Its block, from 1; null: the last."""
    teacher_layer: int | None = Field(default=None, gt=0)
    """null: the last; an upper middle one is better for large teachers (21 of 24 in the paper)."""
    relation_heads: int | None = Field(default=None, gt=0)
    """What the widths of both models are cut into; null: the student's attention heads."""

    def build(self) -> HiddenLoss:
        from edgewright.compress.hidden_terms import MiniLM

        return MiniLM(self.student_layer, self.teacher_layer, self.relation_heads)


class TinyBertConfig(HiddenLossConfig):
    """Hidden states of mapped layers through one learned projection, mean square (TinyBERT, arXiv 1909.10351)."""

    function: Literal["tinybert"] = "tinybert"
    layers: tuple[tuple[int, int], ...] | None = Field(default=None, min_length=1)
    """Pairs of a student's layer and a teacher's, 0 the embeddings; null: evenly, i and i * L_teacher / L_student."""

    def build(self) -> HiddenLoss:
        from edgewright.compress.hidden_terms import TinyBert

        return TinyBert(self.layers)


class HadConfig(HiddenLossConfig):
    """Features of visible tokens aligned with the teacher's, hidden tokens reconstructed from them (HAD).

    The student sees a text of which a share is hidden, the teacher all of it. After Hybrid Architecture Distillation
    (arXiv 2505.20836), of which only a description of the formula was at hand; there both models see in both
    directions. Here the student is causal, and it is the decoder that looks both ways. All other losses of the list
    train on the same view.
    """

    function: Literal["had"] = "had"
    mask_ratio: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that the student does not see."""
    span: int = Field(default=1, gt=0)
    """Tokens that are hidden together."""
    reconstruction: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy of hidden tokens beside the alignment; 0: no decoder."""

    def longest_span(self, length: int) -> int:
        """Of a sequence of that length: a longer one would hide more than its share."""
        return int(self.mask_ratio * length)

    def build(self) -> HiddenLoss:
        from edgewright.compress.hidden_terms import Had

        return Had(mask_ratio=self.mask_ratio, span=self.span, reconstruction=self.reconstruction)


LossConfig = Annotated[
    CrossEntropyConfig
    | ForwardKLConfig
    | ReverseKLConfig
    | JsdConfig
    | SkewForwardKLConfig
    | SkewReverseKLConfig
    | TotalVariationConfig
    | LkHybridConfig
    | TopKConfig
    | RsKdConfig
    | UldConfig
    | MiniLMConfig
    | TinyBertConfig
    | HadConfig,
    Field(discriminator="function"),
]
