"""What no single section of a recipe can know: names that other sections refer to, and widths that a target has.

The rules look at the raw tree, which may be wrong anywhere else, so that their errors come together with all others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.export.targets import TARGETS
from edgewright.recipe_errors import did_you_mean, dotted, show
from edgewright.recipe_shape import at
from edgewright.yaml_positions import Path as TreePath
from edgewright.yaml_positions import Problem, Tree

if TYPE_CHECKING:
    from edgewright.recipe import Recipe, StageConfig


def check_rules(
    tree: dict[str, Any], directory: Path, working_directory: Path, origins: dict[TreePath, str]
) -> list[Problem]:
    """Problems between sections; also makes `exports[].model` absolute where it is a directory.

    Args:
        tree: of the recipe.
        directory: of the recipe file; paths in the file start here.
        working_directory: paths in overrides start here.
        origins: which override set which path.
    """
    found = [*_unique_names(tree, "stages"), *_unique_names(tree, "exports"), *_stage_references(tree)]
    stages = _names(tree, "stages")
    for index, export in enumerate(_sections(tree, "exports")):
        path: TreePath = ("exports", index)
        overridden = any((*path, "model")[: len(known)] == known for known in origins)
        found += _model(export, path, stages, working_directory if overridden else directory)
        found += _target(export, path)
    for index, stage in enumerate(_sections(tree, "stages")):
        found += _methods(stage, ("stages", index))
    return found


PLAIN_ONLY = frozenset({"gguf", "hf"})
"""The targets that know plain linear layers alone."""


def check_factors(recipe: Recipe) -> Iterator[Problem]:
    """Exports of factors to a target that cannot hold them (EW-724); only a whole recipe says what a stage leaves."""
    for index, export in enumerate(recipe.exports):
        stage = recipe.stage(export.model)
        method = None if stage is None else _keeper(recipe, stage)
        if method is None or export.to not in PLAIN_ONLY:
            continue
        yield Problem(
            code="EW-724",
            what=f"{export.to} cannot hold the factors that stage {export.model} will have",
            path=("exports", index, "to"),
            expected=" | ".join(sorted(TARGETS.keys() - PLAIN_ONLY)),
            found=f"{export.to}, and the method {method} keeps its factors",
            fix="export to one of these, or set activation: none (and merge: true) in the method",
        )


def _keeper(recipe: Recipe, stage: StageConfig) -> str | None:
    """The method whose factors are there when a stage has ended: one of its own, or of the stage it began from."""
    own = next((method.type for method in stage.methods if method.keeps_factors), None)
    before = recipe.stage(stage.student.stage) if stage.student.type == "stage" else None
    return own or (None if before is None else _keeper(recipe, before))


def _sections(tree: Tree, key: str) -> list[dict[str, Any]]:
    """The items of a list of sections; what is no section counts as an empty one, so that indices stay."""
    value = at(tree, (key,))
    return [item if isinstance(item, dict) else {} for item in value] if isinstance(value, list) else []


def _names(tree: Tree, key: str) -> list[str]:
    return [item["name"] for item in _sections(tree, key) if isinstance(item.get("name"), str)]


def _unique_names(tree: Tree, key: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, section in enumerate(_sections(tree, key)):
        name = section.get("name")
        if isinstance(name, str) and name in seen:
            what = f"two of the {key} have the same name"
            yield Problem(
                code="EW-120", what=what, path=(key, index, "name"), expected="every name once", found=show(name)
            )
        elif isinstance(name, str):
            seen.add(name)


def _stage_references(tree: Tree) -> Iterator[Problem]:
    """Students and teachers that name a stage must name one before their own."""
    names = [section.get("name") for section in _sections(tree, "stages")]
    for index in range(len(names)):
        for inner in (("student",), ("objective", "teacher")):
            path: TreePath = ("stages", index, *inner)
            section = at(tree, path)
            if (
                not isinstance(section, dict)
                or section.get("type") != "stage"
                or not isinstance(section.get("stage"), str)
            ):
                continue
            earlier = [name for name in names[:index] if isinstance(name, str)]
            if section["stage"] not in earlier:
                yield _bad_reference(
                    section["stage"], (*path, "stage"), earlier, [name for name in names[index:] if name]
                )


def _bad_reference(name: str, path: TreePath, earlier: list[str], later: list[str]) -> Problem:
    what = f"{dotted(path)} names a stage that comes later" if name in later else f"{dotted(path)} names no stage"
    expected = "an earlier stage: " + ", ".join(earlier) if earlier else "an earlier stage, and there is none"
    fix = "move that stage before this one" if name in later else did_you_mean(name, earlier)
    return Problem(code="EW-121", what=what, path=path, expected=expected, found=show(name), fix=fix)


def _model(export: dict[str, Any], path: TreePath, stages: list[str], directory: Path) -> Iterator[Problem]:
    """An export's model: a stage, else a directory, whose path is made absolute in place."""
    name = export.get("model")
    if not isinstance(name, str) or name in stages:
        return
    place = os.path.normpath(directory / os.path.expanduser(name))
    if os.path.isdir(place):
        export["model"] = place
        return
    expected = "a stage (" + ", ".join(stages) + ") or a model directory"
    found = f"{show(name)}; there is no directory {place}"
    fix = did_you_mean(name, stages)
    what = f"{dotted(path)} exports an unknown model"
    yield Problem(code="EW-122", what=what, path=(*path, "model"), expected=expected, found=found, fix=fix)


