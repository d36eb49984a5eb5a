"""A finished run that takes seconds, one for each module of tests."""

import sys
from pathlib import Path

import pytest

import edgewright

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import write_recipe  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: (recipe, run directory)."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    edgewright.run(recipe, f"output_dir={folder / 'run'}")
    return recipe, folder / "run"
