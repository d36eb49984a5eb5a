"""Paths and names in a recipe: paths are marked, so that the loader can resolve them against the recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field


class RelativeToRecipe:
    """Marks a field whose relative paths start at the recipe file's directory."""


RecipePath = Annotated[Path, RelativeToRecipe()]

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""A word that is a folder's name as well."""
