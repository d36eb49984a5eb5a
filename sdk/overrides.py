"""`section.key=value` on the command line: the value is YAML, the path runs through keys, list indices and names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from edgewright.recipe_errors import did_you_mean, dotted, show
from edgewright.yaml_positions import Path, Problem, Tree, parse_yaml

NOT_YAML = ("*", "&", "!", "@", "%", "`")
"""First characters that mean something else in YAML, and that an override may well begin with: `data.files=*.txt`."""


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> tuple[dict[Path, str], list[Problem]]:
    """Change `tree` in place.

    Args:
        tree: of the recipe, maybe invalid.
        overrides: `stages.0.budget.max_steps=10` or `stages.student.budget.max_steps=10`.

    Returns:
        (which override set which path, the problems of the overrides themselves).
    """
    origins: dict[Path, str] = {}
    found: list[Problem] = []
    for text in overrides:
        path, problem = _apply(tree, text)
        if problem is not None:
            found.append(replace(problem, path=(f"={text}",)))
            origins[f"={text}",] = text
        else:
            origins = {known: origin for known, origin in origins.items() if known[: len(path)] != path}
            origins[path] = text
    return origins, found


def _apply(tree: dict[str, Any], text: str) -> tuple[Path, Problem | None]:
    name, equals, value_text = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        return (), _bad("this is no override", "section.key=value", text)
    value, problem = _value(value_text)
    if problem is not None:
        return (), problem
    path: Path = ()
    node: Any = tree
    for number, part in enumerate(parts):
        key, problem = _step(node, part, path)
        if problem is not None:
            return (), problem
        path += (key,)
        if number == len(parts) - 1:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    return path, None


def _step(node: Any, part: str, path: Path) -> tuple[str | int, Problem | None]:
    """The key or index that one part of the name means below `node`."""
    if isinstance(node, dict):
        return part, None
    if not isinstance(node, list):
        return part, _bad(f"{dotted(path)} has no keys", "the name of a section", show(node))
    names = [str(item["name"]) if isinstance(item, dict) and "name" in item else "" for item in node]
    if part in names:
        return names.index(part), None
    if part.isdecimal() and int(part) < len(node):
        return int(part), None
    valid = [name for name in names if name] + [str(index) for index in range(len(node))]
    expected = "one of " + ", ".join(valid) if valid else "an empty list has nothing to change"
    return part, _bad(f"{dotted(path)} has no {part!r}", expected, part, did_you_mean(part, valid))


def _value(text: str) -> tuple[Tree, Problem | None]:
    if text.lstrip().startswith(NOT_YAML):
        return text, None
    document = parse_yaml(text)
    if document.problems:
        problem = document.problems[0]
        return None, _bad(
            f"the value is not valid YAML: {problem.what}", "YAML", text, "quote the value: 'key=\"text\"'"
        )
    return document.tree, None


def _bad(what: str, expected: str, found: str, fix: str | None = None) -> Problem:
    return Problem(code="EW-116", what=what, expected=expected, found=found, fix=fix)
