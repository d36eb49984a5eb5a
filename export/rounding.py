"""The stock rounding rule of bitsandbytes, for weights that lie on no lattice, bit for bit.

Those of ggml stand beside the lattice itself, in `lattice.py`.
"""

from __future__ import annotations

import numpy as np

from edgewright.export.lattice import LatticeTensor, inverse_or_zero
from edgewright.export.layout.transformers import NF4, Nf4


def round_nf4(weight: np.ndarray, layout: Nf4 | None = None) -> LatticeTensor:
    """The rule of bitsandbytes' NF4: `s = max|block|`, code = the nearest value of `NF4` to w / s.

    Args:
        weight: float32 `[rows, columns]` with an even number of weights.
        layout: says how many weights share a scale; blocks follow each other through the whole weight.
    """
    layout = layout or Nf4()
    flat = np.asarray(weight, np.float32).ravel()
    blocks = np.pad(flat, (0, -len(flat) % layout.block)).reshape(-1, layout.block)
    absmax = np.abs(blocks).max(axis=1)
    middles = (NF4[1:].astype(np.float64) + NF4[:-1]).astype(np.float32) / np.float32(2)
    codes = np.searchsorted(middles, blocks * inverse_or_zero(absmax)[:, None]).astype(np.uint8)
    pairs = codes.ravel()[: len(flat)].reshape(-1, 2)
    return layout.unpack((pairs[:, 0] << np.uint8(4)) | pairs[:, 1], absmax, (weight.shape[0], weight.shape[1]))
