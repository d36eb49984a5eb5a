"""Temporary folders of writers lie beside the artifact, and do not outlive a process that died."""

from __future__ import annotations

import subprocess
from pathlib import Path

from edgewright.export.scratch import scratch
from edgewright.export.targets import staged


def test_it_lies_beside_the_artifact_and_vanishes(tmp_path: Path) -> None:
    with scratch(tmp_path / "new" / "out") as place:
        assert place.parent == tmp_path / "new" and place.name.startswith(".") and place.is_dir()
    assert not list((tmp_path / "new").iterdir())


def test_what_a_dead_process_left_is_cleared_away(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in ("out", "out.v2"):
        final = tmp_path / name
        with staged(final) as place, scratch(place) as made:
            left = tmp_path / made.name.replace(place.name.split(".")[2], str(dead.pid), 1)
        left.mkdir()
        with staged(final):
            assert not left.exists()
