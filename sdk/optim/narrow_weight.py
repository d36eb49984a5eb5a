"""Weights that are stored narrower than float32, and look like float32 parameters to autograd and to optimizers.

A `NarrowWeight` is a tensor subclass that holds no floats, only the parts that it is stored as. Any operation on it
sees the weight widened to floats for the time of that operation: forward and backward each widen it by themselves, and
what autograd saves for backward is the narrow tensor. An operation that writes into it (`copy_`, `add_`, `mul_`, an
optimizer's fused step) works on the widened weight, which is then stored again with stochastic rounding, drawn from
torch's default generator of the device. So every optimizer works as it is, its gradient and its moments are ordinary
float32 tensors, and only one weight at a time is wide. A step that writes a weight twice (decay, then the update)
rounds it twice; both are unbiased.

A cast to another float type gives the same stored weight under that type, and shares it, so that autocast keeps no
copy; such a cast can only be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

aten = torch.ops.aten


class NarrowWeight(Tensor):
    """What all narrow weights have in common. Subclasses say what the parts are, how they widen and how they store.

    Args:
        parts: the stored tensors by name; the first has the weight's shape.
        dtype: the float type that the weight has to the outside.
        transposed: whether it is seen as its transpose (two dimensions).
    """

    PARTS: ClassVar[tuple[str, ...]]
    """Names of the stored tensors, which are attributes."""
    WINDOWS: ClassVar[bool] = False
    """Whether some rows of the weight are the same rows of every stored tensor."""
    transposed: bool

    @staticmethod
    def __new__(
        cls, parts: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, transposed: bool = False
    ) -> Self:
        first = parts[cls.PARTS[0]]
        shape, strides = tuple(first.shape), tuple(first.stride())
        if transposed:
            shape, strides = shape[::-1], strides[::-1]
        return Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=first.device)

    def __init__(
        self, parts: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, transposed: bool = False
    ) -> None:
        for name in self.PARTS:
            setattr(self, name, parts[name])
        self.transposed = transposed

    @classmethod
    def narrowed(cls, weight: Tensor) -> Self:
        """A float weight stored narrow, rounded to nearest: how training starts."""
        raise NotImplementedError  # tensors have a metaclass of their own, which abstract classes cannot have

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight as a plain tensor of `dtype`, in the order in which it is stored."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, as an embedding looks them up: [*index, columns] of the type that it has outside."""
        return self.dequantized()[index]

    def window(self, rows: slice) -> Self:
        """Some rows as a weight of its own that shares the stored values: what is written there is written here.

        Raises:
            TypeError: rows are no parts of this weight, see `has_windows`.
        """
        if not self.has_windows:
            raise TypeError(f"{type(self).__name__} cannot be shared by rows")
        return self.rebuilt({name: part[rows] for name, part in self.parts.items()})

    @property
    def has_windows(self) -> bool:
        """Whether `window` is there."""
        return self.WINDOWS and not self.transposed

    def write(self, value: Tensor) -> None:
        """Store `value`, float32 in the order in which the weight is stored, with stochastic rounding.

        Its memory may be used up.
        """
        raise NotImplementedError

    @property
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.PARTS}

    @property
    def stored_bytes(self) -> int:
        """Memory that the weight really takes."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def dequantized(self) -> Tensor:
        """The weight as a plain tensor of the type that it has to the outside, without a gradient."""
        wide = self.widened(self.dtype)
        return wide.t() if self.transposed else wide

    def store(self, value: Tensor) -> None:
        """Store a plain tensor of the weight's shape with stochastic rounding; its memory may be used up."""
        if self.dtype != torch.float32:
            raise TypeError(f"{type(self).__name__} was cast to {self.dtype}, and shares the weight: write to that")
        self.write((value.t() if self.transposed else value).float().contiguous())

    def load_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Put stored tensors back, bit for bit."""
        for name, part in self.parts.items():
            part.copy_(parts[name])

    def sharing(self, *, dtype: torch.dtype | None = None, transposed: bool | None = None) -> Self:
        """The same stored weight under another type or seen as its transpose."""
        return self.rebuilt(self.parts, dtype=dtype, transposed=transposed)

    def rebuilt(
        self, parts: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, transposed: bool | None = None
    ) -> Self:
        """A weight like this one of other parts."""
        return type(self)(
            parts,
            dtype=self.dtype if dtype is None else dtype,
            transposed=self.transposed if transposed is None else transposed,
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(self.PARTS), {"dtype": self.dtype, "transposed": self.transposed}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], context: dict[str, Any], size: Any = None, stride: Any = None
    ) -> Self:
        return cls(inner, **context)

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph of it depends on; torch asks for this by name."""
        return f"{type(self).__qualname__} {self.dtype} {self.transposed}"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return RULES.get(func, _on_floats)(func, args, kwargs or {})


