"""YAML 1.2 to plain values, with the line and column of every key and value.

Only what a recipe needs: mappings with string keys, lists, strings, numbers, booleans, null. Everything that is legal
in YAML but never meant in a recipe - duplicate keys, tags, huge aliases, infinities - is an error with a position. All
errors of a text are collected, except that nothing after a syntax error can be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 100_000
"""A recipe is a page or two; a file larger than this is something else."""
MAX_NODES = 20_000
"""Nodes after aliases are expanded: an alias bomb of a few hundred bytes stands for billions."""
MAX_DEPTH = 32
MAX_BRACKETS = 128
"""Brackets open at once, those in quoted text included."""

Path = tuple[str | int, ...]
"""The way to a value from the root: keys and list indices."""
Tree = dict[str, Any] | list[Any] | str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the text, both from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with a recipe, at a path of its tree; `mark` overrides the path's own position."""

    code: str
    what: str
    path: Path = ()
    at_key: bool = False
    mark: Mark | None = None
    expected: str | None = None
    found: str | None = None
    fix: str | None = None


@dataclass(slots=True)
class Document:
    """A parsed text: its values, where they stand, and what was wrong with it."""

    tree: Tree = None
    keys: dict[Path, Mark] = field(default_factory=dict)
    values: dict[Path, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse_yaml(text: str) -> Document:
    """Parse one YAML 1.2 document. Never raises for what the text says: see `Document.problems`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    document = Document()
    if _brackets(text) > MAX_BRACKETS:  # the parser's time grows with the square of the nesting
        document.problems.append(_too_much(None, f"at most {MAX_BRACKETS} open brackets", "deeper nesting"))
        return document
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Mark(mark.line + 1, mark.column + 1) if mark is not None else None
        document.problems.append(_syntax(error.problem or str(error), place, text))
    except (YAMLError, ValueError) as error:
        document.problems.append(_syntax(str(error).splitlines()[0], None, text))
    except RecursionError:
        document.problems.append(_too_much(None, f"at most {MAX_DEPTH} levels", "deeper nesting"))
    else:
        if root is not None:
            document.tree = _Builder(document).build(root, (), 0)
    return document


def _brackets(text: str) -> int:
    """The most brackets and braces that are open at once."""
    deepest = depth = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _syntax(problem: str, mark: Mark | None, text: str) -> Problem:
    line = text.splitlines()[mark.line - 1] if mark is not None and mark.line <= len(text.splitlines()) else ""
    tab = "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in problem
    return Problem(
        code="EW-102",
        what=f"this is not valid YAML: {problem}",
        mark=mark or Mark(1, 1),
        expected="YAML 1.2",
        found=ascii(line.strip()[:60]) if line else None,
        fix="indent with spaces: YAML allows no tabs" if tab else "quote text that holds : # [ ] { } * & ! or %",
    )


def _too_much(mark: Mark | None, expected: str, found: str) -> Problem:
    fix = "write the recipe without nested anchors and aliases"
    return Problem(
        code="EW-105", what="this YAML is too large for a recipe", mark=mark, expected=expected, found=found, fix=fix
    )


class _TooMuch(Exception):
    pass


class _Builder:
    """Builds plain values from composed nodes, and notes positions and problems."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def build(self, root: Node, path: Path, depth: int) -> Tree:
        try:
            return self._value(root, path, depth)
        except _TooMuch:
            return None

    def _value(self, node: Node, path: Path, depth: int) -> Tree:
        from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

        mark = _mark(node)
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            limits = f"at most {MAX_NODES} values in {MAX_DEPTH} levels"
            self.document.problems.append(_too_much(mark, limits, "more, after aliases are expanded"))
            raise _TooMuch
        self.document.values[path] = mark
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return self._sequence(node, path, depth)
        assert isinstance(node, ScalarNode), "YAML has three kinds of nodes"
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: Path, depth: int) -> Tree:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, mark = key_node.value, _mark(key_node)
            if not isinstance(key, str):
                self._problem("EW-105", path, "a key that is no plain word", "a word", "a list or mapping", mark)
                continue
            if key in result:
                first = self.document.keys[*path, key]
                found = f"again here, first on line {first.line}"
                self._problem("EW-104", (*path, key), f"the key {key!r} occurs twice", "every key once", found, mark)
                continue
            self.document.keys[*path, key] = mark
            result[key] = self._value(value_node, (*path, key), depth + 1)
        return result

    def _sequence(self, node: SequenceNode, path: Path, depth: int) -> Tree:
        return [self._value(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]

    def _scalar(self, node: ScalarNode, path: Path) -> Tree:
        kind = str(node.tag).rpartition(":")[2]
        if kind not in _SCALARS or not str(node.tag).startswith("tag:yaml.org,2002:"):
            self._problem("EW-105", path, "tags are not used in recipes", "a plain value", str(node.tag))
            return None
        try:
            return _SCALARS[kind](node.value)
        except ValueError:
            self._problem("EW-105", path, "this number cannot be used", "a finite number", node.value)
            return None

    def _problem(self, code: str, path: Path, what: str, expected: str, found: str, mark: Mark | None = None) -> None:
        self.document.problems.append(
            Problem(code=code, what=what, path=path, mark=mark, expected=expected, found=found)
        )


def _mark(node: Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    return int(digits, 0) if digits.lstrip("+-").startswith(("0x", "0o", "0b")) else int(digits)


def _float(text: str) -> int | float:
    """A finite float; a whole number written with an exponent (`1e6` steps) is an integer."""
    value = float(text.replace("_", ""))
    if not math.isfinite(value):
        raise ValueError("not finite")
    whole = "e" in text.lower() and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


_SCALARS: dict[str, Callable[[str], Tree]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": _float,
    "str": str,
    "timestamp": str,
    "merge": str,
    "value": str,
}
