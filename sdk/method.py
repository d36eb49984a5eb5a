"""Method: the hooks that a compression method may implement.

A method decides how weights are represented and when they change. Adding one costs one file in `compress/`, one line
in `sdk/recipe.py`, where its config joins the union, its tests and one example.
"""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgewright.compress.choice import LayerChoice
    from edgewright.export.lattice import LatticeTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a method sees of the other axes at a step: no more than it needs."""

    step: int
    """Optimizer steps done before this one."""
    total_steps: int
    """Optimizer steps of the whole stage."""
    reset_state: Callable[[torch.nn.Parameter, torch.Tensor | None], None]
    """Zero the optimizer state of a parameter, where `mask` (same shape, bool) is true, or all of it."""
    reset_all_state: Callable[[], None]
    """Zero the optimizer state of every parameter, its step counts too: bias correction starts anew."""
    rewarm: Callable[[int], None]
    """Dip the learning rate, and warm it up again over that many steps (`schedule.rewarm_factor`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodReport:
    """What a method changed, in numbers. The no-op tripwire refuses a report with `changed == 0`."""

    changed: int
    """Layers whose weights the method represents."""
    skipped: tuple[str, ...]
    """Layers that it left alone on purpose, by name."""
    numbers: dict[str, float]
    """Further figures for the log and the report: `compress.layers.cost`, and for instance the density of zeros."""


def can_compile(methods: Iterable[str]) -> bool:
    """Whether a model that these methods, by type, change has a forward that can be compiled."""
    return all(Method.registry[method].compiles for method in methods)


def by_key(methods: Sequence[Method]) -> dict[str, Method]:
    """A stage's methods by their keys in checkpoints and results: `type`, and `type-2` for the second of a type."""
    seen: dict[str, int] = {}
    found: dict[str, Method] = {}
    for method in methods:
        seen[method.type] = number = seen.get(method.type, 0) + 1
        found[method.type if number == 1 else f"{method.type}-{number}"] = method
    return found


class Method(ABC):
    """How weights are represented and when they change. `chosen`, `prepare`, `finish` and `describe` must be there.

    Subclasses are final and named by `type`, the value of `type:` in a recipe, which is also their file's name.
    """

    type: ClassVar[str]
    saves: ClassVar[str]
    """What it saves, while training and in the file, in one line for `ls methods`."""
    keeps_names: ClassVar[bool] = True
    """Whether the trained form holds the plain model's weights under their own names (latent, or masked), so that a
    later stage may go on from them; otherwise it goes on from what `finish` gave."""
    compiles: ClassVar[bool] = True
    """Whether the model's forward is one graph, the same in every step, that can be compiled."""
    registry: ClassVar[dict[str, builtins.type[Method]]] = {}

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__()
        if abstract:  # what several methods share: no method by itself
            return
        if not {"type", "saves"} <= cls.__dict__.keys():
            raise TypeError(f"{cls.__name__} needs `type`, its name in recipes, and `saves`, what it is good for")
        if cls.type in Method.registry:
            raise TypeError(f"the method {cls.type!r} is defined twice: was `compress` imported without `edgewright.`?")
        Method.registry[cls.type] = cls

    def before_device(self, model: PreTrainedModel, device: str) -> str | None:
        """Called before the model gets to its device, which may be too small for it: store narrow what stays frozen.

        Returns:
            What is stored how, in a sentence; None where nothing is.
        """
        return None

    def read_text(self, counts: Callable[[], np.ndarray], eos_id: int) -> None:  # noqa: B027 - an optional hook
        """Called before `prepare` in a run; not in a plan, which has no text.

        Args:
            counts: gives [V], how often each token comes in the text that the stage adds to the recipe's own
                (`generated`), where it adds none in that.
            eos_id: the token that ends a document.
        """

    @abstractmethod
    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """The layers that `prepare` changes, by name. It changes nothing and reads no weight: they may be on meta.

        So a run learns before its first stage what would stop its last one.

        Raises:
            RecipeError: all that `prepare` raises.
        """

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> None:
        """Change the model in place into its trainable form, before the optimizer is built."""

    def go_on(self, before: Sequence[LayerChoice], trained: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Called after `prepare` where a stage goes on from the very weights that an earlier one trained.

        Args:
            before: the methods of that stage.
            trained: all tensors of its trained form by name, with those that its methods trained beside the weights.
        """

    def check_run(self, total_steps: int) -> None:  # noqa: B027 - an optional hook
        """Called before anything is trained: refuse a run that is too short for what the method does on the way.

        Args:
            total_steps: optimizer steps of the whole stage.

        Raises:
            RecipeError: with the nearest legal value.
        """

    def got_nothing(self) -> RecipeError:
        """EW-704, for a model of which it gets no layer."""
        return RecipeError(
            "EW-704",
            f"the method {self.type!r} changed no layer of this model",
            fix="remove it from the recipe, or exclude fewer layers",
        )

    def kept_whole(self) -> str | None:
        """Why its weights cannot be cut up among processes (`training.sharding: full`); None where they can.

        They can where nothing but the forward and the optimizer reads or changes them before `finish`.
        """
        return "between the steps it reads or changes whole weights"

    def before_step(self, ctx: StepContext) -> None:  # noqa: B027 - an optional hook
        """Called before the forward of every optimizer step; again for the same step when a signal cut that one off.

        So what it does must follow from `ctx` and the state, and not count its own calls.
        """

    def after_backward(self, ctx: StepContext) -> None:  # noqa: B027 - an optional hook
        """Called when the gradients of a step are complete, before they are clipped."""

    def after_step(self, ctx: StepContext) -> None:  # noqa: B027 - an optional hook
        """Called after every optimizer step."""

    def penalty(self) -> torch.Tensor | None:
        """A term added to the loss, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State beside the model's own tensors: JSON values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - an optional hook
        """Restore what `state_dict` gave."""

    @abstractmethod
    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """A plain model and the lattice of its quantized weights by state-dict name. Pure: `model` keeps its form."""

    def write_beside(self, directory: Path) -> None:  # noqa: B027 - an optional hook
        """Put what the finished model needs besides weights and lattice into its directory, before it has its name."""

    @abstractmethod
    def describe(self, model: PreTrainedModel) -> MethodReport:
        """What the method changed in this prepared model."""
