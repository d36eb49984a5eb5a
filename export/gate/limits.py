"""How far an exported file may be from its checkpoint: one table, by width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite

from edgewright.errors import BadInput, RecipeError

MAX_ABS_DIFF = 1e-3
"""Largest difference of two logits in a lossless file, in a runtime that computes in float32."""

ROUNDED_ABS_DIFF = 2e-2
"""The same where a runtime rounds some function to half precision, as llama.cpp does with a tanh GELU (5e-3 there)."""


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
    logits: float = field(default=MAX_ABS_DIFF, compare=False)
    """Largest difference of two logits in a lossless file."""


LOSSLESS = frozenset({"f32", "fp32"})
TERNARY = frozenset({"tq1_0", "tq2_0", "q2_0", "ternary"})

# Measured, beside each limit: the largest of the small teacher of examples/ (5 million parameters), stories260K (a
# quarter of a million: the smaller a model, the more a width costs) and the demo's ternary student, each trained, each
# through llama.cpp, ONNX Runtime and ONNX Runtime GenAI where they have the width. Frozen: a file that misses one of
# them is worse than its width, and a limit is not what has to change.
_FLOAT32 = Limit(kl=1e-5, runtime=1e-5, perplexity=1.001, regret=1e-3)  # 6e-12, 6e-12, 1.00000, 0
_FLOAT16 = Limit(kl=3e-4, runtime=1e-4, perplexity=1.005, regret=0.05)  # 2.0e-6, 1.2e-6, 1.0001, 0
_BFLOAT16 = Limit(kl=2e-3, runtime=1e-3, perplexity=1.01, regret=0.1)  # 1.3e-4, 9.1e-5, 1.002, 0
_TERNARY = Limit(kl=5e-3, runtime=5e-3, perplexity=1.02, regret=0.2)  # 6.9e-4, 8.1e-4, 1.001, 0.015
_8_BITS = Limit(kl=1e-2, runtime=1e-2, perplexity=1.03, regret=0.5)  # 2.8e-3, 2.4e-3, 1.006, 0.12
_6_BITS = Limit(kl=2e-2, runtime=1e-2, perplexity=1.05, regret=0.7)  # 3.3e-3, 1.7e-3, 1.004, 0.16
_5_BITS = Limit(kl=0.1, runtime=1e-2, perplexity=1.1, regret=2.0)  # 4.2e-2, 1.9e-3, 1.02, 0.95
_4_BITS = Limit(kl=0.3, runtime=1e-2, perplexity=1.25, regret=4.0)  # 0.18, 2.9e-3, 1.04, 2.2
_3_BITS = Limit(kl=0.4, runtime=1e-2, perplexity=1.5, regret=4.0)  # 5.5e-2, 1.7e-3, 1.006, 0.87 (the teacher alone)
_2_BITS = Limit(kl=0.8, runtime=1e-2, perplexity=2.0, regret=6.0)  # 0.20, 1.8e-3, 1.03, 2.2 (the teacher alone)

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
    "q5_k_m": _5_BITS,
    "q4_1": _4_BITS,
    "q4_0": _4_BITS,
    "q4_k": _4_BITS,
    "q4_k_m": _4_BITS,
    "iq4_nl": _4_BITS,
    "iq4_xs": _4_BITS,
    "int4": _4_BITS,
    "nf4": _4_BITS,
    "q3_k": _3_BITS,
    "q3_k_m": _3_BITS,
    "q2_k": _2_BITS,
}
"""By width, as the targets call it. Ternary weights are exact, being trained so; what remains are activations, which
most runtimes quantize to 8 bits."""

EXACT = Limit(kl=1e-4, runtime=1e-5, perplexity=1.005, regret=0.05)  # 2e-7, 3e-12, 1.0000, 0
"""Ternary weights in a runtime that computes in float32: what remains are scales that half precision rounds."""


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
            fix="export the model again in one of these widths",
        )
    exact = fp32_compute and bool(widths & TERNARY) and widths <= TERNARY | LOSSLESS
    rows = [EXACT] if exact else [LIMITS[width] for width in widths]
    return Limit(
        kl=max(row.kl for row in rows),
        runtime=_FLOAT32.runtime if fp32_compute else max(row.runtime for row in rows),
        perplexity=max(row.perplexity for row in rows),
        regret=max(row.regret for row in rows),
        logits=MAX_ABS_DIFF if fp32_compute else ROUNDED_ABS_DIFF,
    )


def check_max_kl(max_kl: float | None) -> None:
    """Whether a limit that a user sets is one.

    Raises:
        RecipeError: EW-560, it is not finite, or not above 0.
    """
    if max_kl is not None and not (isfinite(max_kl) and max_kl > 0):
        raise RecipeError(
            "EW-560",
            "this limit for the mean KL is none",
            expected="a finite number of nats per token above 0",
            found=max_kl,
            fix="give --max-kl a number such as 0.01, or leave it out: every width has a limit of its own",
        )
