"""Every error code in the code has its long form, and every long form its error."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgewright import errors
from edgewright.error_catalogue import catalogue
from edgewright.errors import EdgewrightError, RecipeError
from edgewright.explain import explain

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, EdgewrightError)
}


def uses() -> Iterator[tuple[str, str, str]]:
    """(code, name of what is called with it, file) of every call in the package."""
    for room in ("sdk", "compress", "export"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_code(node.value):
                    yield node.value, "", path.name
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                    first = node.args[0]
                    if isinstance(first, ast.Constant) and isinstance(first.value, str) and is_code(first.value):
                        yield first.value, node.func.id, path.name


def is_code(text: str) -> bool:
    return text.startswith("EW-") and text[3:].isdigit() and len(text) == 6


def test_every_code_is_explained_and_every_explanation_is_used() -> None:
    used = {code for code, _, _ in uses()}
    assert sorted(used - catalogue().keys()) == [], "codes without an entry in sdk/templates/errors.md"
    assert sorted(catalogue().keys() - used) == [], "entries that no code raises"


def test_the_exit_codes_are_those_of_the_classes() -> None:
    wrong = [
        (code, name, file)
        for code, name, file in uses()
        if name in CLASSES and CLASSES[name].exit_code != catalogue()[code].exit_code
    ]
    assert wrong == []


def test_the_catalogue_is_in_order_and_says_something() -> None:
    assert list(catalogue()) == sorted(catalogue())
    for code, entry in catalogue().items():
        assert entry.title and entry.title[-1] != "." and len(entry.title) < 70, code
        assert len(entry.text) > 30 and entry.text.endswith("."), code


@pytest.mark.parametrize("name", ["EW-110", "ew-110", "110", " EW110 "])
def test_a_code_is_explained_however_it_is_written(name: str) -> None:
    found = explain(name)
    assert (found.code, found.title, found.exit_code) == ("EW-110", "Unknown key", 2)
    assert found.to_json()["text"] == found.text and "--schema" in found.text


@pytest.mark.parametrize("name", ["EW-999", "nonsense", ""])
def test_an_unknown_code(name: str) -> None:
    with pytest.raises(RecipeError, match="EW-192"):
        explain(name)
