"""What APOLLO, GaLore, Fira and GradNormLoRP share: Adam's moments of a gradient that was projected to a low rank.

    R = project(G)                                                      [m, r] or [r, n], see `projection.py`
    M = b1 M + (1 - b1) R,  V = b2 V + (1 - b2) R R                     moments survive a new projection unchanged
    D = M / (sqrt(V) + eps)
    W -= lr * sqrt(1 - b2^t) / (1 - b1^t) * U                           U is what an optimizer makes of G, R and D
    W -= lr * weight_decay * W                                          decoupled, and after the step

A group whose `rank` is None gets plain AdamW by the same formulas with R = G. So eps is added to the root of a second
moment that is not corrected for its bias, as in the public packages (torch's AdamW corrects it before).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgewright.optim.narrow_weight import NarrowWeight
from edgewright.optim.projected_groups import check_group, check_options, split
from edgewright.optim.projection import (
    Group,
    Projector,
    RandomProjector,
    State,
    SvdProjector,
    compresses_right,
    project,
    projected_shape,
    tensor_cores,
)
from edgewright.optim.sharding import as_distributed, as_part, local, matching, whole
from edgewright.optim.state import ResettableOptimizer, is_count, on_device
from edgewright.optim.storage import MomentStorage, moment_storage
from edgewright.optim.weights import readable, write_back

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""What torch's optimizers take."""
BATCH = 1 << 24
"""Values of low-rank gradients that are updated by one kernel: the memory that they and their directions need."""
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""Both moments' keys in the state, and whether they can be negative."""
PIECE = 1 << 24
"""Values of a parameter that is narrower than its update from which on it is updated in pieces of so many."""
LATER = 1e9
"""A step count after which the fused kernel's bias correction is 1, as it is done outside."""


@dataclass(slots=True, kw_only=True)
class Matrix:
    """A projected parameter in one step."""

    parameter: Tensor
    gradient: Tensor
    """What was projected, [m, n]."""
    projection: Tensor
    low: Tensor
    """R, the projected gradient."""
    direction: Tensor
    """D, of R's shape."""
    state: State
    group: Group
    rate: float
    """Learning rate times bias correction."""
    factor: Tensor = field(init=False)
    """Whatever `_prepare` makes of the above for `_update`."""


