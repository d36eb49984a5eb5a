"""The hash of what was just written."""

from __future__ import annotations

import os

import pytest

from edgewright.export import artifact
from edgewright.export.artifact import MANIFEST, hash_of, settled_hash_of


def test_what_is_hashed_is_on_the_disk_as_well(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    files = [folder / "a", folder / "inner/b"]
    for path in (*files, folder / MANIFEST):
        path.write_bytes(path.name.encode() * 1000)
    synced = []
    monkeypatch.setattr(artifact, "sync", synced.append)
    assert settled_hash_of(folder) == hash_of(folder)
    assert settled_hash_of(files[0]) == hash_of(files[0])
    assert synced == [*files, files[0]]


def test_a_disk_that_fails_is_not_overlooked(tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(5, os.strerror(5))

    (tmp_path / "m.gguf").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(5)):
        settled_hash_of(tmp_path / "m.gguf")
