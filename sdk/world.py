"""The processes that train together, as the rest of the house sees them; here for one, which has nobody to ask.

`distributed.py` has the form for several, under torchrun; nothing of it, or of torch.distributed, is imported for one.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from edgewright.objective import ModelInputs
    from edgewright.recipe import Recipe
    from edgewright.trainer import TrainingModule
    from edgewright.training import Sharding

T = TypeVar("T")
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each of its processes, in the environment."""


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(name in os.environ for name in OF_TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process is the one that prints."""
    return not several() or os.environ["RANK"] == "0"


def copied(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy where `like` is."""
    return tensor.to(like.device, copy=True)


class Replica(ABC):
    """A training module where it trains: whole, in one process or in each; or cut up among them."""

    def __init__(self, module: TrainingModule) -> None:
        self.module = module
        """Its forward is that of an evaluation."""

    @abstractmethod
    def __call__(self, inputs: ModelInputs, scale: float) -> tuple[Tensor, Tensor]:
        """The forward of a training step, see `TrainingModule.forward`.

        `backward` of its loss times `World.size` leaves the gradient of the sum of all processes' losses.
        """

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged after the last one alone."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor (of a parameter, its state, a norm) put together from what each process has of it, in each."""
        return tensor

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A copy of a whole tensor as `like`, a parameter, is kept: on its device, this process's part of it."""
        return copied(tensor, like)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors made whole one by one: where they are cut up in the main process's host memory, and nowhere else."""
        return dict(tensors)

    def whole_model(self) -> PreTrainedModel | None:
        """The student with whole tensors, to be saved: where it is cut up a copy, and None but in the main process."""
        return self.module.model


class World(ABC):
    """The processes of a run."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that so many processes cannot train together.

        Raises:
            RecipeErrors: EW-770 to EW-772.
        """

    @abstractmethod
    def check_sees(self, path: Path) -> None:
        """Refuse a file system on which this process does not see what the main one wrote.

        Raises:
            RecipeError: EW-774.
        """

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""

    @abstractmethod
    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set in any process."""

    @abstractmethod
    def main_first(self, work: Callable[[], T]) -> T:
        """Do something in every process, in the main one before the others."""

    @abstractmethod
    def main_only(self, work: Callable[[], T]) -> T | None:
        """Do something in the main process while the others wait; None in those."""

    @abstractmethod
    def shared(self, value: Any) -> Any:
        """The main process's value, of JSON, in every process."""

    @abstractmethod
    def own_randomness(self, number: int) -> AbstractContextManager[None]:
        """Inside it torch's generators differ between processes; afterwards they are as before it, and alike.

        Args:
            number: other ones draw other numbers.
        """

    @abstractmethod
    def replicate(self, module: TrainingModule, sharding: Sharding) -> Replica:
        """Put a training module where it trains; before its optimizer is built."""


class Alone(World):
    """One process."""

    rank = 0
    size = 1

    def check(self, recipe: Recipe) -> None:
        pass

    def check_sees(self, path: Path) -> None:
        pass

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def main_first(self, work: Callable[[], T]) -> T:
        return work()

    def main_only(self, work: Callable[[], T]) -> T | None:
        return work()

    def shared(self, value: Any) -> Any:
        return value

    def own_randomness(self, number: int) -> AbstractContextManager[None]:
        return nullcontext()

    def replicate(self, module: TrainingModule, sharding: Sharding) -> Replica:
        return Whole(module)


ALONE = Alone()


class Whole(Replica):
    """A module of one process."""

    def __call__(self, inputs: ModelInputs, scale: float) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.module(inputs, scale)
        return found

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def joined() -> Iterator[World]:
    """This run's processes: those that torchrun started, or this one alone."""
    if not several():
        yield Alone()
        return
    from edgewright.distributed import connected

    with connected() as world:
        yield world
