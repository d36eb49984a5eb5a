"""What can be changed in a stage so that it takes less memory, from the cheapest in time to the dearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

if TYPE_CHECKING:
    from edgewright.recipe import StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Settings of a stage, and what they cost.

    Args:
        settings: values by dotted key, as overrides below the stage write them.
        reason: what it does, for people.
        same_training: whether the very same sequence of weights comes out, but for rounding.
    """

    settings: dict[str, Any]
    reason: str
    same_training: bool

    def text(self) -> str:
        """As overrides of the stage: `training.gradient_checkpointing=true`."""
        return " ".join(f"{key}={_value(value)}" for key, value in self.settings.items())

    def apply(self, stage: StageConfig) -> StageConfig | None:
        """The changed stage; None where the settings exclude each other."""
        tree = stage.model_dump(mode="json")
        for key, value in self.settings.items():
            *path, last = key.split(".")
            owner: Any = tree
            for part in path:
                owner = owner[part]
            owner[last] = value
        try:
            return type(stage).model_validate(tree)
        except ValidationError:
            return None


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(inner)}" for key, inner in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def smaller_batches(stage: StageConfig) -> Iterator[Change]:
    """The same global batch in more and smaller pieces."""
    settings = stage.training
    size, pieces = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    while size % 2 == 0:
        size, pieces = size // 2, pieces * 2
        yield Change(
            settings={
                "training.per_device_train_batch_size": size,
                "training.gradient_accumulation_steps": pieces,
            },
            reason="smaller micro-batches, the same global batch",
            same_training=True,
        )


CHECKPOINTING = Change(
    settings={"training.gradient_checkpointing": True},
    reason="activations are computed again in the backward pass: about a third more work",
    same_training=True,
)
RELEASE = Change(
    settings={"training.gradient_release": True, "training.max_grad_norm": None},
    reason="gradients never all exist; the global norm is not clipped",
    same_training=False,
)
OFFLOAD = Change(
    settings={"training.offload_optimizer": True},
    reason="optimizer state in host memory: every step moves it to the GPU and back",
    same_training=True,
)
BF16_WEIGHTS = Change(
    settings={"training.weights": "bf16"},
    reason="weights stored in bfloat16 with stochastic rounding",
    same_training=False,
)
INT8_WEIGHTS = Change(
    settings={"training.weights": "int8"},
    reason="linear weights stored in 8 bits with stochastic rounding",
    same_training=False,
)
OPTIMIZERS = {
    "adamw_8bit": "optimizer state in 8 bits",
    "apollo": "optimizer state of low rank",
    "apollo_mini": "optimizer state of rank 1",
}


def other_optimizers(stage: StageConfig) -> Iterator[Change]:
    """Optimizers that keep less, at this one's learning rate and decay."""
    for name, reason in OPTIMIZERS.items():
        if stage.optimizer.type != name:
            section = {
                "type": name,
                "learning_rate": stage.optimizer.learning_rate,
                "weight_decay": stage.optimizer.weight_decay,
            }
            yield Change(settings={"optimizer": section}, reason=reason, same_training=False)


def all_changes(stage: StageConfig, *, gpu: bool) -> list[Change]:
    """Every single change that this stage has not made yet."""
    settings = stage.training
    fixed = [
        (CHECKPOINTING, not settings.gradient_checkpointing),
        (OFFLOAD, gpu and not settings.offload_optimizer),
        (RELEASE, not settings.gradient_release and settings.gradient_accumulation_steps == 1),
        (BF16_WEIGHTS, settings.weights == "fp32"),
        (INT8_WEIGHTS, settings.weights != "int8"),
    ]
    return [
        *smaller_batches(stage),
        *(change for change, open_to in fixed if open_to),
        *other_optimizers(stage),
    ]
