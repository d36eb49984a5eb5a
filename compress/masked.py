"""Layers with zeros: the layer that trains under a mask, and what is done with masks.

A masked weight is 0 itself, so the forward is that of a plain linear layer. Its gradient is set to 0 before clipping
and its optimizer state when it is pruned, so it stays 0 under weight decay and momentum. Ordinary hardware gains
neither memory nor time from such zeros; what they save is arithmetic that special kernels or chips can leave out.
"""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.density import starved, whole
from edgewright.compress.layers import CompressedLinear, cost, plain_linear, skipped, submodules
from edgewright.method import MethodReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.method import StepContext


class SparseLinear(CompressedLinear):
    """A linear layer of which only some weights are used.

    Args:
        linear: the layer to take weight and bias from (shared, not copied).
        method: `Method.type` of the owner.
    """

    def __init__(self, linear: nn.Linear, method: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        assert isinstance(linear.weight, nn.Parameter)
        self.weight = linear.weight
        self.bias = linear.bias
        self.method = method

    @abstractmethod
    def kept(self) -> Tensor:
        """Which weights are used, [out, in] bool."""

    @abstractmethod
    def fix_gradient(self) -> None:
        """Change the complete gradient as the mask asks."""

    def flops(self) -> int:
        """Those of a dense product: that is what the hardware does."""
        return 2 * self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)


class MaskedLinear(SparseLinear):
    """A linear layer whose weight is 0 where its mask is false."""

    mask: Tensor
    """[out, in] bool, true where the weight is used; a buffer that is not saved."""

    def __init__(self, linear: nn.Linear, method: str) -> None:
        super().__init__(linear, method)
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool), persistent=False)

    def kept(self) -> Tensor:
        return self.mask

    def effective_weight(self) -> Tensor:
        """The weight itself: it is 0 where it is masked."""
        return self.weight

    @torch.no_grad()
    def fix_gradient(self) -> None:
        """0 where masked, also in place of what is not finite; the rest as it is, finite or not."""
        if self.weight.grad is not None:
            self.weight.grad.masked_fill_(~self.mask, 0.0)

    @torch.no_grad()
    def zero(self) -> None:
        """Set the masked weights to 0: an optimizer may have moved them."""
        self.weight.masked_fill_(~self.mask, 0.0)

    def set_mask(self, mask: Tensor, grown: Tensor | None, ctx: StepContext) -> None:
        """Take another mask; weights that it drops, and `grown` ones, are set to 0, their optimizer state too."""
        fresh = self.mask & ~mask if grown is None else (self.mask & ~mask) | grown
        ctx.reset_state(self.weight, fresh)
        self.mask.copy_(mask)
        with torch.no_grad():
            self.weight.masked_fill_(fresh, 0.0)


