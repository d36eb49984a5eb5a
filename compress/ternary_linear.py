"""The layer of ternary training: a rule of `quantizers.QUANTIZERS`, with a trained scale or a bias where it has one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.fake_quant import FakeQuantLinear, Int8Activation, as_array
from edgewright.compress.quantizers import QUANTIZERS, SEQ_CLIP, Granularity, LearnedScale, blocks_of, exact_scale

if TYPE_CHECKING:
    from edgewright.export.lattice import LatticeTensor


class _LearnedStep(torch.autograd.Function):
    """Q(W, a) forward. Backward to W: identity within the clipping range; to a: LSQ's, through `slope`.

    With levels l of a: dQ/da = l - w / a within the range and l outside of it, times 1 / sqrt(weights * largest level)
    (LSQ, arXiv 1902.08153). ParetoQ's code takes 1 for the outer level of its ternary rule, which is 2/3.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, rounded: Tensor, passed: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(passed, slope)
        ctx.scales = scale.shape
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        passed, slope = ctx.saved_tensors
        blocks = (ctx.scales.numel(), -1)
        return gradient * passed, (gradient * slope).reshape(blocks).sum(-1), None, None, None


class _DeadWeightBias(torch.autograd.Function):
    """lambda * the sum of each output's weights of code 0; backward: lambda * the bias's gradient, to just those."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, dead: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(dead, factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        dead, factor = ctx.saved_tensors
        return dead * (gradient * factor)[:, None], None, None, None


class _WithResidual(torch.autograd.Function):
    """Q(W) + eps W forward; backward: 1 + eps, the identity through the rounding and what W adds by itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None, None


