"""The hash that tells which weights something was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from edgewright.export.lattice import SIDECAR

CHUNK_BYTES = 1 << 24
"""Read and hashed at a time: a thread that hashes needs Python's lock only in between, so that others get on."""


def weights_sha256(directory: Path, *, sidecar: bool = False) -> str:
    """sha256 over the safetensors files of a model, in the order of their names; of the lattice's file if asked."""
    return _hash(directory, sidecar, Event())


@contextmanager
def weights_sha256_meanwhile(directory: Path) -> Iterator[Future[str]]:
    """`weights_sha256` on another thread, given up where the block ends before it."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(_hash, directory, False, stop)
        finally:
            stop.set()


def _hash(directory: Path, sidecar: bool, stop: Event) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for path in sorted(directory.glob("*.safetensors")):
        if not sidecar and path.name == SIDECAR:
            continue
        with path.open("rb", buffering=0) as file:
            while not stop.is_set() and (count := file.readinto(buffer)):
                digest.update(buffer[:count])
    return digest.hexdigest()
