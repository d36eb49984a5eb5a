"""A temporary folder for what a writer makes on the way, such as a graph with all weights in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A temporary folder beside an artifact, where there is room for it; the system's own may be small, or memory.

    Beside a staged artifact it gets a name that `targets.staged` clears away should this process die.

    Args:
        directory: the artifact on its way; its parent is made if it is not there.
    """
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    head, _, tail = directory.name.rpartition("staged")
    prefix, suffix = (head, f".staged{tail}") if head.startswith(".") else (".edgewright-", "")
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix, suffix=suffix) as place:
        yield Path(place)