def largest(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Where the `keep` largest of all scores together are; of equal ones the first.

    Exact for any number of weights on any device, and without a sorted copy of them: floats that are not negative are
    in the order of their bits, so the threshold is found bit by bit.

    Args:
        scores: float32 and finite, of any shapes; negative ones are never chosen.
        keep: how many; at most as many as are not negative.
    """
    bits = [score.contiguous().view(torch.int32) for score in scores]
    threshold = 0
    for bit in reversed(range(31)):
        candidate = threshold | 1 << bit
        if _total([part >= candidate for part in bits]) >= keep:
            threshold = candidate
    chosen = [part > threshold for part in bits]
    left = keep - _total(chosen)
    for part, mask in zip(bits, chosen, strict=True):
        equal = part == threshold
        mask.logical_or_(equal & (equal.flatten().cumsum(0).view(equal.shape) <= left))
        left -= min(left, int(equal.sum()))
    assert left == 0, "fewer scores than are to be kept"
    return chosen


def _total(masks: Sequence[Tensor]) -> int:
    return int(torch.stack([mask.sum() for mask in masks]).sum())


def random_scores(weight: Tensor, seed: int, name: str) -> Tensor:
    """Uniform scores in [0, 1) for the weights of a layer, the same on every device; drawn from a stream of its own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def mask_randomly(layers: Mapping[str, MaskedLinear], counts: Mapping[str, int], seed: int) -> None:
    """Keep that many weights of each layer, chosen at random, before training."""
    for name, layer in layers.items():
        layer.mask.copy_(largest([random_scores(layer.weight, seed, name)], counts[name])[0])
        layer.zero()


def floors(sizes: Mapping[str, int], density: float, floor: float) -> dict[str, int]:
    """Weights that each layer keeps in any case: `floor` times its share of the density, and at least one.

    Raises:
        RecipeError: EW-726, that is more than the density allows.
    """
    own = {name: max(1, whole(floor * density, size)) for name, size in sizes.items()}
    if sum(own.values()) > round(density * sum(sizes.values())):
        smallest = min(sizes, key=lambda name: sizes[name])
        raise starved(smallest, density, max(len(sizes) / sum(sizes.values()), 1 / sizes[smallest]))
    return own


@torch.no_grad()
def magnitude_masks(layers: Mapping[str, MaskedLinear], density: float, floor: float) -> dict[str, Tensor]:
    """Masks that keep the largest weights of all layers together: round(density * weights) of them, exactly.

    Only among those that are used now (if these are fewer, all), so that nothing comes back. Each layer first gets its
    own largest (`floors`), so that none starves; with `floor` 1 every layer is pruned alike.
    """
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    keep = min(round(density * sum(sizes.values())), _total([layer.mask for layer in layers.values()]))
    scores = {name: magnitudes(layer.weight, layer.mask) for name, layer in layers.items()}
    own = {
        name: largest([scores[name]], min(count, int(layers[name].mask.sum())))[0]
        for name, count in floors(sizes, density, floor).items()
    }
    rest = [scores[name].masked_fill(own[name], -1.0) for name in layers]
    chosen = largest(rest, keep - _total(list(own.values())))
    return {name: own[name] | mask for name, mask in zip(layers, chosen, strict=True)}


def magnitudes(weight: Tensor, mask: Tensor) -> Tensor:
    """|W| where it is used, -1 elsewhere: scores for `largest`."""
    return weight.detach().float().abs().masked_fill_(~mask, -1.0)


def mask_state(layers: Mapping[str, MaskedLinear]) -> dict[str, Tensor]:
    """The masks, for a checkpoint."""
    return {f"{name}.mask": layer.mask for name, layer in layers.items()}


def load_masks(layers: Mapping[str, MaskedLinear], state: Mapping[str, Tensor]) -> None:
    """Put `mask_state`'s tensors back."""
    for name, layer in layers.items():
        layer.mask.copy_(state[f"{name}.mask"])


def without_masks(model: PreTrainedModel, layers: Mapping[str, SparseLinear]) -> PreTrainedModel:
    """A copy of the model whose plain linear layers hold the zeros."""
    plain = copy.deepcopy(model)
    for name, layer in submodules(plain, layers).items():
        plain.set_submodule(name, plain_linear(layer.effective_weight().detach(), layer.bias))
    return plain


@torch.no_grad()
def sparse_report(model: PreTrainedModel, layers: Mapping[str, SparseLinear]) -> MethodReport:
    """What a sparse method changed.

    `cost` beside what counts only where zeros are left out: `active` weights and their `active_flops`; `density` is
    the share of weights that are in fact not 0 (below that of active ones just after regrowth), `min_density` that
    of the sparsest layer.
    """
    found = submodules(model, layers)
    numbers = cost(found.values())
    active = float(sum(int(layer.kept().sum()) for layer in found.values()))
    used = [int(layer.effective_weight().count_nonzero()) for layer in found.values()]
    numbers |= {
        "density": sum(used) / max(1.0, numbers["weights"]),
        "min_density": min(
            (n / layer.weight.numel() for n, layer in zip(used, found.values(), strict=True)), default=0
        ),
        "active": active,
        "active_flops": 2 * active,
    }
    return MethodReport(changed=len(found), skipped=skipped(model), numbers=numbers)
