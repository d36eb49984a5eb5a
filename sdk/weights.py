"""What a model's weights are stored in while it trains (`training.weights`), and how that is saved.

`bf16`: the matrices of linear layers and embeddings in bfloat16. `int8`: those of the linear layers in attention and
mlp in eight bits, other linear layers and embeddings in bfloat16. Norms, biases and what else a model has stay float32.
See `optim/narrow_weight.py` for what such a weight is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from edgewright.optim.narrow_weight import NarrowWeight

WeightsType = Literal["fp32", "bf16", "int8"]
"""Values of `training.weights`."""
ROLES_IN_INT8 = frozenset({"attention", "mlp"})


def hold_weights_as(model: nn.Module, weights: WeightsType) -> str | None:
    """Store a model's weights narrow, in place: before the optimizer is built.

    Returns:
        What is stored how, in a sentence; None where nothing is narrow.

    Raises:
        RecipeError: as `check_weights`.
    """
    from torch import nn

    check_weights(model, weights, methods=())
    made: dict[int, nn.Parameter] = {}
    for _, module, kind in _matrices(model, weights):
        weight = module.weight
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(kind.narrowed(weight), requires_grad=weight.requires_grad)
        module.weight = made[id(weight)]
    if not made:
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    counts = {name: sum(p.numel() for p in made.values() if type(p) is kind) for name, kind in _kinds().items()}
    shares = ", ".join(f"{count / total:.1%} {name}" for name, count in counts.items() if count)
    return f"weights: {shares}, the rest fp32; {stored_bytes(model) / total:.2f} bytes a parameter"


def check_weights(model: nn.Module, weights: WeightsType, *, methods: Sequence[str]) -> None:
    """Refuse what cannot be stored like that. Only shapes are read: the model may be on meta.

    Args:
        methods: names of those of the stage.

    Raises:
        RecipeError: EW-745, a matrix is not made of whole groups; EW-746, there are methods, which represent weights by
            themselves; EW-747, there is no weight to be stored like that.
    """
    from edgewright.optim.int8_weight import GROUP, Int8Weight

    if weights == "fp32":
        return
    if methods:
        raise _owned(methods[0], weights)
    matrices = _matrices(model, weights)
    for name, module, kind in matrices:
        if kind is Int8Weight and module.weight.numel() % GROUP:
            raise _does_not_divide(name, module.weight, GROUP)
    if not any(kind is _kinds()[weights] for _, _, kind in matrices):
        raise _none_there(weights)


def stored_bytes(model: nn.Module) -> int:
    """Memory that a model's parameters really take, each counted once."""
    from edgewright.optim.narrow_weight import NarrowWeight

    return sum(
        parameter.stored_bytes if isinstance(parameter, NarrowWeight) else parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
    )


def predicted_bytes(model: nn.Module, weights: WeightsType) -> int:
    """What `stored_bytes` will be after `hold_weights_as`. Only shapes are read: the model may be on meta."""
    from edgewright.optim.int8_weight import GROUP, Int8Weight

    kinds = {id(module.weight): kind for _, module, kind in _matrices(model, weights)}

    def size(parameter: Tensor) -> int:
        kind = kinds.get(id(parameter))
        if kind is None:
            return parameter.numel() * parameter.element_size()
        return parameter.numel() + 5 * parameter.numel() // GROUP if kind is Int8Weight else 2 * parameter.numel()

    return sum(size(parameter) for parameter in model.parameters())


def plain_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with narrow weights as plain float32 tensors; None where there are none, so that it is not needed.

    Eight bits and bfloat16 are exact in float32. Tied weights are one tensor, as in the model.
    """
    from edgewright.optim.narrow_weight import NarrowWeight

    narrow = {id(p): p for p in model.parameters() if isinstance(p, NarrowWeight)}
    if not narrow:
        return None
    plain = {key: weight.dequantized() for key, weight in narrow.items()}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: plain.get(id(tensor), tensor.detach()) for name, tensor in state.items()}


def without_beside(model: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """A state dict (None: the model's own) without what an objective trained beside the model."""
    from edgewright.objective import BESIDE

    if all(name != BESIDE for name, _ in model.named_children()):
        return state
    whole = model.state_dict() if state is None else state
    return {name: tensor for name, tensor in whole.items() if not name.startswith(f"{BESIDE}.")}


def stored_parts(model: nn.Module) -> dict[str, Tensor]:
    """What weights in eight bits are stored as, `{"model.layers.0...weight/codes": tensor}`.

    Their values in float32 do not say it all: stored again they would be rounded, to other codes. Those of bfloat16 do.
    """
    from edgewright.optim.int8_weight import Int8Weight

    return {
        f"{name}/{part}": tensor
        for name, parameter in model.named_parameters()
        if isinstance(parameter, Int8Weight)
        for part, tensor in parameter.parts.items()
    }


def load_parts(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Put `stored_parts` back, bit for bit."""
    from edgewright.optim.int8_weight import Int8Weight

    for name, parameter in model.named_parameters():
        if isinstance(parameter, Int8Weight):
            parameter.load_parts({part: parts[f"{name}/{part}"] for part in parameter.PARTS})


def _kinds() -> dict[str, type[NarrowWeight]]:
    from edgewright.optim.bf16_weight import Bf16Weight
    from edgewright.optim.int8_weight import Int8Weight

    return {"bf16": Bf16Weight, "int8": Int8Weight}


def _matrices(model: nn.Module, weights: WeightsType) -> list[tuple[str, Any, type[NarrowWeight]]]:
    """The modules whose `weight` is stored narrow: name, module, and what the weight becomes."""
    from torch import nn

    from edgewright.optim.groups import role_of

    if weights == "fp32":
        return []
    found: list[tuple[str, Any, type[NarrowWeight]]] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            in_role = role_of(f"{name}.weight") in ROLES_IN_INT8
            found.append((name, module, _kinds()[weights if in_role else "bf16"]))
        elif isinstance(module, nn.Embedding):
            found.append((name, module, _kinds()["bf16"]))
    return found


def _owned(method: str, weights: WeightsType) -> RecipeError:
    return RecipeError(
        "EW-746",
        f"weights that a method represents cannot be stored as {weights}",
        where="training.weights",
        expected="weights: fp32, since what a method rounds or cuts up are weights in full precision",
        found=f"weights: {weights} and the method {method}",
        fix="remove training.weights, or the method",
    )


def _does_not_divide(name: str, weight: torch.Tensor, group: int) -> RecipeError:
    shape = list(weight.shape)
    return RecipeError(
        "EW-745",
        "weights in eight bits come in whole groups",
        where=name,
        expected=f"a multiple of {group} weights",
        found=f"{math.prod(shape)}, of shape {shape}",
        fix="training.weights: bf16, or other sizes of the model",
    )


def _none_there(weights: WeightsType) -> RecipeError:
    return RecipeError(
        "EW-747",
        f"this model has no weights that could be stored as {weights}",
        where="training.weights",
        expected="layers of torch.nn.Linear, for int8 in modules for attention or mlp",
        fix="training.weights: fp32",
    )
