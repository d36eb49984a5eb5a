"""`target:` of a recipe: the model that a draft is made for, named once and meant wherever a path is the word `target`.

    target: teacher                                       # or on the command line: target=PATH
    data: {..., tokenizer: {type: pretrained, path: target}}
    stages: [{..., student: {type: draft, source: {type: checkpoint, model: target}}}]

A directory that is really called so is written `./target`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgewright import recipe_shape as shape
from edgewright.yaml_positions import Path as TreePath
from edgewright.yaml_positions import Problem

WORD = "target"


def put_target(
    recipe: Any, tree: dict[str, Any], directory: Path, working_directory: Path, origins: dict[TreePath, str]
) -> Iterator[Problem]:
    """Make `target` absolute and put it in the place of its name, in the tree of a recipe.

    Args:
        recipe: the class of recipes, whose annotations say which values are paths.
        tree: of the recipe, maybe invalid; changed in place.
        directory: of the recipe file, where its paths start.
        working_directory: where those of overrides start.
        origins: which override set which path.

    Yields:
        EW-847, nothing in the recipe names it.
    """
    target = tree.get(WORD)
    if not isinstance(target, str):
        return
    place = working_directory if (WORD,) in origins else directory
    tree[WORD] = os.path.normpath(os.path.join(place, os.path.expanduser(target)))
    named = [path for path, value in _paths(recipe, tree) if value == WORD] + list(_exports(tree))
    for path in named:
        owner: Any = shape.at(tree, path[:-1])
        owner[path[-1]] = tree[WORD]
    if not named and all(value != tree[WORD] for _, value in _paths(recipe, tree, directory)):
        yield Problem(
            code="EW-847",
            what="target is given, and nothing in this recipe is made for it",
            path=(WORD,),
            expected=f"at least one path that is the word {WORD}, as in examples/draft.yaml",
            found=target,
            fix=f"name the model where it is meant, with {{type: checkpoint, model: {WORD}}}, or leave target out",
        )


def _paths(recipe: Any, tree: dict[str, Any], directory: Path | None = None) -> list[tuple[TreePath, str]]:
    """The paths of the tree but `target` itself; with a directory absolute, as a resolved recipe names the target."""
    return [
        (path, value if directory is None else os.path.normpath(os.path.join(directory, value)))
        for path, annotation, value in shape.walk(recipe, tree)
        if isinstance(value, str) and shape.is_path(annotation) and path != (WORD,)
    ]


def _exports(tree: dict[str, Any]) -> Iterator[TreePath]:
    """Exports of the target itself, where no stage has its name."""
    stages, exports = tree.get("stages"), tree.get("exports")
    names = [s.get("name") for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    for index, export in enumerate(exports if isinstance(exports, list) else []):
        if isinstance(export, dict) and export.get("model") == WORD and WORD not in names:
            yield ("exports", index, "model")
