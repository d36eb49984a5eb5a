"""Universal logit distillation: two distributions over different vocabularies, compared by their sorted probabilities.

Boizard et al., 2024, arXiv 2402.12030. What a token is called does not matter to it, so it needs a cross-entropy beside
it, which says which tokens are meant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edgewright.compress.divergences import at_least_float32, check_places, check_temperature, students_mean
from edgewright.compress.loss_rule import Block, LogProbs, TokenLoss
from edgewright.compress.targets import Aligned


def uld(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sum of |q_(i) - t_(i)| over both distributions sorted, the shorter one filled with zeros (arXiv 2402.12030).

    The authors compare the i-th token of an answer in one tokenizer with the i-th in the other; in recipes tokens are
    compared where the text before them is the same (`cross_tokenizer`).

    Args:
        student_logits: [..., V_student]; teacher_logits: [..., V_teacher], of the same tokens' places.

    Returns:
        Scalar, T^2 * mean over tokens, 0 to 2 T^2.

    Raises:
        RecipeError: EW-780, a temperature that is not above 0; logits of other places.
    """
    check_temperature(temperature)
    check_places(student_logits, teacher_logits)
    q, t = (
        (at_least_float32(logits) / temperature).softmax(-1).sort(-1, descending=True).values
        for logits in (student_logits, teacher_logits)
    )
    width = max(q.shape[-1], t.shape[-1])
    q, t = (F.pad(each, (0, width - each.shape[-1])) for each in (q, t))
    return temperature**2 * (q - t).abs().sum(-1).mean()


def uld_rows(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient q (s - sum q s), s = the sign of q - t at the place that a probability has in the order."""
    q = log_q.exp()
    ranked, places = q.sort(-1, descending=True)
    theirs = log_t.exp().sort(-1, descending=True).values
    common = min(q.shape[-1], theirs.shape[-1])
    gap = ranked.clone()
    gap[:, :common] -= theirs[:, :common]
    loss = gap.abs().sum(-1) + theirs[:, common:].sum(-1)
    slope = torch.empty_like(q).scatter_(-1, places, gap.sign_())
    return loss, students_mean(q, slope)[1]


@dataclass(frozen=True, slots=True)
class Uld(TokenLoss):
    """`uld` where the teacher has something to say; a token without a place in its text costs nothing."""

    temperature: float

    def rows(self, block: Block) -> tuple[Tensor, Tensor]:
        teacher = block.teacher
        log_q = block.student(self.temperature, block.student.vocabulary)
        if isinstance(teacher, LogProbs):
            return uld_rows(log_q, teacher(self.temperature, teacher.vocabulary))
        assert isinstance(teacher, Aligned), "the objective was checked"
        loss, slope = uld_rows(log_q, F.log_softmax(teacher.values / self.temperature, dim=-1))
        return loss * teacher.present, slope.mul_(teacher.present[:, None])
