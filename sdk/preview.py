"""What the methods of every stage will get, before any is trained: architectures without weights, stage after stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.compress.layers import CompressedLinear, skipped
from edgewright.derived import DerivedStudentConfig, source_of
from edgewright.errors import RecipeError, in_section
from edgewright.memory_rules import check_release
from edgewright.method import Method
from edgewright.student import (
    CheckpointStudentConfig,
    PresetStudentConfig,
    StageStudentConfig,
    check_same_logits,
    output_head,
    preset_config,
)
from edgewright.weights import check_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

    from edgewright.compress.choice import LayerChoice
    from edgewright.recipe import MethodConfig, Recipe, StageConfig

SEEN_TOKENS = 8
"""Positions, and rows of the head, by which a family's logits are looked at."""
LARGE_LOGITS = 100.0
"""Their standard deviation, so that a cap shows."""
Shapes = dict[str, tuple[int, int]]
"""[out, in] of linear layers, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A stage that has not been trained yet."""

    shares: tuple[tuple[LayerChoice, Shapes], ...]
    """Every method's settings and the layers that it will get."""
    alone: tuple[str, ...]
    """The linear layers, but the output head, that no method gets."""
    left: PreTrainedModel
    """The architecture that the stage leaves, on meta."""


class Reserved(CompressedLinear):
    """Stands for a layer that a method will represent; it computes nothing."""

    def __init__(self, linear: nn.Linear, method: str, *, stored: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.method = method
        self.stored = stored

    def effective_weight(self) -> Tensor:
        raise ValueError("a preview has no weights")

    def flops(self) -> int:
        return 2 * self.in_features * self.out_features


def check_stages(recipe: Recipe, vocab_size: int, finished: Mapping[str, Path]) -> None:
    """Refuse a recipe of which a later stage could not begin, before the first one is trained.

    Args:
        recipe: the whole of it.
        vocab_size: of the corpus.
        finished: model directories of the stages that are done.

    Raises:
        RecipeError: as `preview` does, at the first stage that cannot begin.
    """
    left: dict[str, PreTrainedModel] = {}
    for stage in recipe.trainings:
        if stage.name in finished:
            left[stage.name] = stored_architecture(finished[stage.name])
        else:
            check_starts(recipe, stage)
            student = architecture(recipe, stage, vocab_size, left)
            check_lessons(stage, student, left)
            left[stage.name] = preview(recipe, stage, student).left


def check_starts(recipe: Recipe, stage: StageConfig) -> None:
    """Refuse a student or a teacher from a directory whose logits training could not make, by its configuration.

    Raises:
        RecipeError: EW-707, EW-712, as `student.check_head` does of the model with its weights.
        BadInput, Unsafe: the directory is no model.
    """
    starts = [
        ("start", source_of(stage.student)),
        *(("teacher", teacher) for teacher in (*stage.teachers, *stage.judges)),
    ]
    for role, start in starts:
        if isinstance(start, CheckpointStudentConfig):
            check_head_of_family(stored_architecture(start.model), f"{role} of stage {stage.name}")


def check_lessons(stage: StageConfig, student: PreTrainedModel, left: Mapping[str, PreTrainedModel]) -> None:
    """Refuse losses for which a stage's student and teacher do not have the layers, or the tokens.

    Args:
        left: what earlier stages leave, as far as that is known.

    Raises:
        RecipeError: EW-785, with the layers that there are; EW-780, k is above the teacher's vocabulary.
    """
    from edgewright.compress.distill import DistillConfig

    objective = stage.lesson
    if not isinstance(objective, DistillConfig) or not objective.depends_on_shapes:
        return
    for teacher in stage.teachers:
        known = teacher.type == "checkpoint" or teacher.stage in left
        if known:
            found = stored_architecture(teacher.model) if teacher.type == "checkpoint" else left[teacher.stage]
            objective.check_fit(student.config, found.config, f"stage {stage.name}: objective")


class KnownHidden(nn.Module):
    """In the place of a base model: whatever it is asked, its last hidden states are these; the rest is the original's.

    Args:
        original: the base model.
        hidden: [1, S, H].
    """

    def __init__(self, original: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.original = original
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "original" else getattr(self.original, name)

    def forward(self, *inputs: Any, **settings: Any) -> ModelOutput:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


def check_head_of_family(model: PreTrainedModel, where: str) -> None:
    """`student.check_head` without weights: a small random head, on random numbers for the last hidden states.

    Families that do not call their base model as a whole are not understood here, and nothing is said of them:
    `check_head` follows when the stage begins.

    Args:
        model: on meta; used up.
    """
    old = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    if type(old) is nn.Linear:
        head = nn.Linear(old.in_features, SEEN_TOKENS, bias=old.bias is not None)
        for parameter in head.parameters():
            nn.init.normal_(parameter, generator=generator)
        model.set_output_embeddings(head)
    ours = output_head(model)
    hidden = torch.randn(1, SEEN_TOKENS, old.in_features, generator=generator)
    hidden *= LARGE_LOGITS / old.in_features**0.5
    setattr(model, model.base_model_prefix, KnownHidden(model.base_model, hidden))
    try:
        with torch.no_grad():
            own = model(input_ids=torch.zeros(1, SEEN_TOKENS, dtype=torch.int64), use_cache=False).logits[0].float()
            expected = ours(hidden[0])
    except (RuntimeError, AttributeError):  # it looks at what is on meta, or for more than hidden states
        return
    if not own.is_meta:
        check_same_logits(model, own, expected, where)


def architecture(
    recipe: Recipe, stage: StageConfig, vocab_size: int, left: Mapping[str, PreTrainedModel]
) -> PreTrainedModel:
    """The model that a stage starts from, on meta.

    Args:
        left: what the stages before it leave, by name.
    """
    student = stage.student
    source = source_of(student)
    if isinstance(source, StageStudentConfig):
        model = copy.deepcopy(left[source.stage])
    elif isinstance(source, CheckpointStudentConfig):
        model = stored_architecture(source.model)
    if isinstance(student, DerivedStudentConfig):
        with in_section(f"stages.{stage.name}.student"):
            return tied(student.check(model))
    if source is not None:
        return model
    assert isinstance(student, PresetStudentConfig), "nothing else starts from scratch"
    length = recipe.data.sequence_length
    config = preset_config(student, vocab_size=vocab_size, max_position_embeddings=length, bos=0, eos=0)
    return tied(config)


def tied(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, on meta, with its weights tied as it says."""
    from edgewright.compress.factored_model import empty_model

    model = empty_model(config, torch.float32)
    model.tie_weights()
    return model


def stored_architecture(directory: Path) -> PreTrainedModel:
    """The model of a directory, on meta.

    Raises:
        BadInput, Unsafe: the directory is no model, see `guard.check_model_directory`.
    """
    from edgewright.compress.factor_format import factored_layers
    from edgewright.compress.factored_model import empty_model, put_factors
    from edgewright.export.architecture import open_config
    from edgewright.export.guard import check_model_directory, read_json

    check_model_directory(directory)
    model = empty_model(open_config(directory), torch.float32)
    model.tie_weights()
    put_factors(model, factored_layers(read_json(directory / "config.json")))
    return model


def preview(recipe: Recipe, stage: StageConfig, model: PreTrainedModel) -> Preview:
    """Share the layers of a model out to the methods of a stage as training will; `model` is used up.

    Raises:
        RecipeError: what `Method.check_run`, `Method.chosen`, `check_weights`, `check_release` and the optimizer's
            `check` raise; EW-704, a method gets no layer.
    """
    steps = stage.budget.steps(stage.training.tokens_per_step(recipe.data.sequence_length))
    check_weights(model, stage.training.weights, methods=[config.type for config in stage.methods])
    taken: list[tuple[MethodConfig, dict[str, nn.Linear]]] = []
    for number, config in enumerate(stage.methods):
        with in_section(f"stages.{stage.name}.methods.{number}"):
            layers = _given(config.build(), model, steps, release=bool(stage.training.gradient_release))
        for name, linear in layers.items():
            model.set_submodule(name, Reserved(linear, config.type))
        taken.append((config, layers))
    if all(Method.registry[config.type].keeps_names for config in stage.methods):  # else it will see other matrices
        stage.optimizer.check(model)
    check_sizes(recipe, stage, model)
    head = model.get_output_embeddings()
    alone = tuple(name for name in skipped(model) if model.get_submodule(name) is not head)
    for config, layers in taken:
        for name, linear in layers.items():
            kept = Reserved(linear, config.type, stored=True) if config.keeps_factors else linear
            model.set_submodule(name, kept)
    for config, _ in taken:
        model = config.leaves(model)
    return Preview(shares=tuple((config, _shapes(layers)) for config, layers in taken), alone=alone, left=model)


def _given(method: Method, model: PreTrainedModel, steps: int, *, release: bool) -> dict[str, nn.Linear]:
    """The layers that a method gets; errors as `preview`."""
    if release:
        check_release([method])
    method.check_run(steps)
    layers = method.chosen(model)
    if not layers:
        raise method.got_nothing()
    return layers


def check_sizes(recipe: Recipe, stage: StageConfig, model: PreTrainedModel) -> None:
    """Refuse exports of sub-networks that a stage will not have.

    Raises:
        RecipeError: EW-766.
    """
    from edgewright.compress.elastic import ElasticConfig, find_size

    elastic = next((config for config in stage.methods if isinstance(config, ElasticConfig)), None)
    for export in recipe.exports:
        if export.model != stage.name or export.size is None:
            continue
        if elastic is None:
            raise RecipeError(
                "EW-766",
                "this stage will have no sub-networks",
                where=f"exports.{export.name}.size",
                expected="an export of a stage with methods: [{type: elastic, ...}]",
                found=f"size: {export.size} of stage {stage.name}",
                fix="remove size",
            )
        find_size(elastic.sizes(model.config), export.size, f"exports.{export.name}.size")


def _shapes(layers: Mapping[str, nn.Linear]) -> Shapes:
    return {name: (linear.out_features, linear.in_features) for name, linear in layers.items()}
