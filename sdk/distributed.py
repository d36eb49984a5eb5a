"""Several processes under torchrun: the weights copied to each (DDP) or cut up among them (FSDP2, `fully_shard`).

    torchrun --nproc-per-node 2 -m edgewright run recipe.yaml

The recipe's global batch, per_device_train_batch_size * gradient_accumulation_steps, is that of all processes together:
its micro-batches are dealt out to them in turn. So a run takes the same steps on any number of processes, and one that
was begun on two goes on alone, and back. Everything that moves data between processes is torch.distributed's own.

The main process, of rank 0, alone writes and prints; it prepares the data while the others wait. The run directory has
to be one that all processes see. A checkpoint is the very one of a single process: with FSDP2 it is put together tensor
by tensor in the main process's memory. torch.distributed.checkpoint is not used, since it keeps its metadata in a
pickle, and nothing here is ever unpickled; for the same reason small values travel as JSON through the store that
torchrun keeps, and not as objects.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from edgewright.distributed_rules import check_several
from edgewright.errors import EdgewrightError, OutOfResources, RecipeError
from edgewright.student import decoder_blocks
from edgewright.world import Replica, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.objective import ModelInputs
    from edgewright.recipe import Recipe
    from edgewright.trainer import TrainingModule
    from edgewright.training import Sharding

T = TypeVar("T")
SECONDS_TO_FAIL_TOGETHER = 5.0
"""How long a process that failed waits for the main one to have failed as well, and to have said why."""
SECONDS_TO_GIVE_BACK = 0.05
"""How long Python's lock is left to the threads that made the last exchanges."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""For a single exchange; waiting for the main process's own work has no limit."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
"""What gloo says when another process has gone."""

_runs = itertools.count()


class Processes(World):
    """The processes that torchrun started.

    Args:
        store: torchrun's, for what is said once.
        rank: this process's number; size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self._turns = itertools.count()

    def check_sees(self, path: Path) -> None:
        if not path.exists():
            raise RecipeError(
                "EW-774",
                f"process {self.rank} of {self.size} does not see what the main process wrote",
                where=path.absolute(),
                expected="a run directory that all processes see",
                found="no such file",
                fix="choose an output_dir on a file system that all nodes share",
            )

    def check(self, recipe: Recipe) -> None:
        check_several(recipe, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in found.tolist())

    def main_first(self, work: Callable[[], T]) -> T:
        turn = self._turn()
        self._wait(turn)
        done = work()
        self._finish(turn)
        return done

    def main_only(self, work: Callable[[], T]) -> T | None:
        turn = self._turn()
        self._wait(turn)
        if not self.is_main:
            return None
        done = work()
        self._finish(turn)
        return done

    def shared(self, value: Any) -> Any:
        turn = self._turn()
        self._finish(turn, json.dumps(value))
        self._wait(turn)
        return json.loads(self.store.get(turn))

    def _turn(self) -> str:
        """The next thing that the main process does before the others; all processes count alike."""
        return f"turn/{next(self._turns)}"

    def _finish(self, turn: str, value: str = "done") -> None:
        """Only the main process's word counts."""
        if self.is_main:
            self.store.set(turn, value)

    def _wait(self, turn: str) -> None:
        """All but the main process wait, for as long as that takes; signals are heard meanwhile."""
        while not (self.is_main or self.store.check([turn])):
            if self.left(0) is not None:
                raise RuntimeError("the main process has left")
            time.sleep(0.02)

    @contextmanager
    def own_randomness(self, number: int) -> Iterator[None]:
        seed = torch.initial_seed() + 1 + number * self.size + self.rank
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(seed % 2**63)
            yield

    def replicate(self, module: TrainingModule, sharding: Sharding) -> Replica:
        return _REPLICAS[sharding](module, self)

    def left(self, rank: int) -> dict[str, Any] | None:
        """What a process said when it left early: its exit code, and why."""
        key = f"left/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def leave(self, error: BaseException) -> NoReturn:
        """Tell the others, and go: with the error, or without a word where the main process has one to say."""
        if isinstance(error, RuntimeError):
            if threading.current_thread() is threading.main_thread():  # torchrun ends all; what happened is still told
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            error = self._explained(error)
        said = {"exit_code": error.exit_code if isinstance(error, EdgewrightError) else 1, "what": str(error)}
        self.store.set(f"left/{self.rank}", json.dumps(said))
        if not self.is_main and (main := self._last_words_of_main()) is not None:
            raise SystemExit(main["exit_code"]) from error
        raise error

    def _explained(self, error: RuntimeError) -> Exception:
        """What a failed exchange means: that another process has gone."""
        others = [rank for rank in range(self.size) if rank != self.rank and self.left(rank) is not None]
        if not others and not any(words in str(error) for words in LOST):
            return error
        why = self.left(others[0]) if others else None
        who = f"process {others[0]} of the {self.size}" if others else f"one of the {self.size} processes"
        return OutOfResources(
            "EW-773",
            f"{who} of this run stopped",
            found=why["what"] if why else "it was ended from outside, or ran out of memory",
            fix="the same command goes on from the last checkpoint; what that process printed says more",
        )

    def _last_words_of_main(self) -> dict[str, Any] | None:
        limit = time.monotonic() + SECONDS_TO_FAIL_TOGETHER
        while time.monotonic() < limit:
            if (said := self.left(0)) is not None:
                return said
            time.sleep(0.05)
        return None


