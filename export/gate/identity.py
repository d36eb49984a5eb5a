"""The first guard: does a file hold the weights that it should, bit for bit?

The target's own reader takes the file apart, without the code that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from edgewright.export.artifact import digest
from edgewright.export.source import Source

UNLIKE = 0.9
"""Relative error (of Frobenius norms) from which a matrix is no rounding of the checkpoint's."""


def differences(
    path: Path,
    to: str,
    source: Source,
    *,
    kept: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
    each: Callable[[str, np.ndarray], None] | None = None,
) -> list[str]:
    """Where a file is not what its checkpoint and its manifest say, in words; empty when it is, bit for bit.

    Args:
        path: the file or folder.
        to: its target.
        source: the checkpoint.
        kept: what the manifest says about each lattice (`Written.lattice`). Where it is silent, or says that
            something was lost without a digest of what is left, scales may be rounded to fp16 and no more.
        digests: what each matrix must give back (`Written.digests`).
        each: is shown every weight that the file holds, by checkpoint name; a file is read only once.
    """
    from edgewright.export.targets import reader_of

    found, seen, digests = [], set(), digests or {}
    for name, values in reader_of(to).read_weights(path, source):
        seen.add(name)
        reason = _difference(name, values, source, kept, digests.get(name))
        if reason is not None:
            found.append(f"{name} {reason}")
        if each is not None:
            each(name, values)
    missing = sorted({*source.files, *digests} - seen)  # a tied head is not in the checkpoint's files either
    return found + [f"{name} is not in the file" for name in missing]


def _difference(
    name: str, values: np.ndarray, source: Source, kept: Mapping[str, str] | None, expected: str | None
) -> str | None:
    """What is wrong with one weight, or None."""
    if values.ndim == 1 and name in source.files:
        return _unequal(values, _as_wide_as(values, source.tensor(name)))
    if expected is not None and digest(values) != expected:
        return "is not what was laid out"
    if name in source.calibrated:
        return _unlike(values, source.lattice[name].dequantize())
    if name not in source.lattice:
        return _unlike(values, source.matrix(name)) if name in source.files else None
    right, claim = source.lattice[name], None if kept is None else kept.get(name)
    exact = _unequal(values, right.dequantize())
    if exact is None or claim == "exact":
        return exact
    if claim is not None and expected is not None:  # it says what was lost, and its digest that this is all
        return _unlike(values, right.dequantize())
    return _unequal(values, right.scales_rounded(np.float16).dequantize())


def _unlike(values: np.ndarray, right: np.ndarray) -> str | None:
    """What is wrong with a matrix that somebody rounded in a way that no manifest tells: whether it is this one at all.

    The error of rounding stays below 0.6 of a matrix's size even in ternary codes; that of another one is 1.4.
    """
    if values.shape != right.shape:
        return _unequal(values, right)
    error = float(np.linalg.norm(values - right)) / max(float(np.linalg.norm(right)), 1e-30)
    return None if error < UNLIKE else f"is another weight: they differ by {error:.0%} of its size"


def _as_wide_as(values: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A norm or bias rounded to half precision, where the file's values are."""
    import torch

    halves = (torch.from_numpy(right).to(dtype).float().numpy() for dtype in (torch.float16, torch.bfloat16))
    return next((half for half in halves if np.array_equal(values, half)), right)


def _unequal(values: np.ndarray, right: np.ndarray) -> str | None:
    if values.shape != right.shape:
        return f"has the shape {values.shape}, not {right.shape}"
    wrong = np.count_nonzero(values != right)
    return f"differs in {wrong} of {values.size} values" if wrong else None
