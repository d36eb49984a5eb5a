"""GPTQ: rounding with error feedback, one weight at a time (Frantar et al., arXiv:2210.17323).

A linear layer sees inputs X `[tokens, in]`. What rounding costs is `|(W - Q) X^T|^2 = tr(E H E^T)` with `E = W - Q`
and `H = X^T X`, so an error in one column can be made up for by later ones. With the factor `H = M M^T`, M upper
triangular, the cost of a row is `sum_j (E M)_j^2`, and column j meets only the errors before it: it is rounded at

    target_j = W_j + (sum_{i<j} E_i M_ij) / M_jj,      cost_j = (M_jj (target_j - Q_j))^2

which is the paper's update without its inverse (and Babai's nearest plane). Beyond the paper: the scale of a group is
chosen among candidates by the cost after feedback, and afterwards sweeps of exact coordinate descent over scales and
codes lower the whole cost further.
"""

from __future__ import annotations

import numpy as np

from edgewright.export.calibration.search import LEVEL_NAMES, RANGES, best_scales, codes_of, rounded_to_half
from edgewright.export.lattice import LatticeTensor

STRETCHES = (1.0, 0.82, 0.88, 0.94, 1.06, 1.12)
"""Candidates for a group's scale, relative to the one that is best without feedback."""

SWEEPS = 4
"""Rounds of coordinate descent."""

