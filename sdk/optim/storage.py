"""How an optimizer keeps a moment between steps: as float32, as bfloat16, or as eight bits with a scale per block.

A storage holds a moment as tensors in the optimizer's own state of a parameter, under the moment's key, so that
`named_state` and safetensors see them. A step reads it as float32, computes, and writes it back:

    storage = moment_storage("int8", signed=True)
    storage.write(state, "exp_avg", torch.zeros_like(gradient))        # once
    average = storage.read(state, "exp_avg").lerp_(gradient, 1 - beta)
    storage.write(state, "exp_avg", average)

Eight bits are those of Dettmers et al. (2110.02861) as bitsandbytes computes them: blocks of 256 values in the order of
memory, each with its largest magnitude in float32 and codes of a dynamic (floating) code book, signed for a first
moment and unsigned for a second. bfloat16 is rounded stochastically, where the references round to nearest: with
beta2 = 0.999 a second moment falls by a thousandth a step, half a unit in the last place is two, so that rounding to
nearest would keep it for ever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from edgewright.imports import importing_bitsandbytes
from edgewright.optim.stochastic_rounding import round_to_bf16

StatesType = Literal["fp32", "bf16", "int8"]
"""Values of `states:` in a recipe."""

BLOCK = 256
"""Values that share a scale."""
SMALLEST_INT8 = 4096
"""Moments with fewer values stay float32, as in bitsandbytes: they cost nothing and are mostly norms and biases."""


class MomentStorage(ABC):
    """How one moment is kept. Has no state of its own: everything is in the `state` that it is handed."""

    @abstractmethod
    def read(self, state: dict[str, Tensor], key: str) -> Tensor:
        """The moment in float32 (float64 where it is kept so), in the shape in which it was written.

        It may be changed in place; whether the state sees that before `write` is not said.
        """

    @abstractmethod
    def write(self, state: dict[str, Tensor], key: str, value: Tensor) -> None:
        """Keep `value`, float32 (or float64) of any shape; the state may take the tensor over."""

    @abstractmethod
    def zero(self, state: dict[str, Tensor], key: str, mask: Tensor) -> None:
        """Set the moment to 0 where `mask` (bool, broadcast to its shape) is true; the rest keeps its bits."""

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Bytes of a moment with that many values."""


class FloatStorage(MomentStorage):
    """float32 (or float64) as it is."""

    def read(self, state: dict[str, Tensor], key: str) -> Tensor:
        return state[key]

    def write(self, state: dict[str, Tensor], key: str, value: Tensor) -> None:
        state[key] = value

    def zero(self, state: dict[str, Tensor], key: str, mask: Tensor) -> None:
        state[key].masked_fill_(mask, 0)

    def nbytes(self, numel: int) -> int:
        return 4 * numel


class Bf16Storage(MomentStorage):
    """bfloat16, rounded stochastically with torch's default generator of the device, which is part of a run's state."""

    def read(self, state: dict[str, Tensor], key: str) -> Tensor:
        return state[key].float()

    def write(self, state: dict[str, Tensor], key: str, value: Tensor) -> None:
        state[key] = round_to_bf16(value.float())

    def zero(self, state: dict[str, Tensor], key: str, mask: Tensor) -> None:
        state[key].masked_fill_(mask, 0)

    def nbytes(self, numel: int) -> int:
        return 2 * numel


class Int8Storage(MomentStorage):
    """Codes under the key, [shape] uint8, and the blocks' largest magnitudes under `KEY_absmax`, [blocks] float32.

    The worst error of a value is half the widest gap of the code book times its block's largest magnitude. A moment
    with fewer than `SMALLEST_INT8` values is kept in float32.

    Args:
        signed: whether the moment can be negative.
    """

    def __init__(self, *, signed: bool) -> None:
        self.signed = signed

    def read(self, state: dict[str, Tensor], key: str) -> Tensor:
        codes = state[key]
        if codes.dtype == torch.float32:
            return codes
        book = code_book(self.signed, codes.device)
        return blockwise().dequantize_blockwise(codes, absmax=state[f"{key}_absmax"], code=book, blocksize=BLOCK)

    def write(self, state: dict[str, Tensor], key: str, value: Tensor) -> None:
        value = value.float()
        if value.numel() < SMALLEST_INT8:
            state[key] = value
            return
        book = code_book(self.signed, value.device)
        codes, quantized = blockwise().quantize_blockwise(value.contiguous(), code=book, blocksize=BLOCK)
        state[key], state[f"{key}_absmax"] = codes, quantized.absmax

    def zero(self, state: dict[str, Tensor], key: str, mask: Tensor) -> None:
        kept = state[key]
        book = code_book(self.signed, torch.device("cpu"))
        nothing = 0 if kept.dtype == torch.float32 else int((book == 0).nonzero()[0])
        kept.masked_fill_(mask, nothing)

    def nbytes(self, numel: int) -> int:
        return 4 * numel if numel < SMALLEST_INT8 else numel + 4 * -(-numel // BLOCK)


def code_book(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' dynamic data type, ascending, in -1..1 or 0..1."""
    book = _BOOKS.get((signed, device))
    if book is None:
        with unset_fake_temporarily():
            whole = blockwise().create_dynamic_map(signed=signed)
        book = whole.to(device)
        if not isinstance(book, FakeTensor):  # of a step that is simulated for a device which is not here
            _BOOKS[signed, device] = book
    return book


_BOOKS: dict[tuple[bool, torch.device], Tensor] = {}
"""Made once for every device."""


@cache
def blockwise() -> Any:
    """bitsandbytes' functions."""
    with importing_bitsandbytes():
        import bitsandbytes.functional

    return bitsandbytes.functional


def moment_storage(states: StatesType, *, signed: bool) -> MomentStorage:
    """The storage that a recipe's `states:` names, for a moment that can or cannot be negative."""
    storages: dict[StatesType, MomentStorage] = {
        "fp32": FloatStorage(),
        "bf16": Bf16Storage(),
        "int8": Int8Storage(signed=signed),
    }
    return storages[states]
