"""Rotary positions as numbers: how fast each pair of a head turns, for every kind whose angles are the same for all
texts.

The formulas are those of transformers' `modeling_rope_utils`, in float32 as there. A pair turns by
`position * inverse`; cosine and sine are multiplied by `factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Parameters = Mapping[str, Any]
"""What config.json has under `rope_parameters`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotary:
    """The rotation of a layer's queries and keys; of a head, the first `2 * len(inverse)` numbers turn."""

    inverse: np.ndarray
    """float32 `[pairs]`, radians per position."""
    factor: float = 1.0

    @property
    def size(self) -> int:
        """Numbers of a head that turn."""
        return 2 * len(self.inverse)

    def tables(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine, float32 `[length, pairs]`."""
        angles = np.arange(length, dtype=np.float32)[:, None] * self.inverse
        factor = np.float32(self.factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


def rotary(parameters: Parameters, head_size: int, *, partial: bool) -> Rotary | None:
    """The rotation that `rope_parameters` describe; None where they are of a kind that is not known here.

    Not known are the kinds whose angles depend on the length of the text (`dynamic`, `longrope`), and those other than
    `default` where only a part of a head turns.

    Args:
        parameters: as config.json has them.
        head_size: numbers of a head.
        partial: whether the family heeds `partial_rotary_factor`; the others turn whole heads whatever it says.
    """
    name = parameters.get("rope_type", "default")
    kind, factor = KINDS.get(name), parameters.get("partial_rotary_factor")
    if kind is None or not kind.needs <= {name for name, value in parameters.items() if value is not None}:
        return None
    share = 1.0 if factor is None else float(factor)
    if name != "default" and share != 1:
        return None
    return kind.make(parameters, int(head_size * share) if partial else head_size)


def _powers(parameters: Parameters, size: int) -> np.ndarray:
    """Wavelengths over 2 pi, float32 `[size / 2]`."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    powers: np.ndarray = np.float32(parameters["rope_theta"]) ** exponents
    return powers


def _default(parameters: Parameters, size: int) -> Rotary:
    return Rotary(inverse=1 / _powers(parameters, size))


def _linear(parameters: Parameters, size: int) -> Rotary:
    return Rotary(inverse=1 / _powers(parameters, size) / np.float32(parameters["factor"]))


def _llama3(parameters: Parameters, size: int) -> Rotary:
    """Long waves are stretched by `factor`, short ones stay, and those between are mixed."""
    inverse = 1 / _powers(parameters, size)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = np.float32(parameters["original_max_position_embeddings"]) / (np.float32(2 * math.pi) / inverse)
    kept = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return Rotary(inverse=(1 - kept) * inverse / np.float32(parameters["factor"]) + kept * inverse)


def _yarn(parameters: Parameters, size: int) -> Rotary:
    """https://arxiv.org/abs/2309.00071, as transformers has it."""
    factor, trained = float(parameters["factor"]), parameters["original_max_position_embeddings"]
    powers, theta = _powers(parameters, size), float(parameters["rope_theta"])

    def pair_of(turns: float) -> float:
        """Which pair turns so often in a text of the trained length."""
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = (pair_of(parameters.get(name) or usual) for name, usual in (("beta_fast", 32), ("beta_slow", 1)))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last += 0.001 if first == last else 0
    stretched = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
    inverse = stretched / (np.float32(factor) * powers) + (1 - stretched) / powers
    return Rotary(inverse=inverse.astype(np.float32), factor=_yarn_factor(parameters, factor))


def _yarn_factor(parameters: Parameters, factor: float) -> float:
    given, scale, all_scale = (parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)

    def damping(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    return damping(scale) / damping(all_scale) if scale and all_scale else damping(1)


@dataclass(frozen=True, slots=True)
class _Kind:
    make: Callable[[Parameters, int], Rotary]
    needs: frozenset[str]
    """Settings without which transformers would fill in something, or fail."""


KINDS = {
    "default": _Kind(_default, frozenset({"rope_theta"})),
    "linear": _Kind(_linear, frozenset({"rope_theta", "factor"})),
    "llama3": _Kind(
        _llama3,
        frozenset({"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    ),
    "yarn": _Kind(_yarn, frozenset({"rope_theta", "factor", "original_max_position_embeddings"})),
}
"""By `rope_type`."""
