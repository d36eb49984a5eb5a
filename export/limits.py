"""How far an exported file may be from its checkpoint: one table, by width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgewright.errors import BadInput


@dataclass(frozen=True, slots=True)
class Limit:
    """What a width may cost."""

    kl: float
    """Mean KL(checkpoint || file) in nats per token, for each way to read a text."""
    runtime: float
    """Of that what the runtime may add to the file's own weights computed in float32: rounded activations, the order of
    sums. It does not grow with what the weights lose, so that a wrong computation cannot hide behind a coarse width."""
    perplexity: float
    """Perplexity on real text over the checkpoint's, or the inverse if that is larger."""
    regret: float
    """Nats by which the checkpoint may prefer its own first choice to the file's, at all but 1% of the positions. This
    judges top-1 by its margin: a model that was never trained has flat logits and changes its first choice at a
    breath, which says nothing; then KL and `runtime` decide."""


LOSSLESS = frozenset({"f32", "fp32"})
TERNARY = frozenset({"tq1_0", "tq2_0", "q2_0", "ternary"})

_FLOAT32 = Limit(1e-5, 1e-5, 1.001, 1e-3)
_FLOAT16 = Limit(1e-3, 1e-4, 1.01, 0.1)
_BFLOAT16 = Limit(5e-3, 5e-3, 1.02, 0.3)
_TERNARY = Limit(5e-3, 5e-3, 1.03, 0.3)
_8_BITS = Limit(1e-2, 5e-3, 1.05, 0.5)
_6_BITS = Limit(2e-2, 5e-3, 1.1, 0.7)
_5_BITS = Limit(0.1, 5e-3, 1.2, 1.5)
_4_BITS = Limit(0.3, 5e-3, 1.5, 3.0)
_3_BITS = Limit(0.6, 5e-3, 2.0, 4.0)
_2_BITS = Limit(1.5, 5e-3, 5.0, 6.0)

LIMITS = {
    "f32": _FLOAT32,
    "fp32": _FLOAT32,
    "f16": _FLOAT16,
    "fp16": _FLOAT16,
    "bf16": _BFLOAT16,
    "tq1_0": _TERNARY,
    "tq2_0": _TERNARY,
    "q2_0": _TERNARY,
    "ternary": _TERNARY,
    "q8_0": _8_BITS,
    "int8": _8_BITS,
    "q6_k": _6_BITS,
    "q5_1": _5_BITS,
    "q5_0": _5_BITS,
    "q5_k": _5_BITS,
    "q4_1": _4_BITS,
    "q4_0": _4_BITS,
    "q4_k": _4_BITS,
    "iq4_nl": _4_BITS,
    "iq4_xs": _4_BITS,
    "int4": _4_BITS,
    "nf4": _4_BITS,
    "q3_k": _3_BITS,
    "q2_k": _2_BITS,
}
"""Ternary weights are exact: they were trained so, and what remains are activations."""

EXACT = Limit(1e-3, 1e-5, 1.01, 0.1)
"""Ternary weights in a runtime that computes in float32: what remains is the embedding in half precision."""

MAX_ABS_DIFF = 1e-3
"""Largest difference of two logits in a lossless file."""


def limit_for(widths: Iterable[str], *, fp32_compute: bool) -> Limit:
    """What a file of these widths may cost: in each respect what the most generous of them allows.

    Args:
        widths: in which its matrices are stored.
        fp32_compute: whether its runtime leaves activations alone.

    Raises:
        BadInput: EW-557, a width is not in the table.
    """
    widths = set(widths)
    unknown = sorted(widths - LIMITS.keys())
    if unknown or not widths:
        raise BadInput(
            "EW-557",
            f"the gate has no limit for the width {', '.join(unknown)}" if unknown else "the file has no matrix",
            expected=f"one of: {', '.join(LIMITS)}",
            found=", ".join(unknown) or "no width",
            fix="say how much the file may lose with --max-kl",
        )
    exact = fp32_compute and bool(widths & TERNARY) and widths <= TERNARY | LOSSLESS
    rows = [EXACT] if exact else [LIMITS[width] for width in widths]
    return Limit(
        kl=max(row.kl for row in rows),
        runtime=max(row.runtime for row in rows),
        perplexity=max(row.perplexity for row in rows),
        regret=max(row.regret for row in rows),
    )
