"""Which parameters of a model an optimizer projects: by role and by shape. All others get AdamW."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgewright.compress.choice import named
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

ROLES: dict[str, re.Pattern[str]] = {
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|feed_?forward|^ffn?$|densereludense|^moe$|experts|^fc(\d|_in|_out)$"),
}
"""What the names of the modules of a role look like: Llama and all who copied it (`self_attn`, `mlp`), GPT-2, GPT-J and
Phi (`attn`, `mlp`), GPT-NeoX, Falcon and Bloom (`attention`, `self_attention`), OPT (`self_attn`, `fc1`), Mixtral
(`block_sparse_moe.experts`), T5 (`SelfAttention`, `DenseReluDense`)."""


def role_of(name: str) -> str | None:
    """The role of a parameter by the names of the modules around it, the innermost that says something."""
    for part in reversed(name.lower().split(".")[:-1]):
        for role, pattern in ROLES.items():
            if pattern.search(part):
                return role
    return None


def chosen_matrices(
    model: nn.Module, *, roles: Sequence[str], layers: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The trainable matrices of some roles, by name; embeddings and the output head have none.

    Args:
        roles: keys of `ROLES`.
        layers: only these modules, by their name or the last parts of it (`down_proj`, `0.mlp.up_proj`); empty: all.
        exclude: modules left out, named alike.

    Raises:
        RecipeError: EW-740, there is no such role; EW-742, nothing is chosen, or a name stands for nothing.
    """
    for role in roles:
        if role not in ROLES:
            raise RecipeError(
                "EW-740",
                "there is no such role of parameters",
                where="optimizer.roles",
                expected=f"some of: {', '.join(ROLES)}",
                found=role,
                fix="choose single matrices by their names with `layers`",
            )
    of_roles = {name: parameter for name, parameter in _matrices(model) if role_of(name) in roles}
    modules = [name.rpartition(".")[0] for name in of_roles]
    for key, patterns in {"layers": layers, "exclude": exclude}.items():
        for pattern in patterns:
            if not any(named(pattern, module) for module in modules):
                raise _nothing(f"optimizer.{key}", pattern, modules)
    chosen = {
        name: parameter
        for (name, parameter), module in zip(of_roles.items(), modules, strict=True)
        if (not layers or any(named(pattern, module) for pattern in layers))
        and not any(named(pattern, module) for pattern in exclude)
    }
    if not chosen:
        raise _nothing("optimizer.roles", ", ".join(roles) or "none", [name for name, _ in _matrices(model)])
    return chosen


def parameter_groups(
    model: nn.Module, matrices: dict[str, nn.Parameter], *, rank: int | float, weight_decay: float
) -> list[dict[str, Any]]:
    """The groups of an optimizer: the chosen matrices with a rank, all else with `rank: None`, each with its names.

    Vectors (norms, biases) are not decayed.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rest = [(name, parameter) for name, parameter in trainable if name not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": list(matrices.items()), "rank": rank, "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in rest if p.ndim >= 2], "rank": None, "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in rest if p.ndim < 2], "rank": None, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable matrices that are multiplied with, not looked up in, by name; each once."""
    from torch import nn

    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) not in looked_up:
            yield name, parameter


def _nothing(where: str, found: str, modules: list[str]) -> RecipeError:
    last = sorted({module.rpartition(".")[2] for module in modules})
    return RecipeError(
        "EW-742",
        "no matrix of the model is chosen to be projected",
        where=where,
        expected=f"names of linear layers: {', '.join(last[:12])}",
        found=found,
    )