class TernaryLinear(FakeQuantLinear):
    """A linear layer whose weight is rounded by a rule of `QUANTIZERS`.

    Args:
        latent: the layer to take weight and bias from (shared, not copied).
        quantizer: the name of the rule.
        granularity: what shares a scale.
        group: columns of a group, for that granularity.
        quantize_activations: int8 per token before the product.
        dead_bias: lambda of a rule whose weights of code 0 feed a bias.
    """

    method = "ternary"
    passed: Tensor
    """[out, in], with a trained scale: the part of a weight's gradient that reaches the latent weight."""
    slope: Tensor
    """[out, in], likewise: how the weight follows the scale, LSQ's factor included."""
    dead: Tensor
    """[out, in] bool, with Tequila: the weights of code 0."""
    dead_sum: Tensor
    """[out], likewise: the bias that they make."""
    dead_factor: Tensor
    """[], likewise: lambda times the strength; a tensor, because compiled code is made anew for every other float."""
    residual_factor: Tensor
    """[], with Sherry: 1 + eps, a tensor for the same reason."""

    def __init__(
        self,
        latent: nn.Linear,
        *,
        quantizer: str = "absmean",
        granularity: Granularity = "row",
        group: int = 256,
        quantize_activations: bool = False,
        dead_bias: float = 0.0,
    ) -> None:
        super().__init__(latent)
        self.rule = QUANTIZERS[quantizer]
        self.granularity: Granularity = granularity
        self.group = group
        self.quantize_activations = quantize_activations
        self.dead_bias = dead_bias
        self.residual = 0.0
        """eps of Sherry's residual, in training; an evaluation sees none, like the finished model."""
        self.scale: nn.Parameter | None = None
        """SEQ's `a`, one for every group, flat (weight decay leaves vectors alone)."""
        with torch.no_grad():
            if self.rule.learned:
                self.scale = nn.Parameter(self.rule.learned.first(self._blocks()).reshape(-1))
                self._buffer("passed", torch.empty_like(self.rounded))
                self._buffer("slope", torch.empty_like(self.rounded))
            if self.rule.dead_bias:
                self._buffer("dead", torch.empty_like(self.rounded, dtype=torch.bool))
                self._buffer("dead_sum", self.rounded.new_empty(self.out_features))
                self._buffer("dead_factor", self.rounded.new_empty(()))
            if self.rule.residual:
                self._buffer("residual_factor", self.rounded.new_ones(()))
        self.refresh()

    def _buffer(self, name: str, tensor: Tensor) -> None:
        """What a gradient needs, made anew with every rounding and not saved."""
        self.register_buffer(name, tensor, persistent=False)

    def _blocks(self) -> Tensor:
        return blocks_of(self.weight.detach().float(), self.granularity, self.group)

    def round_into(self, codes: Tensor) -> Tensor:
        blocks = self._blocks()
        out = codes.view(blocks.shape)
        if self.rule.round is not None:
            return self.rule.round(blocks, out)[:, :, 0]
        assert self.scale is not None and self.rule.learned is not None
        steps = exact_scale(self.scale.detach() * self.rule.learned.step).reshape(*blocks.shape[:2], 1)
        self.rule.learned.codes(blocks, steps, out)
        return steps[:, :, 0]

    def lattice(self) -> LatticeTensor:
        from edgewright.export.lattice import LatticeTensor

        codes, scales = self.round()
        return LatticeTensor(
            codes=as_array(codes, np.int8),
            scales=as_array(scales, np.float32),
            group=self.group if self.granularity == "group" else None,
            bits=2,
            levels=self.rule.levels,
        )

    @property
    def _added(self) -> float:
        """The share of W that the forward has besides, which goes with the rounding: without it there is none."""
        return self.residual * self.strength if self.training else 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        super().refresh()
        if self.rule.residual:
            self.residual_factor.fill_(1 + self._added)
            if self._added:
                self.rounded.add_(self.weight, alpha=self._added)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.residual:
            self.refresh()
        return self

    def settle(self) -> None:
        self.residual = 0.0
        super().settle()

    def _state(self) -> tuple[float | int, ...]:
        return *super()._state(), self._added

    def _remember(self, codes: Tensor, scales: Tensor) -> None:
        if self.rule.learned:
            self._remember_slope(codes, scales, self.rule.learned)
        if self.rule.dead_bias:
            torch.eq(codes, 0, out=self.dead)
            torch.sum(self.weight.float() * self.dead, -1, out=self.dead_sum)
            self.dead_factor.fill_(self.dead_bias * self.strength)
            self.dead_sum.mul_(self.dead_factor)

    def _remember_slope(self, codes: Tensor, scales: Tensor, rule: LearnedScale) -> None:
        blocks = self._blocks()
        factor = self.strength / math.sqrt(self.weight.numel() * rule.largest)
        slope, inside = self.slope.view(blocks.shape), self.passed.view(blocks.shape)
        torch.div(blocks, scales[:, :, None] / rule.step, out=slope)  # w / a, with the `a` as the step was rounded
        torch.abs(slope, out=inside).lt_(SEQ_CLIP)
        slope.mul_(inside).mul_(-factor).add_(codes.view(blocks.shape), alpha=factor * rule.step)
        if self.strength < 1:
            inside.mul_(self.strength).add_(1 - self.strength)

    def effective_weight(self) -> Tensor:
        if self.rule.residual:
            self.ensure_fresh()
            added: Tensor = _WithResidual.apply(self.weight, self.rounded, self.residual_factor)
            return added
        if self.scale is None:
            return super().effective_weight()
        self.ensure_fresh()
        weight: Tensor = _LearnedStep.apply(self.weight, self.scale, self.rounded, self.passed, self.slope)
        return weight

    def effective_bias(self) -> Tensor | None:
        """The layer's own bias, and that of its dead weights."""
        if not self.rule.dead_bias:
            return self.bias
        bias: Tensor = _DeadWeightBias.apply(self.weight, self.dead_sum, self.dead, self.dead_factor)
        return bias if self.bias is None else self.bias + bias

    def forward(self, x: Tensor) -> Tensor:
        if self.quantize_activations:
            x = Int8Activation.apply(x)
        return F.linear(x, self.effective_weight(), self.effective_bias())
