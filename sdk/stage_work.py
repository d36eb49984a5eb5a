"""What a stage of a recipe gets to work with, of whatever type it is, and what it leaves for the stages after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.world import World

if TYPE_CHECKING:
    from edgewright.data import Corpus
    from edgewright.recipe import Recipe
    from edgewright.training import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """A stage's surroundings in a run."""

    recipe: Recipe
    corpus: Corpus
    directory: Path
    """The stage's own."""
    earlier: dict[str, Path]
    """What the finished stages left: model directories, caches, corpora."""
    say: Callable[[str], None]
    stop: StopRequest
    world: World


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a stage leaves that trains nothing."""

    output: Path
    """The cache or the corpus."""