def _target(export: dict[str, Any], path: TreePath) -> Iterator[Problem]:
    target = export.get("to")
    if not isinstance(target, str):
        return
    if target not in TARGETS:
        expected, fix = " | ".join(TARGETS), did_you_mean(target, TARGETS)
        what = f"{dotted(path)} has an unknown target"
        yield Problem(code="EW-123", what=what, path=(*path, "to"), expected=expected, found=show(target), fix=fix)
        return
    for key in ("quant", "embedding_quant"):
        widths = {name: each.quants if key == "quant" else each.embedding_quants for name, each in TARGETS.items()}
        value, valid = export.get(key), widths[target]
        if isinstance(value, str) and value not in valid:
            others = ", ".join(name for name, quants in widths.items() if value in quants)
            fix = did_you_mean(value, valid) or (f"{value} is a width of {others}" if others else None)
            what = f"{target} has no such {key}"
            yield Problem(
                code="EW-124", what=what, path=(*path, key), expected=" | ".join(valid), found=show(value), fix=fix
            )


def _methods(stage: dict[str, Any], path: TreePath) -> Iterator[Problem]:
    """Twice the same method only where each leaves layers to the other: EW-711 tells later of those that both want."""
    everything: dict[str, bool] = {}
    methods = stage.get("methods")
    yield from _after_freezing(methods, path)
    for index, method in enumerate(methods if isinstance(methods, list) else []):
        kind = method.get("type") if isinstance(method, dict) else None
        if not isinstance(kind, str):
            continue
        takes_all = not (method.get("layers") or method.get("exclude"))
        if kind in everything and (takes_all or everything[kind]):
            what = f"{dotted(path)} uses the method {kind} twice, and one of the two takes every layer"
            fix = "remove one of the two, or give both `layers` or `exclude`"
            yield Problem(
                code="EW-125",
                what=what,
                path=(*path, "methods", index),
                expected="every method once, or each with layers of its own",
                found=kind,
                fix=fix,
            )
        everything[kind] = takes_all or everything.get(kind, False)


FREEZES_THE_REST = "lora"
"""The method that freezes what no method before it trains."""


def _after_freezing(methods: Any, path: TreePath) -> Iterator[Problem]:
    """Methods after one that freezes the rest of the model: their layers would be frozen before they get them."""
    kinds = [
        method.get("type") if isinstance(method, dict) else None
        for method in (methods if isinstance(methods, list) else [])
    ]
    first = kinds.index(FREEZES_THE_REST) if FREEZES_THE_REST in kinds else len(kinds)
    for index, kind in enumerate(kinds):
        if index > first and isinstance(kind, str) and kind != FREEZES_THE_REST:
            yield Problem(
                code="EW-125",
                what=f"{dotted(path)} uses the method {kind} after {FREEZES_THE_REST}, which freezes its layers",
                path=(*path, "methods", index),
                expected=f"{FREEZES_THE_REST} as the last method",
                found=kind,
                fix=f"put {FREEZES_THE_REST} last",
            )
