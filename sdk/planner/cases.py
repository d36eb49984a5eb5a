"""From a recipe to what can be simulated: the models of every stage as architectures, and the decisions of its run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from edgewright.compress.cache import read_manifest
from edgewright.compress.cache_config import CacheStageConfig, TopKConfig
from edgewright.compress.cache_format import Layout
from edgewright.compress.teacher_config import CachedTeacherConfig
from edgewright.derived import DerivedStudentConfig
from edgewright.method import can_compile
from edgewright.planner.simulate import Case
from edgewright.planner.teachers import as_held, stored, stored_teacher
from edgewright.preview import Reserved, architecture, preview
from edgewright.training import decide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.planner.devices import Device
    from edgewright.recipe import AnyStageConfig, Recipe, StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModels:
    """The models of a stage, on meta."""

    student: PreTrainedModel | None
    """None where nothing is trained."""
    teachers: tuple[PreTrainedModel, ...] = ()
    """As their weights are held."""
    cached: Layout | None = None
    """Of the cache that it learns from."""
    left_parameters: int | None = None
    """Of the finished model, as it is stored; None where nothing is trained, or factors are stored."""
    notes: tuple[str, ...] = field(default=())


def stage_models(recipe: Recipe, vocab_size: int) -> Iterator[tuple[AnyStageConfig, StageModels]]:
    """Every stage with what it starts from and learns from, in order.

    Raises:
        EdgewrightError: what `preview` and `architecture` raise.
    """
    left: dict[str, PreTrainedModel] = {}
    for stage in recipe.stages:
        teachers = tuple(
            as_held(copy.deepcopy(left[config.stage]), config.weights)
            if config.type == "stage"
            else stored_teacher(config.model, config.weights)
            for config in stage.teachers
        )
        if stage.type != "train":
            notes = [note for model in teachers for note in _dense(model)]
            yield stage, StageModels(student=None, teachers=teachers, notes=tuple(notes))
            continue
        if stage.student.type == "checkpoint":
            student = stored(stage.student.model)
        else:
            student = architecture(recipe, stage, vocab_size, left)
        notes = [note for model in (student, *teachers) for note in _dense(model)]
        if isinstance(stage.student, DerivedStudentConfig):
            notes += stage.student.notes(recipe, stage, sum(parameter.numel() for parameter in student.parameters()))
        before = copy.deepcopy(student)
        left[stage.name] = after = preview(recipe, stage, student).left
        plain = not any(config.keeps_factors for config in stage.methods)
        yield (
            stage,
            StageModels(
                student=before,
                teachers=teachers,
                cached=cache_layout(recipe, stage, vocab_size),
                left_parameters=sum(parameter.numel() for parameter in after.parameters()) if plain else None,
                notes=tuple(notes),
            ),
        )


def case(stage: StageConfig, models: StageModels, recipe: Recipe, device: Device) -> Case:
    """What a stage's step depends on, on a device."""
    assert models.student is not None, "the stage trains"
    settings, length = stage.training, recipe.data.sequence_length
    per_step = settings.tokens_per_step(length)
    parameters = sum(parameter.numel() for parameter in models.student.parameters())
    decisions = decide(settings, parameters=parameters, tokens=stage.budget.steps(per_step) * per_step)
    decisions["compile"] &= can_compile(config.type for config in stage.methods)
    return Case(
        stage=stage,
        student=models.student,
        teachers=models.teachers,
        cached=models.cached,
        sequence_length=length,
        decisions=decisions | decided_on(device, settings.precision),
        borders=recipe.data.restart_at_documents,
    )


def decided_on(device: Device, precision: str) -> dict[str, Any]:
    """What another device than this machine's decides otherwise: compute type, and no compilation on GPUs."""
    if device.kind == "cpu" or device.here:
        return {"device": device.kind}
    narrow = device.bf16 is not None or device.fp32 is None
    chosen = {"bf16": "bfloat16", "fp32": "float32", "auto": "bfloat16" if narrow else "float32"}[precision]
    return {"device": device.kind, "precision": chosen, "compile": False}


def cache_layout(recipe: Recipe, stage: StageConfig, vocab_size: int = 2) -> Layout | None:
    """How the cache is laid out that a stage learns from; None where it learns from none.

    Args:
        vocab_size: stands for that of a teacher that is not there yet.
    """
    teacher = stage.teacher
    if not isinstance(teacher, CachedTeacherConfig):
        return None
    if teacher.path is not None:
        return Layout(**read_manifest(teacher.path)["layout"])
    config = next(other for other in recipe.stages if other.name == teacher.stage)
    assert isinstance(config, CacheStageConfig), "the recipe was checked"
    targets = config.targets
    most = targets.k if isinstance(targets, TopKConfig) else targets.samples
    return Layout(kind=targets.type, most=most, vocab_size=vocab_size)


def _dense(model: PreTrainedModel) -> Iterator[str]:
    """Plain layers where an earlier stage will leave factors, whose ranks are known only then."""
    reserved = [(name, module) for name, module in model.named_modules() if isinstance(module, Reserved)]
    for name, module in reserved:
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = module.weight
        if module.bias is not None:
            linear.bias = module.bias
        model.set_submodule(name, linear)
    if reserved:
        yield f"{len(reserved)} layers that an earlier stage leaves as factors are counted as whole matrices"
