"""Where speculative and plain greedy decoding part: within the runtime's own noise, or not.

A runtime computes one token by other kernels than several at once, and what it rounds differs. Where the two likeliest
tokens are closer than that, either is the model's choice; anything else would be an error of the loop or of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgewright.speculative.loop import Decoded

if TYPE_CHECKING:
    from edgewright.export.runtimes.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first token that differs.

    Args:
        position: among the new tokens, from 0.
        plain: the token that plain decoding chose.
        speculative: the token that speculative decoding chose.
        margin: by how much the target's logit of the first is above that of the second, evaluated token by token.
        noise: the largest difference of any logit along that text between evaluation token by token and gamma + 1 at
            once.
        within_noise: margin <= 2 noise: each of the two logits may be off by the noise.
    """

    position: int
    plain: int
    speculative: int
    margin: float
    noise: float
    within_noise: bool

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def divergence(
    target: Session, prompt: Sequence[int], expected: Decoded, found: Decoded, *, gamma: int
) -> Divergence | None:
    """Compare a greedy text with the plain one; None where they are the same.

    Args:
        expected: what `plain` gave.
        found: what `decode` gave, with at most `gamma` drafts a round.
    """
    one, other = (_with_end(each) for each in (expected, found))
    if one == other:
        return None
    # Two greedy texts of one length limit: one cannot be the beginning of the other.
    position = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    text = [*prompt, *one[:position]]
    singly = evaluated(target, prompt, text, 1)
    together = evaluated(target, prompt, text, gamma + 1)
    both = np.isfinite(singly) & np.isfinite(together)
    noise = float(np.abs(singly - together)[both].max(initial=0))
    margin = float(singly[-1, one[position]]) - float(singly[-1, other[position]])
    return Divergence(
        position=position,
        plain=one[position],
        speculative=other[position],
        margin=margin,
        noise=noise,
        within_noise=margin <= 2 * noise,
    )


def evaluated(target: Session, prompt: Sequence[int], text: Sequence[int], width: int) -> np.ndarray:
    """The target's logits from the prompt's last token on, float32 `[tokens, vocabulary]`, `width` tokens at a time.

    The last piece is filled up, as a round's is with drafted tokens, so that a short text is computed like a long one.
    """
    target.rewind(0)
    start = len(prompt) - 1
    if start:
        target.append(text[:start], "none")
    rest = list(text[start:])
    count = len(rest)
    rest += [rest[-1]] * min(-count % width, target.context_length - len(text))
    parts = []
    for begin in range(0, len(rest), width):
        rows = target.append(rest[begin : begin + width], "all")
        assert rows is not None
        parts.append(rows)
    return np.concatenate(parts)[:count]


def _with_end(decoded: Decoded) -> list[int]:
    return decoded.tokens if decoded.end is None else [*decoded.tokens, decoded.end]
