"""From a recipe to what can be simulated: the models of every stage as architectures, and the decisions of its run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgewright.planner.simulate import Case
from edgewright.preview import Reserved, architecture, preview, stored_architecture
from edgewright.student import WITHOUT_SDPA
from edgewright.training import decide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.planner.devices import Device
    from edgewright.recipe import Recipe, StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModels:
    """The models of a stage, on meta."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    notes: tuple[str, ...] = field(default=())


def stage_models(recipe: Recipe, vocab_size: int) -> Iterator[tuple[StageConfig, StageModels]]:
    """Every stage with what it starts from and learns from, in order.

    Raises:
        EdgewrightError: what `preview` and `architecture` raise.
    """
    left: dict[str, PreTrainedModel] = {}
    for stage in recipe.stages:
        teacher = None
        if stage.objective.type == "distill":
            config = stage.objective.teacher
            teacher = copy.deepcopy(left[config.stage]) if config.type == "stage" else stored(config.model)
        if stage.student.type == "checkpoint":
            student = stored(stage.student.model)
        else:
            student = architecture(recipe, stage, vocab_size, left)
        notes = [note for model in (student, teacher) if model is not None for note in _dense(model)]
        yield stage, StageModels(student=copy.deepcopy(student), teacher=teacher, notes=tuple(notes))
        left[stage.name] = preview(recipe, stage, student).left


def case(stage: StageConfig, models: StageModels, recipe: Recipe, device: Device) -> Case:
    """What a stage's step depends on, on a device."""
    settings, length = stage.training, recipe.data.sequence_length
    per_step = settings.tokens_per_step(length)
    parameters = sum(parameter.numel() for parameter in models.student.parameters())
    decisions = decide(settings, parameters=parameters, tokens=stage.budget.steps(per_step) * per_step)
    return Case(
        stage=stage,
        student=models.student,
        teacher=models.teacher,
        sequence_length=length,
        decisions=decisions | _on(device, settings.precision),
        borders=recipe.data.restart_at_documents,
    )


def _on(device: Device, precision: str) -> dict[str, Any]:
    """What another device than this machine's decides otherwise: compute type, and no compilation on GPUs."""
    if device.kind == "cpu" or device.here:
        return {"device": device.kind}
    narrow = device.bf16 is not None or device.fp32 is None
    chosen = {"bf16": "bfloat16", "fp32": "float32", "auto": "bfloat16" if narrow else "float32"}[precision]
    return {"device": device.kind, "precision": chosen, "compile": False}


def stored(directory: Path) -> PreTrainedModel:
    """The model of a directory on meta, with the attention that training gives it."""
    model = stored_architecture(directory)
    if model.config.model_type in WITHOUT_SDPA:
        model.set_attn_implementation("eager")
    return model


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
