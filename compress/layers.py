"""Which linear layers a method represents, and what such a layer is to the rest of the house.

A weight has one owner: a method picks among the plain linear layers that no earlier method of the stage has taken, so
several methods share a model by sharing out its layers (`layers`, `exclude`).
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from edgewright.compress.choice import LayerChoice, named
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


Layer = TypeVar("Layer", bound="CompressedLinear")


class CompressedLinear(nn.Module, ABC):
    """A linear layer whose weight a method represents: y = x W^T + bias, with W not stored as it is."""

    method: str
    """`Method.type` of the owner."""
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    stored: bool = False
    """Whether the model came with it, so that it is part of the architecture and belongs to no method of the stage."""

    @property
    def saves_nothing(self) -> bool:
        """Whether a plain layer would hold no more numbers, where the layer is there to hold fewer."""
        return False

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """W of the forward, [out, in], with gradients.

        Raises:
            ValueError: the layer is no product with one matrix (an activation lies between its factors).
        """

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations of the forward for one token; a multiply-add counts as two."""

    def flops_per_forward(self) -> int:
        """Those of a forward however many tokens it has, as where the weight is built out of parts."""
        return 0


def choose(model: PreTrainedModel, choice: LayerChoice, *, method: str, head: bool = False) -> dict[str, nn.Linear]:
    """The linear layers that a method gets, by name, in the order of the model.

    Args:
        model: perhaps with layers that earlier methods have taken.
        choice: what the recipe says.
        method: the name of the method that asks, for the message.
        head: whether the output head is among them.

    Raises:
        RecipeError: EW-704, the model has no linear layers; EW-708, a name stands for none of them; EW-711, a layer
            belongs to an earlier method; EW-713, the model came with factors there; what `check_layer` raises.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, CompressedLinear))
    }
    linears = {name: module for name, module in linears.items() if not _inside(name, linears)}
    output = model.get_output_embeddings()
    if all(module is output for module in linears.values()):
        raise _none_there(model, method)
    for setting, patterns in (("layers", choice.layers), ("exclude", choice.exclude)):
        for pattern in patterns:
            _check_name(setting, pattern, linears)
    chosen = {}
    for name, module in linears.items():
        if not choice.asks_for(name):
            continue
        if module is output and not head:
            if choice.layers:
                raise _head_asked(name, method)
            continue
        if isinstance(module, CompressedLinear):
            raise _stored(name, module.method, method) if module.stored else _taken(name, module.method, method)
        choice.check_layer(name, module.out_features, module.in_features)
        chosen[name] = module
    return chosen


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def merged(layer: CompressedLinear) -> nn.Linear:
    """The plain linear layer that computes the same."""
    with torch.no_grad():
        return plain_linear(layer.effective_weight().clone(), layer.bias)


def submodules(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers of these names in a model, which may be a copy of the one that they were put into."""
    found: dict[str, Layer] = {}
    for name, layer in layers.items():
        module = model.get_submodule(name)
        assert isinstance(module, type(layer)), f"{name} is a {type(module).__name__}"
        found[name] = module
    return found


def cost(layers: Iterable[CompressedLinear]) -> dict[str, float]:
    """What layers cost in training, for a method's report.

    `weights` of the matrices that they stand for; `parameters`, the numbers that are trained for them (as many are in
    their gradients, and twice as many in Adam's state); `flops` of the forward for one token.
    """
    layers = list(layers)
    trained = {id(p): p.numel() for layer in layers for p in layer.parameters() if p.requires_grad}
    return {
        "weights": float(sum(layer.in_features * layer.out_features for layer in layers)),
        "parameters": float(sum(trained.values())),
        "flops": float(sum(layer.flops() for layer in layers)),
    }


def skipped(model: nn.Module) -> tuple[str, ...]:
    """The linear layers that no method has taken, by name."""
    owned = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    return tuple(
        name for name, module in model.named_modules() if type(module) is nn.Linear and not _inside(name, owned)
    )


def _inside(name: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a module is part of one of the layers, such as a factor."""
    parents = name.split(".")
    return any(".".join(parents[:depth]) in layers for depth in range(1, len(parents)))


def _check_name(setting: str, pattern: str, linears: Mapping[str, nn.Module]) -> None:
    if any(named(pattern, name) for name in linears):
        return
    last = sorted({name.rpartition(".")[2] for name in linears})
    near = difflib.get_close_matches(pattern, [*last, *linears], n=1)
    raise RecipeError(
        "EW-708",
        f"`{setting}` names no linear layer of this model: {pattern!r}",
        expected=f"a layer's name or the last parts of it, such as {', '.join(last)}",
        found=pattern,
        fix=f"did you mean {near[0]!r}?" if near else "correct or remove it",
    )


def _none_there(model: nn.Module, method: str) -> RecipeError:
    others = sorted({type(module).__name__ for module in model.modules() if _like_linear(module)})
    return RecipeError(
        "EW-704",
        f"{method!r} finds no linear layer in this model but its output head",
        expected="layers of torch.nn.Linear, as those of Llama, Qwen or Gemma",
        found=f"its matrices are in {', '.join(others)}" if others else "none",
        fix="train this architecture without a method, or take another one",
    )


def _like_linear(module: nn.Module) -> bool:
    """Whether a module holds a matrix of its own, but is neither a linear layer nor a table."""
    return not isinstance(module, (nn.Linear, nn.Embedding)) and any(
        parameter.ndim == 2 for parameter in module.parameters(recurse=False)
    )


def _head_asked(layer: str, method: str) -> RecipeError:
    return RecipeError(
        "EW-708",
        f"`layers` names the output head, {layer!r}, which {method!r} leaves alone",
        expected="linear layers but the output head; ternary takes it with `head: true`",
        found=layer,
        fix="remove it from `layers`, or say `head: true` where the method is ternary",
    )


def _stored(layer: str, kind: str, method: str) -> RecipeError:
    last = layer.rpartition(".")[2]
    return RecipeError(
        "EW-713",
        f"{layer} is stored as factors already, which {method!r} cannot take",
        expected="a plain linear layer",
        found=f"what {kind!r} left in the model that this stage starts from",
        fix=f"`exclude: [{last}]` here, no method at all, or in the earlier stage `merge: true` and `activation: none`",
    )


def _taken(layer: str, owner: str, method: str) -> RecipeError:
    last = layer.rpartition(".")[2]
    return RecipeError(
        "EW-711",
        f"two methods want the same weight: {layer}",
        expected="one method for each layer",
        found=f"{owner!r} has it, {method!r} asks for it",
        fix=f"share the layers out: `exclude: [{last}]` in one of them, or `layers: [...]`",
    )
