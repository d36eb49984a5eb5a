"""Read a Hugging Face directory back, for the gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgewright.export.source import Source, load_source


def read_weights(path: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint name and float32 values of every tensor."""
    other = load_source(path)
    for name in other.names:
        yield name, other.matrix(name)


def widths(path: Path) -> set[str]:
    """In which widths the matrices are stored."""
    return {"fp32"}
