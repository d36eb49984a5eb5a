"""What pydantic finds wrong with a recipe, as problems at places of the file, with the nearest thing that is right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgewright import recipe_shape as shape
from edgewright.paths import NAME_PATTERN
from edgewright.yaml_positions import Path, Problem, Tree

EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a section (key: value)",
    "model_attributes_type": "a section (key: value)",
    "dict_type": "a section (key: value)",
    "path_type": "a path",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
}
"""What each kind of validation error would have taken, filled in from its context."""
_PATTERNS = {NAME_PATTERN: "letters, digits, - and _, at most 64, the first a letter or digit"}
_VALUE_KINDS = ("literal_error", "greater", "less", "multiple", "too_", "string_too", "string_pattern")


def nearest(word: object, valid: Iterable[str]) -> str | None:
    """The valid word that was probably meant."""
    words = list(valid)
    if not isinstance(word, str) or not word:
        return None
    close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    parts = [candidate for candidate in words if len(word) > 2 and (word in candidate or candidate in word)]
    return next(iter([*close, *parts]), None)


def did_you_mean(word: object, valid: Iterable[str]) -> str | None:
    """The line that a user sees under `fix`."""
    found = nearest(word, valid)
    return None if found is None else f"did you mean {found}?"


def show(value: Tree) -> str:
    """A value as an error shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        text = value if len(value) <= 60 else value[:57] + "..."
        return f"the text {text!r}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def problems(error: ValidationError, model: type[BaseModel], tree: Tree) -> list[Problem]:
    """Every error of a validation, one for each place of the recipe."""
    by_path: dict[Path, Problem] = {}
    for details in error.errors(include_url=False):
        problem = _problem(details, model, tree)
        if details["type"] == "too_short" and any(
            len(path) > len(problem.path) and path[: len(problem.path)] == problem.path for path in by_path
        ):
            continue  # only because the items that are wrong were not counted
        before = by_path.get(problem.path)
        if before is not None and before.expected != problem.expected:  # branches of one union, each with its wish
            problem = _merged(before, problem)
        by_path[problem.path] = problem
    return list(by_path.values())


def untagged(model: type[BaseModel], tree: Tree) -> Iterator[Problem]:
    """Sections of which there is only one kind yet, written without `type:`.

    They would be understood today, and would break on the day when there is a second kind.
    """
    for path, annotation, value in shape.walk(model, tree):
        candidates = shape.models(annotation)
        if len(candidates) == 1 and isinstance(value, dict) and "type" not in value:
            name = shape.tag(candidates[0])
            if name is not None:
                yield _missing((*path, "type"), f"type: {name}")


def _problem(details: ErrorDetails, model: type[BaseModel], tree: Tree) -> Problem:
    kind = details["type"]
    path, annotation = shape.locate(model, tree, details["loc"])
    value = shape.at(tree, path)
    if kind == "extra_forbidden":
        return _unknown_key(path, model, tree)
    if kind == "missing":
        return _missing(path, _wanted(annotation))
    if kind in ("union_tag_invalid", "union_tag_not_found") or (kind == "literal_error" and path[-1] in shape.TAGS):
        return _wrong_type(path, annotation, tree)
    if kind == "value_error":
        text = details["msg"].removeprefix("Value error, ")
        return Problem(code="EW-115", what=f"{dotted(path)} does not hold together", path=path, expected=text)
    expected = _expected(details)
    fix = _fix(kind, value, annotation)
    code = "EW-113" if kind.startswith(_VALUE_KINDS) else "EW-112"
    what = (
        f"{dotted(path)} has a value that is not allowed" if code == "EW-113" else f"{dotted(path)} is of a wrong type"
    )
    return Problem(code=code, what=what, path=path, expected=expected, found=show(value), fix=fix)


def _expected(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    if details["type"] == "string_pattern_mismatch" and context["pattern"] in _PATTERNS:
        return _PATTERNS[context["pattern"]]
    return EXPECTED.get(details["type"], details["msg"].removeprefix("Input should be ")).format(**context)


def _fix(kind: str, value: Tree, annotation: Any) -> str | None:
    if kind == "literal_error":
        return did_you_mean(value, (str(option) for one in shape.members(annotation) for option in get_args(one)))
    if kind == "string_type" and isinstance(value, (int, float)):
        return f"put it in quotes: '{value}'"
    if kind in ("float_type", "int_type", "bool_type") and isinstance(value, str):
        return "write it without quotes, and nothing else beside it"
    return None


def _unknown_key(path: Path, model: type[BaseModel], tree: Tree) -> Problem:
    key, parent = str(path[-1]), path[:-1]
    annotation: Any = model
    for number, step in enumerate(parent):
        annotation = shape.child(annotation, shape.at(tree, path[:number]), step)
    owner = shape.model_for(annotation, shape.at(tree, parent))
    valid = list(owner.model_fields) if owner is not None else []
    fix = did_you_mean(key, valid)
    homes = sorted({place or "the top level" for name, place in shape.fields(model) if name == key})
    if fix is None and homes:
        fix = f"{key} belongs in {' or '.join(homes)}"
    place = dotted(parent) or "the recipe"
    expected = "one of " + ", ".join(valid)
    return Problem(
        code="EW-110",
        what=f"unknown key {key!r} in {place}",
        path=path,
        at_key=True,
        expected=expected,
        found=key,
        fix=fix,
    )


def _missing(path: Path, expected: str) -> Problem:
    place = dotted(path[:-1]) or "the recipe"
    return Problem(
        code="EW-111", what=f"{place} lacks the key {path[-1]!r}", path=path, expected=expected, found="nothing"
    )


def _wanted(annotation: Any) -> str:
    """A required field in a word or two."""
    tags = [name for one in shape.models(annotation) if (name := shape.tag(one)) is not None]
    if tags:
        return f"a section with {shape.tag_key(shape.models(annotation)[0])}: " + " | ".join(tags)
    names = {str: "text", FilePath: "a path", int: "a whole number", float: "a number", bool: "true or false"}
    kinds = [names[one] for one in shape.members(annotation) if one in names]
    if shape.element(annotation) is not None:
        return "a list"
    return "a section" if shape.models(annotation) else " or ".join(kinds) or "a value"


def _wrong_type(path: Path, annotation: Any, tree: Tree) -> Problem:
    if path[-1] in shape.TAGS:  # a section of which there is only one kind
        key, path = str(path[-1]), path[:-1]
        valid = [str(option) for option in get_args(annotation)]
    else:
        key = next((found for one in shape.models(annotation) if (found := shape.tag_key(one)) is not None), "type")
        valid = [name for one in shape.models(annotation) if (name := shape.tag(one)) is not None]
    section = shape.at(tree, path)
    if not isinstance(section, dict) or key not in section:
        return _missing((*path, key), f"{key}: " + " | ".join(valid))
    return Problem(
        code="EW-114",
        what=f"{dotted(path)} has an unknown {key}",
        path=(*path, key),
        expected=" | ".join(valid),
        found=show(section[key]),
        fix=did_you_mean(section[key], valid),
    )


def _merged(first: Problem, second: Problem) -> Problem:
    expected = f"{first.expected} or {second.expected}"
    return Problem(
        code=first.code,
        what=first.what,
        path=first.path,
        expected=expected,
        found=first.found,
        fix=first.fix or second.fix,
    )


def dotted(path: Path) -> str:
    """A path as overrides write it: `stages.0.budget`."""
    return ".".join(str(part) for part in path)
