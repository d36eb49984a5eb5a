"""Paths in a recipe: marked, so that the loader can resolve them against the recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated


class RelativeToRecipe:
    """Marks a field whose relative paths start at the recipe file's directory."""


RecipePath = Annotated[Path, RelativeToRecipe()]
