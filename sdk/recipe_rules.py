"""What no single section of a recipe can know: names that other sections refer to, and widths that a target has.

The rules look at the raw tree, which may be wrong anywhere else, so that their errors come together with all others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import RecipeError
from edgewright.export.targets import TARGETS
from edgewright.recipe_errors import did_you_mean, dotted, show
from edgewright.recipe_shape import at
from edgewright.yaml_positions import Path as TreePath
from edgewright.yaml_positions import Problem, Tree

if TYPE_CHECKING:
    from edgewright.compress.distill import DistillConfig
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
    stages = _named(_sections(tree, "stages"), "train")
    for index, export in enumerate(_sections(tree, "exports")):
        path: TreePath = ("exports", index)
        overridden = any((*path, "model")[: len(known)] == known for known in origins)
        found += _model(export, path, stages, working_directory if overridden else directory)
        found += _target(export, path)
    for index, stage in enumerate(_sections(tree, "stages")):
        found += _methods(stage, ("stages", index))
        found += _elastic(stage, ("stages", index))
    return found


LOSS_OF = {"sampled": "rs_kd", "top_k": "top_k"}
"""The loss for each kind of targets that a cache holds."""
WHOLE = frozenset({"elastic", "shear"})
"""Methods that change the sizes that all layers share."""
PLAIN_ONLY = frozenset({"gguf", "hf"})
"""The targets that know plain linear layers alone."""


def check_caches(recipe: Recipe) -> Iterator[Problem]:
    """Losses that cannot use what their stage's cache will hold (EW-781), or soften it otherwise (EW-797)."""
    caches = {stage.name: stage for stage in recipe.stages if stage.type == "cache"}
    for index, stage in enumerate(recipe.stages):
        if stage.type != "train" or stage.lesson.type != "distill" or stage.lesson.teacher.type != "cache":
            continue
        cache = caches.get(stage.lesson.teacher.stage or "")
        if cache is not None:
            yield from _unusable(stage.lesson, cache.targets.type, cache.temperature, ("stages", index, "objective"))


def check_offers(recipe: Recipe) -> Iterator[Problem]:
    """Losses that cannot use what the models of their stage's teacher give together (EW-781)."""
    for index, stage in enumerate(recipe.stages):
        if stage.type != "train" or stage.lesson.type != "distill" or stage.lesson.teacher.type == "cache":
            continue
        offered = stage.lesson.offered
        for number, loss in enumerate(stage.lesson.losses or ()):
            if loss.accepts and not set(loss.accepts) & set(offered):
                crossed = "beside uld a teacher reads other tokens, of which the other losses know nothing: "
                yield Problem(
                    code="EW-781",
                    what=f"{loss.function} cannot use what this teacher gives",
                    path=("stages", index, "objective", "losses", number),
                    expected=f"a teacher that gives {' or '.join(loss.accepts)}",
                    found=" and ".join(offered),
                    fix=(crossed if stage.lesson.crosses_tokenizers else "") + "leave it out, or take another loss",
                )


def check_hidden_tokens(recipe: Recipe) -> Iterator[Problem]:
    """Spans of hidden tokens that are longer than all that is to be hidden of a sequence (EW-113)."""
    length = recipe.data.sequence_length
    for index, stage in enumerate(recipe.stages):
        if stage.type != "train" or stage.lesson.type != "distill":
            continue
        for number, loss in enumerate(stage.lesson.losses or ()):
            if loss.function == "had" and loss.span > (most := loss.longest_span(length)):
                yield Problem(
                    code="EW-113",
                    what=f"spans of {loss.span} tokens hide more than {loss.mask_ratio:g} of a sequence of {length}",
                    path=("stages", index, "objective", "losses", number),
                    expected=f"span: at most {most}" if most else "a longer sequence, or a higher mask_ratio",
                    found=f"span: {loss.span}",
                )


def check_written(recipe: Recipe) -> Iterator[Problem]:
    """Stages that bring running text to data of examples (EW-798): its prompts would be learned like answers."""
    for index, stage in enumerate(recipe.stages):
        if stage.type in ("generate", "text") and not recipe.data.layout.running_text:
            yield Problem(
                code="EW-798",
                what=f"stage {stage.name} would bring running text, and the data are examples",
                path=("stages", index, "type"),
                expected="data of running text",
                found=f"data of the type {recipe.data.type}",
                fix="leave the stage out, or write in a recipe with data: {type: files}; "
                "with examples a teacher is learned from by objective: {type: distill}, live or from a cache",
            )


def check_cache(stage: str, objective: DistillConfig, kind: str, temperature: float) -> None:
    """The same of a cache that is there already.

    Raises:
        RecipeError: EW-781, EW-797.
    """
    for problem in _unusable(objective, kind, temperature, ()):
        raise RecipeError(
            problem.code,
            problem.what,
            where=f"stages.{stage}.objective",
            expected=problem.expected,
            found=problem.found,
            fix=problem.fix,
        )


