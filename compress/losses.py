"""The losses of distillation in their plain forms: `NAME(student_logits, teacher_logits, ...)`, mean over tokens.

`minilm` and `tinybert` take states of layers instead. For small work, and as references of the forms by which recipes
train (`compress.loss_rule`, `compress.hidden_terms`).
"""

from edgewright.compress.divergences import (
    forward_kl,
    jsd,
    lk_hybrid,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from edgewright.compress.hidden_losses import minilm, tinybert
from edgewright.compress.sparse_losses import rs_kd, top_k
from edgewright.compress.uld import uld

__all__ = [
    "forward_kl",
    "jsd",
    "lk_hybrid",
    "minilm",
    "reverse_kl",
    "rs_kd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tinybert",
    "top_k",
    "total_variation",
    "uld",
]
