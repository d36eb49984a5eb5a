"""`ls`: what there is to choose from: methods, optimizers, losses, students, targets, presets, teachers, stages,
proposers."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from edgewright._verbs import VerbModule
from edgewright.compress.choice import LayerChoice
from edgewright.errors import RecipeError
from edgewright.recipe_shape import tag_key

Entry = dict[str, object]
EXAMPLE = (512, 512)
"""Shape of a weight that the blocks of every format divide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Everything of one kind."""

    kind: str
    entries: list[Entry]
    """Each with `name`, `summary`, `paper` (None where there is none) and what its kind has besides."""

    def to_json(self) -> dict[str, object]:
        """The object that `ls --json` prints."""
        return {"schema_version": 1, self.kind: self.entries}


def ls(kind: str) -> Listing:
    """What there is of a kind.

    Args:
        kind: a key of `KINDS`.

    Raises:
        RecipeError: EW-534, there is no such kind.
    """
    if kind not in KINDS:
        raise RecipeError(
            "EW-534", "there is nothing of this kind to list", expected=f"one of: {', '.join(KINDS)}", found=kind
        )
    return Listing(kind=kind, entries=KINDS[kind]())


def _methods() -> list[Entry]:
    """With what each saves, and where its result, under the settings it has by default, is exact."""
    from edgewright.export.layout.exact import exact_in
    from edgewright.method import Method
    from edgewright.recipe import MethodConfig

    entries = []
    for config in _sections(MethodConfig):
        assert issubclass(config, LayerChoice)
        entry, usual = _section(config), config.model_construct()  # some have a setting that must be given
        lattice = usual.example("a layer", *EXAMPLE)
        saves = Method.registry[str(entry["name"])].saves
        exact = {} if lattice is None else exact_in(lattice)
        entries.append({**entry, "saves": saves, "finished": usual.finished(), "exact_in": exact})
    return entries


def _optimizers() -> list[Entry]:
    from edgewright.recipe import OptimizerConfig

    return [_section(config) for config in _sections(OptimizerConfig)]


def _losses() -> list[Entry]:
    """What a recipe's `objective` may be, and the functions of `distill`: with the teacher's targets that each accepts,
    and the plain form on whole logits where there is one."""
    from edgewright.compress import losses
    from edgewright.compress.loss_config import LossConfig, WeightedConfig
    from edgewright.recipe import ObjectiveConfig

    functions = []
    for config in _sections(LossConfig):
        assert issubclass(config, WeightedConfig)
        entry = _section(config)
        plain = {"python": f"edgewright.compress.losses.{entry['name']}"} if entry["name"] in losses.__all__ else {}
        functions.append({**entry, "accepts": list(config.accepts), **plain})
    return [*(_section(config) for config in _sections(ObjectiveConfig)), *functions]


def _targets() -> list[Entry]:
    from edgewright.export.layout import exact_lattices
    from edgewright.export.runtimes.opening import SESSIONS, TARGET_OF
    from edgewright.export.targets import TARGETS

    runtimes = {target: runtime for runtime, target in TARGET_OF.items()}
    return [
        {
            "name": name,
            "summary": f"a {'folder' if target.suffix is None else target.suffix + ' file'} for {runtimes[name]}",
            "paper": None,
            "widths": [{"name": width, "exact": exact_lattices(name, width)} for width in target.quants],
            "embedding_widths": list(target.embedding_quants),
            "runtime": runtimes[name],
            "install": SESSIONS[runtimes[name]][3],
        }
        for name, target in TARGETS.items()
    ]


def _teachers() -> list[Entry]:
    from edgewright.compress.teacher_config import TeacherConfig

    return [_section(config) for config in _sections(TeacherConfig)]


def _stages() -> list[Entry]:
    from edgewright.recipe import AnyStageConfig

    return [_section(config) for config in _sections(AnyStageConfig)]


def _students() -> list[Entry]:
    """What a recipe's `student` may be: where a model starts."""
    from edgewright.recipe import StudentConfig

    return [_section(config) for config in _sections(StudentConfig)]


def _presets() -> list[Entry]:
    from edgewright.student import PRESETS, PresetStudentConfig

    return [
        {
            "name": name,
            "summary": "Llama, randomly initialised",
            "paper": None,
            **sizes,
            "parameters_beside_embedding": PresetStudentConfig.model_validate({"preset": name}).parameters(0),
        }
        for name, sizes in PRESETS.items()
    ]


def _proposers() -> list[Entry]:
    """What may draft for a target in `edgewright speculate`, with the option that asks for it."""
    from edgewright.speculative import DraftModel, PromptLookup

    return [
        _described("draft", DraftModel, option="--draft PATH"),
        _described("ngram", PromptLookup, option="--ngram N"),
    ]


KINDS: dict[str, Callable[[], list[Entry]]] = {
    "methods": _methods,
    "optimizers": _optimizers,
    "losses": _losses,
    "students": _students,
    "targets": _targets,
    "presets": _presets,
    "teachers": _teachers,
    "stages": _stages,
    "proposers": _proposers,
}
"""The kinds, and what lists each."""


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The recipe sections that a type allows: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _sections(part)


def _section(config: type[BaseModel]) -> Entry:
    """A section of a recipe, by the name in its `type` (or `function`), with its options."""
    key = tag_key(config)
    assert key is not None, "it is one of several"
    options = [
        {
            "name": name,
            "default": _plain(field.get_default(call_default_factory=True)),
            "required": field.is_required(),
            "choices": list(_choices(field.annotation)),
        }
        for name, field in config.model_fields.items()
        if name != key
    ]
    return _described(str(config.model_fields[key].default), config, options=options)


def _choices(annotation: Any) -> Iterator[object]:
    """The values of an option that takes only some; none where it takes any of its kind."""
    for part in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield part
        else:
            yield from _choices(part)


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value if isinstance(value, str | int | float | bool | list | tuple | None) else None


def _described(name: str, thing: object, **more: object) -> Entry:
    """Name, first sentence and paper of something with a docstring; the paper may stand in its module's."""
    text = inspect.getdoc(thing) or ""
    found = re.search(r"arXiv[: ](\d{4}\.\d{4,5})", text) or re.search(
        r"arXiv[: ](\d{4}\.\d{4,5})", inspect.getdoc(inspect.getmodule(thing)) or ""
    )
    summary = " ".join(text.split("\n\n")[0].split())
    return {"name": name, "summary": summary, "paper": f"arXiv:{found.group(1)}" if found else None, **more}


sys.modules[__name__].__class__ = VerbModule
