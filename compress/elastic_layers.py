"""The layers of an elastic model: each uses the first rows and columns of its weight, as many as the active size has.

What a layer gets says how many columns it uses; how many rows follows from the size that is active. It travels with the
forward as an argument of every block and its attention, so that a block that is computed again in the backward pass has
the size that it had. Weights are cut to whole matrices before a product, so that a sub-network that stands alone gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.axes import Axis, place_of
from edgewright.compress.blocks import blocks_of, running
from edgewright.compress.layers import CompressedLinear
from edgewright.compress.shape import Shape
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARGUMENT = "elastic_size"
"""Under this name attention, which comes first in a block, gets the size that the block is to have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A sub-network."""

    shape: Shape
    blocks: tuple[int, ...]
    """Those that it goes through."""

    @property
    def name(self) -> str:
        """Such as h256-f768-a4-l8: hidden, intermediate, heads, layers."""
        shape = self.shape
        return (
            f"h{shape.hidden_size}-f{shape.intermediate_size}-a{shape.num_attention_heads}-l{shape.num_hidden_layers}"
        )

    def width(self, axis: Axis) -> int:
        """How wide an axis is; -1 where it never changes."""
        shape = self.shape
        widths = {
            "hidden": shape.hidden_size,
            "ffn": shape.intermediate_size,
            "query": shape.num_attention_heads * shape.head_dim,
            "key_value": shape.num_key_value_heads * shape.head_dim,
        }
        return widths.get(axis, -1)


class Net:
    """The sizes that a model can have, and the one that it has now."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes = tuple(sizes)
        """From the smallest to the whole model."""
        self.active = self.sizes[-1]
        self.in_block = self.active
        """That of the block which runs now; it may be an earlier forward's, computed again in a backward pass."""

    @property
    def full(self) -> Size:
        return self.sizes[-1]

    @contextmanager
    def at(self, model: PreTrainedModel, size: Size) -> Iterator[None]:
        """Inside it the model is that sub-network of itself."""
        self.active = size
        try:
            with running(model, size.blocks):
                yield
        finally:
            self.active = self.full


class ElasticLinear(CompressedLinear):
    """A linear layer of which the first rows and columns are used.

    Args:
        linear: weight and bias are its own.
        axes: those that its rows and columns lie on.
        inside: whether it is part of a block.
    """

    method: ClassVar[str] = "elastic"  # type: ignore[misc]

    def __init__(self, linear: nn.Linear, net: Net, axes: tuple[Axis, ...], *, inside: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.net, self.axes, self.inside = net, axes, inside

    @property
    def size(self) -> Size:
        """The one that it has now."""
        return self.net.in_block if self.inside else self.net.active

    def effective_weight(self) -> Tensor:
        """Of the active size, [rows, columns]."""
        return self._cut(self.net.active.width(self.axes[1]))[0]

    def flops(self) -> int:
        """2 in out of the whole layer."""
        return 2 * self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._cut(x.shape[-1]))

    def _cut(self, columns: int) -> tuple[Tensor, Tensor | None]:
        rows = self.size.width(self.axes[0])
        rows = self.out_features if rows < 0 else rows
        if (rows, columns) == (self.out_features, self.in_features):
            return self.weight, self.bias
        return self.weight[:rows, :columns].contiguous(), None if self.bias is None else self.bias[:rows]


class ElasticEmbedding(nn.Module):
    """A table of which the first columns are used."""

    def __init__(self, embedding: nn.Embedding, net: Net) -> None:
        super().__init__()
        self.weight, self.net = embedding.weight, net
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        width = self.net.active.width("hidden")
        return F.embedding(ids, self.weight if width == self.embedding_dim else self.weight[:, :width].contiguous())


class ElasticNorm(nn.Module):
    """RMSNorm over the channels that arrive: gamma x / sqrt(mean x^2 + eps), in float32."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight[: x.shape[-1]] * wide.to(x.dtype)


def make_elastic(model: PreTrainedModel, net: Net) -> dict[str, ElasticLinear]:
    """Put elastic layers into a model that `axes.check_axes` passed; its linear layers by name.

    Weights keep their names and stay the same parameters.
    """
    found: dict[str, ElasticLinear] = {}
    for name, module in list(model.named_modules()):
        place = place_of(f"{name}.weight")
        if place is None or place.axes == ("head",):
            continue
        if isinstance(module, nn.Linear):
            found[name] = ElasticLinear(module, net, place.axes, inside=place.block is not None)
            model.set_submodule(name, found[name])
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, ElasticEmbedding(module, net))
        else:
            norm: Any = module
            model.set_submodule(name, ElasticNorm(norm.weight, norm.variance_epsilon))
    base: Any = model.base_model
    base.register_forward_pre_hook(_Sends(net), with_kwargs=True)
    for block in blocks_of(model):
        attention = block.get_submodule(
            "self_attn"
        )  # called inside of what is computed again, unlike hooks of the block
        attention.register_forward_pre_hook(_Receives(net), with_kwargs=True)
    return found


@dataclass(slots=True)
class _Sends:
    """The active size goes to the blocks with the other arguments of the forward."""

    net: Net

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, ARGUMENT: self.net.active}


@dataclass(slots=True)
class _Receives:
    net: Net

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.net.in_block = kwargs.pop(ARGUMENT)
        return args, kwargs


def net_of(model: nn.Module) -> Net:
    """The net of an elastic model.

    Raises:
        RecipeError: EW-767, it is none.
    """
    for module in model.modules():
        if isinstance(module, ElasticLinear):
            return module.net
    raise RecipeError(
        "EW-767",
        "the objective sandwich trains the sub-networks of an elastic model, and this one has none",
        expected="methods: [{type: elastic, ...}]",
        fix="add the method elastic, or use objective: {type: next_token}",
    )
