"""How far an exported file may be from its checkpoint: one table, by width."""

from __future__ import annotations

from collections.abc import Iterable

from edgewright.errors import BadInput

LOSSLESS = frozenset({"f32", "fp32"})
TERNARY = frozenset({"tq1_0", "tq2_0", "q2_0", "ternary"})

KL_LIMITS = {
    "f32": 1e-5,
    "fp32": 1e-5,
    "f16": 1e-3,
    "fp16": 1e-3,
    "bf16": 5e-3,
    "tq1_0": 5e-3,
    "tq2_0": 5e-3,
    "q2_0": 5e-3,
    "ternary": 5e-3,
    "q8_0": 1e-2,
    "int8": 1e-2,
    "q6_k": 2e-2,
    "q5_1": 0.1,
    "q5_0": 0.1,
    "q5_k": 0.1,
    "q4_1": 0.3,
    "q4_0": 0.3,
    "q4_k": 0.3,
    "iq4_nl": 0.3,
    "iq4_xs": 0.3,
    "int4": 0.3,
    "nf4": 0.3,
    "q3_k": 0.5,
    "q2_k": 1.0,
}
"""Mean KL in nats per token that each width may cost. Ternary weights are exact; what remains are activations, which
most runtimes quantize to 8 bits. A file of several widths may cost what its widest loss may."""

EXACT_KL_LIMIT = 1e-3
"""For ternary weights in a runtime that computes in float32."""

MAX_ABS_DIFF = 1e-3
"""Largest difference of two logits in a lossless file."""


def kl_limit(widths: Iterable[str], *, fp32_compute: bool) -> float:
    """What a file of these widths may cost.

    Args:
        widths: in which its matrices are stored.
        fp32_compute: whether its runtime leaves activations alone.

    Raises:
        BadInput: EW-557, a width is not in the table.
    """
    widths = set(widths)
    unknown = sorted(widths - KL_LIMITS.keys())
    if unknown:
        raise BadInput(
            "EW-557",
            f"the gate has no limit for the width {', '.join(unknown)}",
            expected=f"one of: {', '.join(KL_LIMITS)}",
            found=", ".join(unknown),
            fix="say how much the file may lose with --max-kl",
        )
    if fp32_compute and widths & TERNARY and widths <= TERNARY | LOSSLESS:
        return EXACT_KL_LIMIT
    return max(KL_LIMITS[width] for width in widths)
