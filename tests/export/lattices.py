"""Random and adversarial lattices and weights."""

from __future__ import annotations

import numpy as np

from edgewright.export.lattice import LEVELS, LatticeTensor
from edgewright.export.layout import NF4


def random_lattice(
    levels: str,
    rows: int,
    columns: int,
    group: int | None,
    seed: int,
    per_tensor: bool = False,
    *,
    zeros: bool = False,
    offsets: bool = False,
    precision: type[np.floating] = np.float16,
) -> LatticeTensor:
    """Codes over the whole range of `levels`; scales over twenty powers of e, exact in `precision`."""
    draw = np.random.default_rng(seed)
    low, high = LEVELS[levels]  # type: ignore[index]
    stored = draw.integers(low, high + 1, (rows, columns))
    shape = (1, 1) if per_tensor else (rows, 1 if group is None else -(-columns // group))

    def some(low: float, high: float) -> np.ndarray:
        return np.exp(draw.uniform(low, high, shape)).astype(precision).astype(np.float32)

    zero = draw.integers(low, high + 1, shape).astype(np.int16) if zeros else None
    shift = 0 if zero is None else zero if group is None else np.repeat(zero, group, axis=1)[:, :columns]
    return LatticeTensor(
        codes=(stored - shift).astype(np.int16 if levels == "uint8" else np.int8),
        scales=some(-12, 6),
        group=group,
        bits=8,
        levels=levels,  # type: ignore[arg-type]
        zeros=zero,
        offsets=-some(-8, 3) if offsets else None,
        codebook=NF4 if levels == "nf4" else None,
    )


def extremes(lattice: LatticeTensor) -> LatticeTensor:
    """The same with blocks of zeros, the largest and the smallest scale of fp16, a zero and a negative one."""
    lattice.codes[-1, : min(lattice.codes.shape[1], 512)] = 0 if lattice.codebook is None else 7
    flat = lattice.scales.reshape(-1)
    for index, value in enumerate((65504.0, 2.0**-24, 0.0, -0.5)):
        if index < len(flat):
            flat[index] = value
    return lattice


def adversarial(rows: int, columns: int) -> np.ndarray:
    """Weights with a row of zeros, one huge value, tiny ones, -0.0, exact halves between codes, and a constant."""
    weight = np.random.default_rng(5).standard_normal((rows, columns)).astype(np.float32)
    weight[0] = 0
    weight[1, 7] = 1e5
    weight[2] *= 1e-6
    weight[3, :64] = -0.0
    weight[4] = np.round(weight[4] * 4) / 4
    weight[5] = 0.25
    return weight
