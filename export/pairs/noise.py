"""Is a difference between plain and speculative decoding in a runtime's own loops a tie, or an error?

A runtime reads one token with other kernels than several, and sums in another order: the same logit comes out a little
differently. If the two first choices are closer than that, either is right. How far logits move is measured with the
target itself, on the text before the difference (`speculative/divergence.py`): token by token, as plain decoding reads
it, and in groups of 2 to gamma + 1, as verification does; and where that changes nothing, in a session that rounds
otherwise (`Session.twin`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgewright.export.gate.limits import MAX_ABS_DIFF
from edgewright.export.runtimes.session import Session
from edgewright.speculative.divergence import Divergence, evaluated


def judged(
    target: Session, prompt: Sequence[int], plain: Sequence[int], drafted: Sequence[int], gamma: int
) -> Divergence:
    """The first difference of two greedy continuations, neither of which holds the token that ended it.

    In a runtime that computes in float32 the noise may be no larger than the gate allows a lossless file
    (`MAX_ABS_DIFF`): a verification pass that computes something else must not excuse itself.
    """
    pairs = enumerate(zip(plain, drafted, strict=False))
    position = next((place for place, (one, other) in pairs if one != other), min(len(plain), len(drafted)))
    text = [*prompt, *plain[:position]]
    singly = evaluated(target, prompt, text, 1).astype(np.float64)
    others = [evaluated(target, prompt, text, width) for width in range(2, gamma + 2)]
    twin = target.twin()
    if twin is not None:
        with twin:
            others.append(evaluated(twin, prompt, text, 1))
    noise = max(float(np.abs(other - singly).max()) for other in others)
    row = singly[-1]
    one, other = (_token_at(tokens, position, row, target.eos_ids) for tokens in (plain, drafted))
    margin = float(row.max() - min(row[one], row[other]))
    allowed = 2 * (min(noise, MAX_ABS_DIFF) if target.capabilities.fp32_compute else noise)
    return Divergence(
        position=position, plain=one, speculative=other, margin=margin, noise=noise, within_noise=margin <= allowed
    )


def _token_at(tokens: Sequence[int], place: int, row: np.ndarray, ends: frozenset[int]) -> int:
    """The token of a continuation; behind its last one the likeliest token that ends a text."""
    if place < len(tokens):
        return int(tokens[place])
    return max(ends, key=lambda token: float(row[token])) if ends else int(row.argmax())
