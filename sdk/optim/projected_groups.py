"""Which parameters of a group are projected, and the options that a group may have."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from torch import Tensor

from edgewright.errors import RecipeError
from edgewright.optim.projection import Group, rank_of
from edgewright.optim.sharding import as_distributed
from edgewright.optim.storage import StatesType


def split(param_group: dict[str, Any], rank: int | float | None) -> list[dict[str, Any]]:
    """A group as it is, or, where it leaves the rank open, its matrices and the rest of it.

    Raises:
        RecipeError: EW-741, it has matrices, and the rank is as large as all of them.
    """
    if "rank" in param_group or rank is None:
        return [param_group]
    params = param_group["params"]
    entries = [params] if isinstance(params, Tensor) else list(params)
    matrices = [entry for entry in entries if _can_be_projected(entry, rank)]
    rest = [entry for entry in entries if not _can_be_projected(entry, rank)]
    if not matrices:
        _check_no_matrix(rest, rank)
    parts: list[dict[str, Any]] = [{"rank": rank, "params": matrices}, {"rank": None, "params": rest}]
    return [param_group | part for part in parts if part["params"]]


def _check_no_matrix(entries: list[Tensor | tuple[str, Tensor]], rank: int | float) -> None:
    """Refuse a group that leaves the rank open and has matrices, but none that is large enough: it would get AdamW.

    Raises:
        RecipeError: EW-741.
    """
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors if tensor.ndim == 2}, key=min)
    if shapes:
        raise RecipeError(
            "EW-741",
            "the rank is as large as every matrix, so that nothing would be projected",
            expected=f"a matrix with both sides larger than {rank}",
            found=f"matrices of at most {list(shapes[-1])}",
            fix="lower the rank, give it as a fraction (0.25), or leave these to AdamW: rank None for their group",
        )


def _can_be_projected(entry: Tensor | tuple[str, Tensor], rank: int | float) -> bool:
    tensor = entry[1] if isinstance(entry, tuple) else entry
    return tensor.ndim == 2 and min(tensor.shape) > rank_of(rank, tensor.shape)


def check_options(options: dict[str, Any], *, projections: Collection[str]) -> None:
    """Refuse values that no formula takes, as torch's own optimizers do.

    Args:
        projections: values that `proj` may have.

    Raises:
        ValueError: names the first option that is out of its range.
    """
    rank, limiter = options["rank"], options.get("limiter")
    in_range = {
        "rank": rank is None or (not isinstance(rank, bool) and rank > 0 and (isinstance(rank, int) or rank <= 1)),
        "lr": options["lr"] >= 0,
        "betas": all(0 <= beta < 1 for beta in options["betas"]),
        "eps": options["eps"] >= 0,
        "weight_decay": options["weight_decay"] >= 0,
        "update_proj_gap": options["update_proj_gap"] >= 1,
        "scale": options["scale"] > 0,
        "limiter": limiter is None or limiter > 1,
        "queue_size": options.get("queue_size", 1) >= 1,
        "proj": options["proj"] in projections,
        "states": options["states"] in get_args(StatesType),
    }
    for name, good in in_range.items():
        if not good:
            raise ValueError(f"{name} is out of range: {options[name]}")


def check_group(group: Group, *, projections: Collection[str]) -> None:
    """Refuse a group whose options are out of range, or whose parameters its rank or its states do not suit.

    Args:
        projections: values that `proj` may have.

    Raises:
        RecipeError: EW-741, the rank is larger than a matrix, or something in the group is no matrix; EW-743, states of
            eight bits for what is cut up among processes. ValueError: `check_options`.
    """
    check_options(group, projections=projections)
    rank = group["rank"]
    names = group.get("param_names", [f"parameter {number}" for number in range(len(group["params"]))])
    for name, parameter in zip(names, group["params"], strict=True):
        if group["states"] == "int8" and as_distributed(parameter) is not None:
            raise RecipeError(
                "EW-743",
                "states of eight bits cannot be cut up among processes: their blocks run over the borders",
                where=name,
                expected="states: fp32 or bf16",
                found="states: int8",
                fix="change `states`, or let each process have the whole model",
            )
        if rank is None:
            continue
        if parameter.ndim != 2 or rank_of(rank, parameter.shape) > min(parameter.shape):
            raise RecipeError(
                "EW-741",
                "a rank for something that cannot be projected to it",
                where=name,
                expected=f"a matrix with both sides of at least {rank}",
                found=f"a tensor of shape {list(parameter.shape)}",
                fix="lower the rank, give it as a fraction (0.25), or leave this one to AdamW: rank None for its group",
            )