class ProjectedOptimizer(ResettableOptimizer):
    """Base of the optimizers over projected gradients.

    With a flat list of parameters (or a group that says nothing of `rank`) every matrix whose sides are both larger
    than the rank is projected, and the rest gets AdamW. A group with a `rank` is projected whole, one with `rank: None`
    gets AdamW. All options may differ between groups.

    Raises:
        RecipeError: EW-741, the rank of a group is larger than one of its matrices, or something in it is no matrix;
            the rank of a flat list is as large as all of its matrices.
    """

    def __init__(
        self, params: Params, defaults: dict[str, Any], *, seed: int = 0, keep_projections: bool = True
    ) -> None:
        self._seed = seed
        self._keep_projections = keep_projections
        self._projectors = self._new_projectors()
        check_options(defaults, projections=self._projectors)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seed": self._seed, "_keep_projections": self._keep_projections}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._projectors = self._new_projectors()

    def _new_projectors(self) -> dict[str, Projector]:
        return {
            "random": RandomProjector(keep=self._keep_projections, first_seed=self._first_seed),
            "svd": SvdProjector(),
        }

    def _first_seed(self, parameter: Tensor) -> int:
        """Its number among all parameters, from 1."""
        everything = (each for group in self.param_groups for each in group["params"])
        return self._seed + next(number for number, each in enumerate(everything, 1) if each is parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that says nothing of `rank` becomes two where only some of its parameters are projected.

        One that is refused leaves the optimizer as it was.
        """
        before = len(self.param_groups)
        try:
            for group in split(param_group, self.defaults["rank"]):
                super().add_param_group(group)
                check_group(self.param_groups[-1], projections=self._projectors)
        except BaseException:
            del self.param_groups[before:]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if any(parameter.grad.is_sparse for parameter in parameters):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if group["rank"] is None:
                self._adamw(parameters, group)
            else:
                for batch in _batches(parameters, group["rank"]):
                    self._projected(batch, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, bit for bit: torch would turn the moments into the parameters' type."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    key: value.clone() if is_count(value) else on_device(value, parameter)
                    for key, value in state_dict["state"][number].items()
                }

    def reset_state(self, parameter: Tensor, mask: Tensor | None) -> None:
        """Forget the moments of a parameter.

        Args:
            mask: None: all of the state, the step count too. Else, of the parameter's shape, where to forget: of a
                projected matrix the channels (rows or columns along its larger side) of which all is masked; what is
                masked only in part of a channel keeps its moments, which no longer belong to single weights.
        """
        group = next(group for group in self.param_groups if any(parameter is each for each in group["params"]))
        state = self.state.pop(parameter, {})
        if mask is None:
            kept = {} if group["rank"] is None else self._projectors[group["proj"]].forget(state)
            if kept:
                self.state[parameter] = kept
            return
        if not state:
            return
        self.state[parameter] = state
        if group["rank"] is not None:
            along = 1 if compresses_right(parameter.shape) else 0
            mask = mask.all(dim=along, keepdim=True)
        for key, signed in MOMENTS:
            moment_storage(group["states"], signed=signed).zero(state, key, mask.expand(state[key].shape))

    def state_bytes(self) -> int:
        """Bytes of the whole state after the first step, from shapes alone."""
        return sum(
            self._parameter_bytes(parameter.shape, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )

    def kept_bytes(self) -> int:
        """Bytes of the projections that are kept in memory beside the state, in the gradients' types."""
        return sum(
            self._projectors[group["proj"]].kept(parameter.shape, group) * parameter.element_size()
            for group in self.param_groups
            if group["rank"] is not None
            for parameter in group["params"]
        )

    @abstractmethod
    def _update(self, matrix: Matrix, weight: Tensor) -> None:
        """Change the weight, [m, n] in float32 (or float64), by -rate * U in place, and keep what the next step needs.

        Called for one matrix after the other, so that only one weight of a narrower type is wide at a time.
        """

    def _prepare(self, batch: list[Matrix]) -> None:  # noqa: B027 - an optional hook
        """What can be computed of many matrices by few kernels, before their weights are changed."""

    def _gradient(self, parameter: Tensor, group: Group) -> Tensor:
        """What is projected: G itself, unless an optimizer projects something made of it."""
        assert parameter.grad is not None
        return parameter.grad

    def _extra_bytes(self, shape: torch.Size, group: Group) -> int:
        """Bytes of the state of a projected matrix beside moments, step and projection."""
        return 0

    def _parameter_bytes(self, shape: torch.Size, group: Group) -> int:
        rank = group["rank"]
        moments = math.prod(shape if rank is None else projected_shape(shape, rank))
        size = sum(moment_storage(group["states"], signed=signed).nbytes(moments) for _, signed in MOMENTS) + 8
        if rank is not None:
            size += self._projectors[group["proj"]].nbytes(shape, group) + self._extra_bytes(shape, group)
        return size

    def _projected(self, parameters: list[Tensor], group: Group) -> None:
        gradients = [self._gradient(parameter, group) for parameter in parameters]
        projector = self._projectors[group["proj"]]
        projections, lows = [], []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            projection = projector.projection(parameter, gradient, self.state[parameter], group)
            with tensor_cores(gradient.device):
                lows.append(_computable(project(gradient, projection)))
            projections.append(projection)
        directions = _directions([self.state[parameter] for parameter in parameters], lows, group)
        batch = []
        for number, parameter in enumerate(parameters):
            state = self.state[parameter]
            batch.append(
                Matrix(
                    parameter=parameter,
                    gradient=gradients[number],
                    projection=projections[number],
                    low=lows[number],
                    direction=directions[number],
                    state=state,
                    group=group,
                    rate=group["lr"] * _bias_correction(_tick(state), group),
                )
            )
        self._prepare(batch)
        for matrix in batch:
            weight = readable(matrix.parameter)
            self._update(matrix, weight)
            _decay(weight, group)
            write_back(matrix.parameter, weight)

    def _adamw(self, parameters: list[Tensor], group: Group) -> None:
        fast = group["states"] == "fp32"
        alike: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            if fast and readable(parameter) is parameter and parameter.is_contiguous():
                done = int(self.state[parameter].get("step", 0))
                alike.setdefault((done, parameter.device, parameter.dtype), []).append(parameter)
            else:
                self._adamw_of_one(parameter, group)
        for (done, _, _), together in alike.items():
            rate = group["lr"] * _bias_correction(done + 1, group)
            gradients = [parameter.grad for parameter in together if parameter.grad is not None]
            _fused([self.state[parameter] for parameter in together], together, gradients, group, rate)
            for parameter in together:
                _tick(self.state[parameter])
                _decay(parameter, group)

    def _adamw_of_one(self, parameter: Tensor, group: Group) -> None:
        assert parameter.grad is not None
        pieces = _pieces(parameter, group)
        if pieces:
            self._adamw_in_pieces(parameter, group, pieces)
            return
        (direction,) = _directions([self.state[parameter]], [_computable(parameter.grad)], group)
        weight = readable(parameter)
        rate = group["lr"] * _bias_correction(_tick(self.state[parameter]), group)
        weight.add_(direction, alpha=-rate)
        _decay(weight, group)
        write_back(parameter, weight)

    def _adamw_in_pieces(self, parameter: Tensor, group: Group, pieces: list[slice]) -> None:
        """The same, some rows after the other: an embedding, its gradient, its direction and both moments in full
        precision would take more memory than all of the optimizer's state."""
        assert parameter.grad is not None
        state, begun = self.state[parameter], "step" in self.state[parameter]
        rate = group["lr"] * _bias_correction(_tick(state), group)
        for rows in pieces:
            part: State = {"step": state["step"], **{key: state[key][rows] for key, _ in MOMENTS}} if begun else {}
            (direction,) = _directions([part], [_computable(parameter.grad[rows])], group)
            window = parameter.window(rows) if isinstance(parameter, NarrowWeight) else parameter[rows]
            weight = readable(window)
            weight.add_(direction, alpha=-rate)
            _decay(weight, group)
            write_back(window, weight)
            for key, _ in MOMENTS:
                if key not in state:
                    state[key] = torch.empty(parameter.shape, dtype=part[key].dtype, device=parameter.device)
                state[key][rows].copy_(part[key])


def _directions(states: list[State], gradients: list[Tensor], group: Group) -> list[Tensor]:
    """D for each gradient (projected or not), after its moments were updated."""
    directions = [torch.empty_like(gradient, memory_format=torch.contiguous_format) for gradient in gradients]
    torch._foreach_zero_(directions)
    _fused(states, directions, gradients, group, -1.0)
    return directions


def _fused(states: list[State], targets: list[Tensor], gradients: list[Tensor], group: Group, rate: float) -> None:
    """Update the moments, and `targets` by -rate * D, in one kernel: torch's fused AdamW, without corrections.

    It walks through memory and looks at no strides: targets are contiguous, and all else is made so.
    """
    if not targets:
        return
    gradients = [gradient.contiguous() for gradient in gradients]
    moments = {
        key: [_moment(state, key, gradient, group) for state, gradient in zip(states, gradients, strict=True)]
        for key, _ in MOMENTS
    }
    later = torch.full((), LATER, device=targets[0].device)
    torch._fused_adamw_(
        targets,
        gradients,
        moments["exp_avg"],
        moments["exp_avg_sq"],
        [],
        [later] * len(targets),
        lr=rate,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    for key, signed in MOMENTS:
        storage = moment_storage(group["states"], signed=signed)
        for state, moment in zip(states, moments[key], strict=True):
            _keep(storage, state, key, moment)


def channel_norms(matrix: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """Of each channel of a matrix, of the weight's shape or projected: [m, 1], or [1, n]."""
    return torch.linalg.vector_norm(matrix, dim=1 if compresses_right(shape) else 0, keepdim=True, dtype=dtype)


def limit_growth(norms: list[Tensor], states: list[State], limit: float) -> list[Tensor]:
    """The factors, at most 1, that keep the norm of each update from growing by more than `limit` from step to step.

    Fira's norm-growth limiter (arXiv 2410.01623). Each state keeps the norm that is left. An update of norm 0 leaves
    none: the public code would let the next ones grow from nothing, by a hundredth a step.
    """
    norm = torch.stack([whole(each) for each in norms])
    unlimited = torch.full((), math.inf, dtype=norm.dtype, device=norm.device)
    previous = torch.stack([state.get("norm", unlimited) for state in states])
    factor = limit / torch.clamp(norm / (previous + 1e-8), min=limit)
    left = norm * factor
    for state, kept in zip(states, torch.where(left > 0, left, unlimited), strict=True):
        state["norm"] = kept.clone()  # what shares memory cannot be saved
    return list(factor)


def _moment(state: State, key: str, gradient: Tensor, group: Group) -> Tensor:
    """A moment in the gradient's type, of its shape and cut up as that is; zeros at first."""
    if "step" not in state:
        return torch.zeros_like(gradient)
    kept = moment_storage(group["states"], signed=dict(MOMENTS)[key]).read(state, key)
    return matching(kept.to(gradient.dtype).contiguous(), gradient)


def _keep(storage: MomentStorage, state: State, key: str, moment: Tensor) -> None:
    """Write a moment; of one that is cut up, each process its part."""
    storage.write(state, key, local(moment))
    state[key] = as_part(state[key], moment)


def _pieces(parameter: Tensor, group: Group) -> list[slice]:
    """Rows that are updated together, where a whole parameter is too large for that; else none.

    Blocks of eight bits run over the borders of rows, and what is cut up among processes is smaller already.
    """
    if isinstance(parameter, NarrowWeight) and not parameter.has_windows:
        return []
    if as_distributed(parameter) is not None or group["states"] == "int8":
        return []
    if parameter.ndim < 2 or parameter.numel() <= PIECE:
        return []
    rows = max(1, PIECE * parameter.shape[0] // parameter.numel())
    return [slice(first, first + rows) for first in range(0, parameter.shape[0], rows)]


def _computable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _tick(state: State) -> int:
    """Count a step: the number of this one, from 1."""
    step = int(state.get("step", 0)) + 1
    state["step"] = torch.tensor(step)
    return step


def _bias_correction(step: int, group: Group) -> float:
    beta1, beta2 = group["betas"]
    return math.sqrt(1 - beta2**step) / (1 - beta1**step)


def _decay(weight: Tensor, group: Group) -> None:
    if group["weight_decay"]:
        weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])  # 1 - lr * decay would be rounded, each step


def _batches(parameters: list[Tensor], rank: int | float) -> Iterator[list[Tensor]]:
    """Runs of parameters of a kind whose low-rank gradients have `BATCH` values together, or one that has more."""
    batch: list[Tensor] = []
    size = 0
    for parameter in parameters:
        values = math.prod(projected_shape(parameter.shape, rank))
        unlike = batch and (batch[-1].device, batch[-1].dtype) != (parameter.device, parameter.dtype)
        if unlike or (batch and size + values > BATCH):
            yield batch
            batch, size = [], 0
        batch.append(parameter)
        size += values
    if batch:
        yield batch
