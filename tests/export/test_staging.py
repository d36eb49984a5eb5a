"""An artifact appears whole or not at all, and what dead runs left is put right."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgewright.export.staging import folder, staged, swap


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_made_for_nothing_vanishes(tmp_path):
    with folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


def test_leftovers_of_the_dead_vanish_and_those_of_the_living_stay(tmp_path, dead):
    final = tmp_path / "model[1].gguf"
    ours = tmp_path / f".model[1].{os.getppid()}.staged.gguf"
    theirs = tmp_path / f".model[1].{dead}.staged.gguf"
    other = tmp_path / f".model1.{dead}.staged.gguf"
    for path in (ours, theirs, other):
        path.touch()
    with staged(final) as place:
        place.touch()
    assert sorted(tmp_path.iterdir()) == sorted([ours, other])


def test_a_folder_that_a_dead_run_had_put_aside_comes_back(tmp_path, dead):
    aside = tmp_path / f".out.{dead}.old"
    aside.mkdir()
    (aside / "model").touch()
    with staged(tmp_path / "out"):
        assert (tmp_path / "out" / "model").exists()
    aside.mkdir()
    with staged(tmp_path / "out"):
        assert not aside.exists() and (tmp_path / "out" / "model").exists()


def test_a_swap_that_fails_leaves_the_old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OSError):
        swap(tmp_path / "nothing", tmp_path / "out")
    assert (tmp_path / "out" / "old").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "new").touch()
    swap(tmp_path / "new", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