@contextmanager
def connected() -> Iterator[World]:
    """The processes of this run, connected; inside it an error of one ends all of them.

    Raises:
        OutOfResources: EW-773, another process stopped. RecipeError: EW-775, there are more processes than GPUs here.
        SystemExit: in all but the main process, which says why.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        _take_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may start all again, with the same store
    store = dist.PrefixStore(f"edgewright/{attempt}/{next(_runs)}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    world = Processes(store, rank, size)
    try:
        yield world
        _part(world)
    except BaseException as error:
        world.leave(error)
    finally:
        dist.destroy_process_group()


def _part(world: World) -> None:
    """None leaves before all are done, nor while a thread of gloo's still has to give back an exchange's tensor.

    Those threads end with the group, which DTensor's caches hold for good; one that wants Python's lock for a tensor
    once Python has begun to end aborts the process (pytorch pull request 179291). Left free for a moment, it gets it.
    """
    world.any(False)
    time.sleep(SECONDS_TO_GIVE_BACK)


def _take_device(number: int) -> None:
    """Each process of a machine has a GPU of its own."""
    there = torch.cuda.device_count()
    if number >= there:
        raise RecipeError(
            "EW-775",
            "there are more processes on this machine than GPUs",
            expected=f"at most {there}",
            found=f"a process of number {number}, counted from 0",
            fix=f"torchrun --nproc-per-node {there}",
        )
    torch.cuda.set_device(number)


class Copied(Replica):
    """The whole module in every process, its gradients averaged while the backward runs (DDP)."""

    def __init__(self, module: TrainingModule, world: World) -> None:
        super().__init__(module)
        self._parallel = DistributedDataParallel(module, gradient_as_bucket_view=True, **_buffers_alone())

    def __call__(self, inputs: ModelInputs, scale: float) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._parallel(inputs, scale)
        return found

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._parallel.no_sync()


def _buffers_alone() -> dict[str, Any]:
    """Buffers are not exchanged: they follow from the weights, alike everywhere. torch 2.13 renamed the setting."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


class CutUp(Replica):
    """Each process has its part of every tensor; a block's weights are whole only while it runs (FSDP2).

    Cut up are the decoder blocks, each by itself, and as the root what is left: embedding, last norm and head. Weights
    are gathered in their own type, so that forward and backward compute what those of one process do.
    """

    def __init__(self, module: TrainingModule, world: World) -> None:
        super().__init__(module)
        self._main = world.is_main
        self._skeleton = without_weights(module.model)
        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world.size,))
        for block in decoder_blocks(module.model):  # which moves to the device, and is cut up there, by itself
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        self._root: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def __call__(self, inputs: ModelInputs, scale: float) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.module(inputs, scale)
        return found

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        yield

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return super().place(tensor, like)
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            whole = self.whole(tensor)
            if self._main:
                found[name] = whole.cpu()
        return found

    def whole_model(self) -> PreTrainedModel | None:
        weights = self.gathered({name: p.detach() for name, p in self.module.model.named_parameters()})
        if not self._main:
            return None
        places = dict(self._skeleton.named_parameters())
        filled = {id(places[name]): nn.Parameter(w, places[name].requires_grad) for name, w in weights.items()}
        return copy.deepcopy(self._skeleton, filled)


_REPLICAS: dict[Sharding, Callable[[TrainingModule, World], Replica]] = {"none": Copied, "full": CutUp}


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without the memory of the parameters (they are on meta), with its buffers in host memory."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty | {id(b): b.detach().to("cpu", copy=True) for b in model.buffers()})
