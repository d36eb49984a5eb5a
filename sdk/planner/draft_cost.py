"""What a step of a draft takes, as a function of its size: fitted to a few that were measured.

    seconds = fixed + layers * layer + bytes * byte        each at least 0

A step of a small model on a processor is calls and synchronisation, per step and per layer, before it is memory
traffic; that is why drafts are shallow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from edgewright.planner.speculative import Times


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A draft that was measured: blocks, bytes that a step reads, and seconds by repeat."""

    layers: int
    bytes: float
    times: Times


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftFit:
    """Seconds of a step, of a block and of a byte, one number for each repeat."""

    fixed: Times
    layer: Times
    byte: Times
    error: float
    """The largest relative difference between a measured median and the fit's."""

    def step(self, layers: int, size: float) -> Times:
        """Seconds of a step by repeat.

        Args:
            layers: blocks.
            size: bytes that a step reads.
        """
        parts = np.asarray([self.fixed, self.layer, self.byte])
        return tuple(float(value) for value in np.array([1.0, layers, size]) @ parts)

    def to_json(self) -> dict[str, object]:
        fixed, layer, byte = (float(np.median(each)) for each in (self.fixed, self.layer, self.byte))
        return {
            "step_ms": 1000 * fixed,
            "layer_ms": 1000 * layer,
            "bytes_per_s": 1 / byte if byte > 0 else None,
            "error": self.error,
        }


def fit(samples: Sequence[Sample]) -> DraftFit:
    """Least squares of relative differences, with coefficients of at least 0, for each repeat apart.

    With fewer samples than three of different shape some coefficients stay 0.
    """
    design = np.array([[1.0, sample.layers, sample.bytes] for sample in samples])
    times = np.array([sample.times for sample in samples])  # [samples, repeats]
    found = np.array([_non_negative(design / column[:, None], np.ones(len(design))) for column in times.T])
    medians = np.median(times, axis=1)
    fitted = np.median(design @ found.T, axis=1)
    fixed, layer, byte = (tuple(float(value) for value in column) for column in found.T)
    return DraftFit(fixed=fixed, layer=layer, byte=byte, error=float(np.abs(fitted / medians - 1).max()))


def _non_negative(design: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The least-squares solution with no coefficient below 0, found by trying every choice of those above it."""
    scale = np.abs(design).max(axis=0)
    best, least = np.zeros(design.shape[1]), float("inf")
    for chosen in _subsets(design.shape[1]):
        part = design[:, chosen] / scale[chosen]
        values = np.linalg.lstsq(part, wanted, rcond=None)[0]
        rest = float(((part @ values - wanted) ** 2).sum())
        if (values >= 0).all() and rest < least - 1e-12:
            least, best = rest, np.zeros(design.shape[1])
            best[chosen] = values / scale[chosen]
    return best


def _subsets(size: int) -> Iterator[list[int]]:
    """The non-empty ones, small ones first: of equals the simplest wins."""
    for count in range(1, size + 1):
        yield from (list(each) for each in combinations(range(size), count))
