"""The fingerprint of a model's weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edgewright.export import weight_hash
from edgewright.export.weight_hash import weights_sha256, weights_sha256_meanwhile


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sidecar and two weight files, longer than what is read at a time."""
    monkeypatch.setattr(weight_hash, "CHUNK_BYTES", 1000)
    for name, content in (("b", b"second" * 700), ("a", b"first" * 801), ("lattice", b"codes")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    return tmp_path


def test_it_is_that_of_the_files_in_the_order_of_their_names(files):
    plain, whole = b"first" * 801 + b"second" * 700, b"first" * 801 + b"second" * 700 + b"codes"
    assert weights_sha256(files) == hashlib.sha256(plain).hexdigest()
    assert weights_sha256(files, sidecar=True) == hashlib.sha256(whole).hexdigest()
    with weights_sha256_meanwhile(files) as found:
        assert found.result() == hashlib.sha256(plain).hexdigest()


def test_a_failure_does_not_wait_for_it(files, monkeypatch):
    ended = []

    class Long:
        """A file that takes seconds."""

        left = 1_000_000

        def __enter__(self):
            return self

        def __exit__(self, *error):
            ended.append(self.left == 0)

        def readinto(self, buffer):
            self.left = max(0, self.left - 1)
            return len(buffer) if self.left else 0

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Long())
    with pytest.raises(ValueError, match="refused"), weights_sha256_meanwhile(files):
        raise ValueError("refused")
    assert not any(ended)