def _unusable(objective: DistillConfig, kind: str, temperature: float, path: TreePath) -> Iterator[Problem]:
    for number, loss in enumerate(objective.weighted()):
        place = path if objective.losses is None else (*path, "losses", number)
        softened = loss.model_dump().get("temperature")
        if loss.accepts and kind not in loss.accepts:
            yield Problem(
                code="EW-781",
                what=f"{loss.function} cannot use what this cache will hold",
                path=place,
                expected=f"targets of the kind {' or '.join(loss.accepts)}",
                found=kind,
                fix=f"losses: [{{function: {LOSS_OF[kind]}, weight: 0.9}}, {{function: cross_entropy, weight: rest}}]",
            )
        elif loss.accepts and softened is not None and softened != temperature:
            yield Problem(
                code="EW-797",
                what=f"{loss.function} and the cache that it learns from have different temperatures",
                path=place,
                expected=str(temperature),
                found=str(softened),
                fix="give both the same: targets that were drawn cannot be softened again",
            )


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


TRAIN = ("train",)
REFERENCES: tuple[tuple[TreePath, str | None, tuple[str, ...]], ...] = (
    (("student",), "stage", TRAIN),
    (("student", "source"), "stage", TRAIN),
    (("objective", "teacher"), "stage", TRAIN),
    (("objective", "teacher"), "cache", ("cache",)),
    (("teacher",), "stage", TRAIN),
    (("generated",), None, ("generate", "text")),
)
"""Sections of a stage that name another one: where, of which `type` (None: any), and what types that stage may have."""


def _named(stages: list[dict[str, Any]], kind: str) -> list[str]:
    """The names of those of a type."""
    names = [stage.get("name") for stage in stages if stage.get("type", "train") == kind]
    return [name for name in names if isinstance(name, str)]


def _stage_references(tree: Tree) -> Iterator[Problem]:
    """What names a stage must name one before its own, and of the type that makes what is needed."""
    stages = _sections(tree, "stages")
    for index in range(len(stages)):
        for inner, kind, needed in _references(stages[index]):
            path: TreePath = ("stages", index, *inner)
            section = at(tree, path)
            if not isinstance(section, dict) or kind not in (None, section.get("type")):
                continue
            name = section.get("stage")
            if not isinstance(name, str):
                continue
            fitting = [stage for stage in stages if stage.get("type", "train") in needed]
            earlier = [
                stage["name"] for stage in stages[:index] if stage in fitting and isinstance(stage.get("name"), str)
            ]
            later = [
                stage["name"] for stage in stages[index:] if stage in fitting and isinstance(stage.get("name"), str)
            ]
            if name not in earlier:
                yield _bad_reference(name, (*path, "stage"), earlier, later, needed)


def _references(stage: dict[str, Any]) -> Iterator[tuple[TreePath, str | None, tuple[str, ...]]]:
    """`REFERENCES`, and the members of ensembles."""
    yield from REFERENCES
    for inner in (("objective", "teacher"), ("teacher",)):
        members = at(stage, (*inner, "members"))
        for number in range(len(members) if isinstance(members, list) else 0):
            yield (*inner, "members", number), "stage", TRAIN


def _bad_reference(name: str, path: TreePath, earlier: list[str], later: list[str], needed: tuple[str, ...]) -> Problem:
    kind = "stage" if needed == TRAIN else f"stage of type {' or '.join(needed)}"
    what = f"{dotted(path)} names a stage that comes later" if name in later else f"{dotted(path)} names no {kind}"
    expected = f"an earlier {kind}: " + ", ".join(earlier) if earlier else f"an earlier {kind}, and there is none"
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


def _elastic(stage: dict[str, Any], path: TreePath) -> Iterator[Problem]:
    """The method elastic and the objective sandwich need each other, and a forward that is not compiled."""
    methods = stage.get("methods")
    kinds = [
        method.get("type") for method in (methods if isinstance(methods, list) else []) if isinstance(method, dict)
    ]
    objective = stage.get("objective")
    sandwich = isinstance(objective, dict) and objective.get("type") == "sandwich"
    if ("elastic" in kinds) != sandwich:
        there, missing = ("objective", "methods") if sandwich else ("methods", "objective")
        lacks = "methods: [{type: elastic, ...}]" if sandwich else "objective: {type: sandwich}"
        yield Problem(
            code="EW-767",
            what=f"{dotted(path)} has one of the method elastic and the objective sandwich, which need each other",
            path=(*path, there),
            expected=lacks,
            found=f"{there} without it",
            fix=f"set {missing}, or remove the other",
        )
    for kind in sorted(WHOLE.intersection(filter(None, kinds))) if len(kinds) > 1 else ():
        yield Problem(
            code="EW-125",
            what=f"{dotted(path)} has methods beside {kind}, which takes every layer",
            path=(*path, "methods"),
            expected=f"{kind} alone",
            found=", ".join(map(str, kinds)),
            fix="the others in a later stage, or a run of its own",
        )
    training = stage.get("training")
    if "elastic" in kinds and isinstance(training, dict) and training.get("compile") == "on":
        yield Problem(
            code="EW-767",
            what=f"{dotted(path)} compiles an elastic model, whose forward is another one for every size",
            path=(*path, "training", "compile"),
            expected="auto or off",
            found="on",
            fix="training.compile: auto",
        )
