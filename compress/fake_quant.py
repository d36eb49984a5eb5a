"""Training through rounding: the layer whose forward uses the rounded weight, and its straight-through gradient.

The weights do not change within an optimizer step. So they are rounded once a step, outside of the graph, into a
buffer, and every forward is a plain `linear` over that buffer: nothing more is computed, saved or cast than in dense
training, with any number of micro-batches and under compilation.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.layers import CompressedLinear, cost, plain_linear, skipped, submodules
from edgewright.method import MethodReport, StepContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.export.lattice import LatticeTensor


class StraightThrough(torch.autograd.Function):
    """Q(W) forward, identity backward. A function of its own, because w + (q - w).detach() is not q in floats."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Int8Activation(torch.autograd.Function):
    """x -> clamp(round(x * a), -128, 127) / a, a = 127 / max|x| per token (BitNet b1.58); identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.float()
        a = 127.0 / wide.abs().amax(-1, keepdim=True).clamp_min(1e-5)
        return ((wide * a).round_().clamp_(-128, 127) / a).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class FakeQuantLinear(CompressedLinear):
    """A linear layer whose forward uses W + strength * (Q(W) - W); `weight` holds the latent W, under its own name.

    The buffer must follow the latent weight. The method refreshes it after every update and every restore; a forward
    that is not compiled also sees by itself that the weight has changed.

    Args:
        latent: the layer to take weight and bias from (shared, not copied).
    """

    rounded: Tensor
    """[out, in] float32, the weight of the forward; a buffer that is not saved."""

    def __init__(self, latent: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = latent.in_features, latent.out_features
        self.weight = latent.weight
        self.bias = latent.bias
        self.strength = 1.0
        """0 is full precision, 1 the lattice."""
        self.register_buffer("rounded", torch.empty_like(latent.weight, dtype=torch.float32), persistent=False)
        self._seen: tuple[float | int, ...] = ()

    @abstractmethod
    def round_into(self, codes: Tensor) -> Tensor:
        """Round the latent weight: codes into a contiguous float32 [out, in]; scales as of `round`."""

    @torch.no_grad()
    def round(self) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scales [1, 1], [out, 1] or [out, groups] of the latent weight, float32."""
        codes = torch.empty_like(self.rounded)
        return codes, self.round_into(codes)

    @abstractmethod
    def lattice(self) -> LatticeTensor:
        """The same as an export takes it."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the latent weight as it is now; tensors that a gradient needs of the rounding are made as well."""
        scales = self.round_into(self.rounded)
        self._remember(self.rounded, scales)
        blocks_with(self.rounded, scales).mul_(scales[:, :, None])
        if self.strength < 1:  # lerp is exact at both ends
            torch.lerp(self.weight.float(), self.rounded, self.strength, out=self.rounded)
        self._seen = self._state()

    def settle(self) -> None:
        """Become what is exported: the lattice, and nothing besides."""
        self.strength = 1.0
        self.refresh()

    def _remember(self, codes: Tensor, scales: Tensor) -> None:  # noqa: B027 - a hook for what gradients need
        """Called with every new rounding; codes [out, in] are in a buffer that is used again."""

    def _state(self) -> tuple[float | int, ...]:
        """Changes whenever the rounding would: torch counts the changes of a tensor."""
        found = [self.strength]
        for parameter in self.parameters(recurse=False):
            found += [parameter.data_ptr(), parameter._version]
        return tuple(found)

    def ensure_fresh(self) -> None:
        """Round again if the weight or the strength has changed; not in compiled code, which cannot see it."""
        if not torch.compiler.is_compiling() and self._seen != self._state():
            self.refresh()

    def effective_weight(self) -> Tensor:
        """The weight of the forward, [out, in]; gradients pass straight through to the latent one."""
        self.ensure_fresh()
        weight: Tensor = StraightThrough.apply(self.weight, self.rounded)
        return weight

    def effective_bias(self) -> Tensor | None:
        """The bias of the forward, [out]; asked for after the weight, which sees to the rounding."""
        return self.bias

    def flops(self) -> int:
        return 2 * self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.effective_bias())


def blocks_with(codes: Tensor, scales: Tensor) -> Tensor:
    """Contiguous codes [rows, columns] seen so that scales[:, :, None] fit, be they per tensor, row or group."""
    return codes.view(len(codes), scales.shape[1], -1)


def as_array(tensor: Tensor, kind: type[np.generic]) -> np.ndarray:
    """A tensor for a lattice."""
    return tensor.detach().cpu().numpy().astype(kind)


# ---------------------------------------------------------------- what methods do with such layers


def set_strength(layers: Mapping[str, FakeQuantLinear], ctx: StepContext, warmup_ratio: float) -> None:
    """Lambda warm-up: min(1, (step + 1) / warm-up steps), 1 from the end of the warm-up on."""
    warmup = warmup_ratio * ctx.total_steps
    for layer in layers.values():
        layer.strength = min(1.0, (ctx.step + 1) / warmup) if warmup else 1.0
        layer.ensure_fresh()


def refresh(layers: Mapping[str, FakeQuantLinear]) -> None:
    """After every update and restore, whoever wrote the weights, and however."""
    for layer in layers.values():
        layer.refresh()


def finish(
    model: PreTrainedModel, layers: Mapping[str, FakeQuantLinear]
) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
    """A copy with plain linear layers that hold codes * scale, and the codes and scales by weight name."""
    plain = copy.deepcopy(model)
    lattice: dict[str, LatticeTensor] = {}
    for name, layer in submodules(plain, layers).items():
        layer.settle()
        bias = layer.effective_bias()
        plain.set_submodule(name, plain_linear(layer.rounded, None if bias is None else bias.detach()))
        lattice[f"{name}.weight"] = layer.lattice()
    return plain, lattice


def report(model: PreTrainedModel, layers: Mapping[str, FakeQuantLinear]) -> MethodReport:
    """Layers changed, and the share of zeros among their codes."""
    found = submodules(model, layers)
    numbers = cost(found.values())
    with torch.no_grad():
        zeros = sum(int((layer.round()[0] == 0).sum()) for layer in found.values())
    numbers["zeros"] = zeros / max(1.0, numbers["weights"])
    return MethodReport(changed=len(found), skipped=skipped(model), numbers=numbers)
