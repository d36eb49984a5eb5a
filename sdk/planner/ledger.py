"""Every tensor that is alive, by what it is for: the memory of a program that runs without any.

Under torch's fake tensors a training step runs as it is, autograd and all, on tensors that have a shape and no memory.
The ledger watches each operation, books the storage that it makes, and strikes it out when the last reference goes, as
an allocator would: its largest sum is the step's peak. What kernels take for themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from edgewright.optim.narrow_weight import NarrowWeight
from edgewright.planner.heap import Event

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "teacher", "other")
"""What memory is for."""
NO_WORK = ("prim", "profiler")
"""Namespaces of what starts no kernel: that a tensor without memory is asked for its device, say, real ones never."""
GUESSED = 2**40
"""Stands for a count that only data would tell, such as the weights above a threshold: more than are asked for."""


@dataclass(slots=True)
class _Entry:
    reference: weakref.ref[Any]
    bytes: int
    part: str


class Ledger(TorchDispatchMode):
    """Books storages; use it inside a `FakeTensorMode`.

    Attributes:
        now: bytes alive, by part.
        peak: the same at the moment when most were alive.
        events: every block as it is made and freed, for `heap.Heap`.
        operations: how many were seen that a device would be given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(PARTS, 0)
        self.peak = dict(self.now)
        self.events: list[Event] = []
        self.operations = 0
        self._most = 0
        self._made = 0
        self._part = "other"
        self._entries: dict[int, _Entry] = {}

    def begin_peak(self) -> None:
        """Forget the peak so far."""
        self._most, self.peak = 0, dict(self.now)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside the block is for this."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def enter(self, name: str) -> str:
        """As `part`, for hooks: the name that was in force."""
        before, self._part = self._part, name
        return before

    def leave(self, before: str) -> None:
        """Undo `enter`."""
        self._part = before

    def assign(self, tensor: Tensor, part: str) -> None:
        """Say what an existing tensor is for."""
        for stored in tensor.parts.values() if isinstance(tensor, NarrowWeight) else (tensor,):
            storage = stored.untyped_storage()
            self._book(storage)
            entry = self._entries[id(storage)]
            self.now[entry.part] -= entry.bytes
            entry.part = part
            self.now[part] += entry.bytes

    def assign_all(self, model: nn.Module, part: str) -> None:
        """`assign` for all parameters and buffers."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.assign(tensor, part)

    def assign_gradient(self, parameter: Tensor) -> None:
        """A gradient has just been made, or added to."""
        assert parameter.grad is not None
        self.assign(parameter.grad, "gradients")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, NarrowWeight) for kind in types):
            return NotImplemented  # it does the operation on its parts, which come here again
        if func is torch.ops.aten._local_scalar_dense.default:
            return _guess(args[0].dtype)
        self.operations += func.namespace not in NO_WORK
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor) and not isinstance(value, NarrowWeight):
                self._book(value.untyped_storage())
        return out

    def _book(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._entries:
            return

        def gone(_: object) -> None:
            entry = self._entries.pop(key)
            self.now[entry.part] -= entry.bytes
            self.events.append((number, -1))

        self._made += 1
        number = self._made
        entry = _Entry(weakref.ref(storage, gone), storage.nbytes(), self._part)
        self._entries[key] = entry
        self.events.append((number, entry.bytes))
        self.now[entry.part] += entry.bytes
        total = sum(self.now.values())
        if total > self._most:
            self._most, self.peak = total, dict(self.now)


def _guess(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else GUESSED