_CELLS = 1 << 22
"""Weights worked on at a time; rows do not depend on each other."""


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    *,
    bits: int,
    group: int = 32,
    damp: float = 0.01,
    sweeps: int = SWEEPS,
    stretches: tuple[float, ...] = STRETCHES,
) -> LatticeTensor:
    """The lattice of least output error that is found.

    Args:
        weight: `[out, in]`, finite.
        hessian: `[in, in]`, `X^T X` over the calibration text, at any scale. An input that is always zero is fine.
        bits: 4 or 8.
        group: columns per scale; the last group of a row may be short.
        damp: added to the diagonal, as a share of its mean.
        sweeps: rounds of coordinate descent; 0 leaves what error feedback gave.
        stretches: candidates for a scale, relative to the one of least error without feedback.

    Returns:
        Codes in `search.RANGES` and scales that fp16 holds exactly.

    Raises:
        ValueError: shapes that contradict each other, or a Hessian that is not finite.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns) or not np.isfinite(hessian).all():
        raise ValueError(f"the Hessian must be finite [{columns}, {columns}], not {hessian.shape}")
    problem = _Problem(damped(hessian, damp), bits=bits, group=group)
    step = max(1, _CELLS // max(1, columns))
    parts = []
    for start in range(0, rows, step):
        part = np.asarray(weight[start : start + step], np.float64)
        codes, scales = problem.feedback(part, stretches)
        for _ in range(sweeps):
            problem.descend(part, codes, scales)
        parts.append((codes, scales))
    codes, scales = (np.concatenate(values) for values in zip(*parts, strict=True))
    return LatticeTensor(
        codes=np.ascontiguousarray(codes, np.int8),
        scales=np.ascontiguousarray(scales, np.float32),
        group=group,
        bits=bits,
        levels=LEVEL_NAMES[bits],
    )


def damped(hessian: np.ndarray, damp: float) -> np.ndarray:
    """float64, symmetric, positive definite: a share of the mean is added to the diagonal, dead inputs get the mean."""
    matrix = np.asarray(hessian, np.float64)
    matrix = (matrix + matrix.T) / 2
    diagonal = matrix.diagonal()
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if alive.any() else 1.0
    return matrix + np.diag(np.where(alive, max(damp, 1e-8) * mean, mean))


class _Problem:
    """The quadratic cost of one weight."""

    def __init__(self, hessian: np.ndarray, *, bits: int, group: int) -> None:
        self.hessian = hessian
        factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
        self.pivots = factor.diagonal() ** 2
        self.feed = factor / factor.diagonal()
        self.bits = bits
        columns = len(hessian)
        self.groups = [slice(start, min(start + group, columns)) for start in range(0, columns, group)]

    def feedback(self, weight: np.ndarray, stretches: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Codes `[rows, in]` and scales `[rows, groups]`, column by column from the left."""
        codes = np.zeros_like(weight)
        scales = np.zeros((len(weight), len(self.groups)))
        error = np.zeros_like(weight)
        for index, span in enumerate(self.groups):
            target = weight[:, span] + error[:, : span.start] @ self.feed[: span.start, span]
            base = best_scales(target, self.pivots[span], bits=self.bits)
            tried = rounded_to_half(base[:, None] * np.array(stretches))
            chosen = self._group(weight[:, span], target, span, tried)
            codes[:, span], scales[:, index] = chosen
            error[:, span] = weight[:, span] - codes[:, span] * scales[:, index, None]
        return codes, scales

    def _group(
        self, weight: np.ndarray, target: np.ndarray, span: slice, scales: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The codes `[rows, columns]` of one group and its scale, the cheapest of the candidates `[rows, tried]`."""
        feed, pivots = self.feed[span, span], self.pivots[span]
        count = target.shape[1]
        codes = np.empty((count, *scales.shape))
        error = np.empty_like(codes)
        cost = np.zeros(scales.shape)
        for column in range(count):
            wanted = target[:, column, None] + np.tensordot(feed[:column, column], error[:column], axes=1)
            codes[column] = codes_of(wanted[..., None], scales, self.bits)[..., 0]
            error[column] = weight[:, column, None] - codes[column] * scales
            cost += pivots[column] * (wanted - codes[column] * scales) ** 2
        best = cost.argmin(axis=1)
        rows = np.arange(len(best))
        return codes[:, rows, best].T, scales[rows, best]

    def descend(self, weight: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
        """One sweep of coordinate descent, in place; no step raises the cost of any row."""
        error = weight - codes * np.repeat(scales, self._widths(), axis=1)
        slope = error @ self.hessian
        for index, span in enumerate(self.groups):
            before = error[:, span].copy()
            near = slope[:, span].copy()
            local = self.hessian[span, span]
            scales[:, index] = self._better_scales(codes[:, span], scales[:, index], near, local)
            now = weight[:, span] - codes[:, span] * scales[:, index, None]
            near += (now - before) @ local
            self._better_codes(codes[:, span], scales[:, index], near, local)
            error[:, span] = weight[:, span] - codes[:, span] * scales[:, index, None]
            slope += (error[:, span] - before) @ self.hessian[span]

    def _widths(self) -> list[int]:
        return [span.stop - span.start for span in self.groups]

    def _better_scales(self, codes: np.ndarray, scales: np.ndarray, slope: np.ndarray, local: np.ndarray) -> np.ndarray:
        """The scale of least squares for these codes, in fp16, where that lowers the cost."""
        pull = (codes * slope).sum(axis=1)
        curve = ((codes @ local) * codes).sum(axis=1)
        wanted = scales + np.where(curve > 0, pull / np.where(curve > 0, curve, 1), 0)
        step = rounded_to_half(wanted) - scales
        return np.where(step * (step * curve - 2 * pull) < 0, scales + step, scales)

    def _better_codes(self, codes: np.ndarray, scales: np.ndarray, slope: np.ndarray, local: np.ndarray) -> None:
        """Each column in turn gets its best codes, the others fixed; `codes` and `slope` change in place."""
        low, high = RANGES[self.bits]
        safe = np.where(scales == 0, 1, scales)
        for column in range(codes.shape[1]):
            move = np.rint(slope[:, column] / (local[column, column] * safe))
            new = np.clip(codes[:, column] + move, low, high)
            change = np.where(scales == 0, 0, new - codes[:, column])
            codes[:, column] += change
            slope -= (change * scales)[:, None] * local[column]


def output_error(weight: np.ndarray, lattice: LatticeTensor, hessian: np.ndarray) -> float:
    """`|(W - Q) X^T|^2 = tr((W - Q) H (W - Q)^T)`, in float64."""
    error = np.asarray(weight, np.float64) - lattice.dequantize()
    return float(((error @ np.asarray(hessian, np.float64)) * error).sum())
