"""A frozen linear layer with a low-rank adapter beside it: LoRA, DoRA, over weights in full precision or in 4 bits.

The adapters are peft's, with its initialisation and its forward; this wraps them as a layer of the house.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from edgewright.compress.layers import CompressedLinear
from edgewright.imports import importing_bitsandbytes

NAME = "default"
"""What peft calls the only adapter of a layer."""


class AdaptedLinear(CompressedLinear):
    """y = x (W + s B A)^T + bias, W frozen (LoRA, arXiv 2106.09685); or, row by row, the same times m / |W + s B A|.

    s = alpha / r; A begins Kaiming-uniform, B as 0. With `dora` the magnitude m [out] of every row is trained apart
    from its direction (arXiv 2402.09353); it begins as the row's norm in W, and the norm that divides is a constant to
    the gradient. Dropout is on the adapter's input (with DoRA on the whole layer's), in training alone.

    Args:
        linear: the layer to take weight and bias from (shared, not copied); neither gets gradients any more. It may be
            a `FourBitLinear`.
        rank: r.
        alpha: see the formula.
        dropout: share of the inputs that are dropped.
        dora: whether magnitudes are trained.
    """

    method = "lora"
    adapted: Any
    """peft's layer around the frozen one."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, dropout: float, dora: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank = rank
        self.dora = dora
        self.drops = dropout > 0
        self.adapted = _adapter(linear, rank=rank, alpha=alpha, dropout=dropout, dora=dora)

    @property
    def base(self) -> nn.Linear:
        """The frozen layer."""
        base: nn.Linear = self.adapted.base_layer
        return base

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.base.bias

    def base_weight(self) -> Tensor:
        """W [out, in], out of its 4 bits where it is in those."""
        return self.base.weight

    def effective_weight(self) -> Tensor:
        """W + s B A, or m (W + s B A) / |W + s B A| by rows, [out, in]; gradients reach what is trained."""
        weight = self.base_weight() + self.adapted.get_delta_weight(NAME)
        if not self.dora:
            return weight
        magnitude: Tensor = self.adapted.lora_magnitude_vector[NAME].weight
        return (magnitude / torch.linalg.norm(weight.detach(), dim=1))[:, None] * weight

    def flops(self) -> int:
        """2 in out + 2 r (in + out); with DoRA and dropout W is multiplied with what is left of the inputs as well."""
        products = 2 if self.dora and self.drops else 1
        return 2 * (
            products * self.in_features * self.out_features + self.rank * (self.in_features + self.out_features)
        )

    def flops_per_forward(self) -> int:
        """With DoRA B A is multiplied out for the norms: 2 r (in^2 + in out), by way of a unit matrix."""
        return 2 * self.rank * self.in_features * (self.in_features + self.out_features) if self.dora else 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapted(x)
        return y


def _adapter(linear: nn.Linear, *, rank: int, alpha: float, dropout: float, dora: bool) -> Any:
    """peft's layer around this one.

    It is made on meta and filled afterwards: peft would move its weights to the device of the layer's, which tensors
    without memory, as the planner's are, refuse.
    """
    with importing_bitsandbytes():
        import peft

    config: Any = peft.LoraConfig  # which says that alpha is an integer, and takes any number
    holder: Any = nn.Module()
    settings = config(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, target_modules=["linear"])
    with unset_fake_temporarily():  # inside the planner
        holder.linear = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        peft.inject_adapter_in_model(settings, holder, adapter_name=NAME, low_cpu_mem_usage=True)
    layer = holder.linear
    weight = linear.weight
    layer.base_layer = linear.requires_grad_(False)
    layer.lora_A[NAME].weight = nn.Parameter(weight.new_empty(rank, linear.in_features))
    layer.lora_B[NAME].weight = nn.Parameter(weight.new_empty(linear.out_features, rank))
    layer.reset_lora_parameters(NAME, init_lora_weights=True)
    if dora:
        layer.lora_magnitude_vector[NAME].weight = nn.Parameter(torch.linalg.norm(weight.detach(), dim=1))
    return layer
