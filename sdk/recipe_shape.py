"""What a recipe's models say about its tree: which model a mapping is meant for, which fields are paths.

Pydantic validates; this reads the same annotations to say *where* and *what instead*. It works on the raw tree, which
may be wrong anywhere, so nothing here raises for what a user wrote.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from edgewright.paths import RelativeToRecipe
from edgewright.yaml_positions import Path, Tree


@dataclass(frozen=True, slots=True)
class Usual:
    """Marks a union of sections: what a section without `type:` is."""

    type: str


def type_of(value: Any, usual: str) -> str:
    """The type of a section in such a union, of a mapping or of a built one."""
    found = value.get("type", usual) if isinstance(value, dict) else getattr(value, "type", usual)
    return found if isinstance(found, str) else ""


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation without None; one for anything that is no union."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(one for part in get_args(annotation) for one in members(part) if one is not type(None))
    return (annotation,)


def models(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models among the alternatives."""
    return tuple(one for one in members(annotation) if isinstance(one, type) and issubclass(one, BaseModel))


TAGS = ("type", "function")
"""The keys that pick the component of a section: `function` those of losses."""


def tag_key(model: type[BaseModel]) -> str | None:
    """The key whose value names this model, None if it has none."""
    fields = model.model_fields
    return next((key for key in TAGS if key in fields and get_origin(fields[key].annotation) is Literal), None)


def tag(model: type[BaseModel]) -> str | None:
    """The value of `type:` (or `function:`) that names this model, or None if it has no such field."""
    key = tag_key(model)
    return None if key is None else str(get_args(model.model_fields[key].annotation)[0])


def model_for(annotation: Any, value: Tree) -> type[BaseModel] | None:
    """The model that a mapping is meant for: the only one, or the one that its `type:` (or `function:`) names."""
    candidates = models(annotation)
    if len(candidates) == 1:
        return candidates[0]
    if isinstance(value, dict):
        usual = usual_type(annotation)
        named = [model for model in candidates if (key := tag_key(model)) and tag(model) == value.get(key, usual)]
        return named[0] if named else None
    return None


def usual_type(annotation: Any) -> str | None:
    """What `Usual` says of a union; None where a section has to name its type."""
    notes = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((note.type for note in notes if isinstance(note, Usual)), None)


def element(annotation: Any) -> Any:
    """The annotation of the items of a list or tuple; None for anything else."""
    for one in members(annotation):
        if get_origin(one) in (list, tuple):
            return get_args(one)[0]
    return None


def child(annotation: Any, value: Tree, key: str | int) -> Any:
    """The annotation of one item or field below `value`; None where there is none."""
    if isinstance(key, int):
        return element(annotation)
    model = model_for(annotation, value)
    field = model.model_fields.get(key) if model is not None else None
    if field is None:
        return None
    annotated: Any = Annotated
    return annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def locate(annotation: Any, tree: Tree, location: tuple[str | int, ...]) -> tuple[Path, Any]:
    """Turn the location of a pydantic error into a path of the tree, and the annotation there.

    Pydantic puts the tag of a discriminated union and the name of a union's branch into its locations.
    """
    path: Path = ()
    rest = list(location)
    while rest:
        if len(members(annotation)) > 1:
            rest.pop(0)
            if not rest:
                break
        key = rest.pop(0)
        annotation = child(annotation, tree, key)
        path += (key,)
        tree = below(tree, key)
    return path, annotation


def below(tree: Tree, key: str | int) -> Tree:
    """The value at a key or index, None where there is none."""
    if isinstance(tree, dict) and isinstance(key, str):
        return tree.get(key)
    if isinstance(tree, list) and isinstance(key, int) and 0 <= key < len(tree):
        return tree[key]
    return None


def at(tree: Tree, path: Path) -> Tree:
    """The value at a path, None where there is none."""
    for key in path:
        tree = below(tree, key)
    return tree


def is_path(annotation: Any) -> bool:
    """Whether a text with this annotation, or in a list with this annotation, is a path of the recipe."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        return any(isinstance(note, RelativeToRecipe) for note in notes) or is_path(inner)
    if get_origin(annotation) in (Union, types.UnionType, list, tuple):
        return any(is_path(part) for part in get_args(annotation))
    return False


def walk(annotation: Any, tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Any, Tree]]:
    """Every value of the tree with its path and annotation (None where the recipe has no such place)."""
    yield path, annotation, tree
    items: list[tuple[str | int, Tree]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    for key, value in items:
        yield from walk(None if annotation is None else child(annotation, tree, key), value, (*path, key))


def fields(annotation: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key that a recipe can have, with its place as people write it: (`learning_rate`, `stages[].optimizer`)."""
    for model in models(annotation):
        for key in model.model_fields:
            yield key, path
            below_it = child(model, {}, key)
            item = element(below_it)
            place = f"{path}.{key}".lstrip(".")
            yield from fields(below_it if item is None else item, place if item is None else f"{place}[]")