def _same(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].sharing()


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, shape = args[0], list(args[1])
    same = [own if asked == -1 else asked for own, asked in zip(weight.shape, shape, strict=False)]
    if len(shape) != weight.ndim or same != list(weight.shape):
        raise _no_view(func, weight)
    return weight.sharing()


def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    if weight.ndim != 2:
        raise _no_view(func, weight)
    order = args[1] if func is aten.permute.default else [1, 0]
    swapped = [axis % 2 for axis in order] == [1, 0] and (func is not aten.transpose.int or args[1] % 2 != args[2] % 2)
    return weight.sharing(transposed=weight.transposed != swapped)


def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    return weight.rebuilt({name: part.clone() for name, part in weight.parts.items()})


def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    dtype, device = kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
    if not dtype.is_floating_point:
        return func(weight.dequantized(), **kwargs)
    if dtype != weight.dtype and device == weight.device:
        return weight.sharing(dtype=dtype)
    parts = {name: part.to(device, copy=True) for name, part in weight.parts.items()}
    return weight.rebuilt(parts, dtype=dtype)


def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].rows(args[1])


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, NarrowWeight):
        return func(target, source.dequantized(), *args[2:])
    if isinstance(source, NarrowWeight) and type(source) is type(target) and source.transposed == target.transposed:
        target.load_parts(source.parts)
        return target
    wide = source.dequantized() if isinstance(source, NarrowWeight) else source
    target.store(wide.to(target.device, torch.float32, copy=True).expand(target.shape))
    return target


RULES: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.view.default: _view,
    aten.expand.default: _view,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.embedding.default: _embedding,
}
"""What is done without widening the weight; everything else is `_on_floats`."""


def _on_floats(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the widened weights, and store those again that it wrote."""
    if func.is_view:
        raise _no_view(func, next(arg for arg in args if isinstance(arg, NarrowWeight)))
    if isinstance(args[0], (list, tuple)) and len(args[0]) > 1 and _writes(func) and not func._schema.returns:
        return _one_by_one(func, args, kwargs)
    wide: dict[int, Tensor] = {}
    narrow: dict[int, NarrowWeight] = {}

    def widen(weight: NarrowWeight) -> Tensor:
        if id(weight) not in wide:
            wide[id(weight)] = weight.dequantized()
            narrow[id(wide[id(weight)])] = weight
        return wide[id(weight)]

    result = func(*tree_map_only(NarrowWeight, widen, args), **tree_map_only(NarrowWeight, widen, kwargs))
    for weight in _written(func, args, kwargs):
        weight.store(wide[id(weight)])
    return tree_map(lambda value: narrow.get(id(value), value), result)


def _one_by_one(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A foreach or fused operation for one tensor after the other, so that only one weight is wide at a time."""
    count = len(args[0])

    def item(value: Any, index: int) -> Any:
        listed = isinstance(value, (list, tuple)) and len(value) == count
        return [value[index]] if listed else value

    for index in range(count):
        own = tuple(item(value, index) for value in args)
        named = {name: item(value, index) for name, value in kwargs.items()}
        func(*own, **named)


def _writes(func: Any) -> bool:
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[NarrowWeight]:
    """The narrow weights among the arguments that the operation's schema says it writes."""
    written: list[NarrowWeight] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        written += [each for each in values if isinstance(each, NarrowWeight)]
    return written


def _no_view(func: Any, weight: NarrowWeight) -> TypeError:
    return TypeError(
        f"{type(weight).__name__} of shape {tuple(weight.shape)} has no view by {func}: what is written there would be "
        "lost; take .dequantized(), and copy_ the result back"
    )
