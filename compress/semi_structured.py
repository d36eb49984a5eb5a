"""2:4 sparsity: of every four consecutive input features of a row, the two largest weights are used.

That is the pattern which sparse tensor cores skip (Mishra et al., arXiv 2104.08378). Training is straight-through on
any device: the forward uses W * mask with the mask of the present weights, the gradient reaches all of W, and SR-STE
(Zhou et al., arXiv 2102.04010) adds decay * (1 - mask) * W to it, so that the mask settles. Memory does not shrink.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.compress.masked import SparseLinear
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KERNEL_CAPABILITY = 8
"""Major compute capability of the GPUs for which torch's CUTLASS kernels are built: Ampere and Ada."""
KERNEL_MULTIPLES = (32, 64)
"""What rows and columns must be multiples of in those kernels' 16-bit layout."""


def two_of_four(weight: Tensor) -> Tensor:
    """Mask of the two largest |w| of every four consecutive columns; of equal ones the first.

    Args:
        weight: [out, in], `in` a multiple of 4.
    """
    a, b, c, d = weight.abs().unflatten(-1, (-1, 4)).unbind(-1)
    ab, ac, ad, bc, bd, cd = (
        (a >= b).int(),
        (a >= c).int(),
        (a >= d).int(),
        (b >= c).int(),
        (b >= d).int(),
        (c >= d).int(),
    )
    wins = (ab + ac + ad, 1 - ab + bc + bd, 2 - ac - bc + cd, 3 - ad - bd - cd)
    return (torch.stack(wins, -1) >= 2).flatten(-2)


class _TwoOfFour(torch.autograd.Function):
    """W * mask forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.masked_fill(~two_of_four(weight), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class SemiStructuredLinear(SparseLinear):
    """A linear layer whose forward uses two of every four weights; `weight` holds the latent ones.

    Args:
        linear: the layer to take weight and bias from (shared, not copied).
        method: `Method.type` of the owner.
        decay: of the weights that are not used, added to the gradient.
    """

    def __init__(self, linear: nn.Linear, method: str, decay: float) -> None:
        super().__init__(linear, method)
        self.decay = decay

    def kept(self) -> Tensor:
        return two_of_four(self.weight.detach())

    def effective_weight(self) -> Tensor:
        """The weight of the forward, [out, in]; gradients pass straight through to the latent one."""
        weight: Tensor = _TwoOfFour.apply(self.weight)
        return weight

    @torch.no_grad()
    def fix_gradient(self) -> None:
        """Add the decay of the unused weights, once a step, however many micro-batches there were."""
        if self.weight.grad is not None and self.decay:
            self.weight.grad.add_(self.weight.masked_fill(self.kept(), 0.0), alpha=self.decay)


def has_pattern(weight: Tensor) -> bool:
    """Whether a weight [out, in] has at most two that are not 0 of every four consecutive columns."""
    return weight.shape[-1] % 4 == 0 and bool((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).le(2).all())


def use_sparse_kernels(model: PreTrainedModel) -> int:
    """Pack the 2:4 layers of a finished model for torch's sparse kernels, in place, for inference on a GPU.

    Args:
        model: in float16 or bfloat16 on a GPU of compute capability 8.x (Ampere, Ada).

    Returns:
        How many layers were packed; those whose sizes the kernels do not take stay as they are.

    Raises:
        RecipeError: EW-730, the kernels are not there for this device or type, or no layer fits.
    """
    parameter = next(model.parameters())
    device = parameter.device
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if capability != KERNEL_CAPABILITY or parameter.dtype not in (torch.float16, torch.bfloat16):
        raise _no_kernels(f"{parameter.dtype} on {torch.cuda.get_device_name(device) if capability else device}")
    rows, columns = KERNEL_MULTIPLES
    packed = 0
    for module in model.modules():
        if type(module) is not nn.Linear or not has_pattern(module.weight):
            continue
        if module.out_features % rows == 0 and module.in_features % columns == 0:
            sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(sparse, requires_grad=False)
            packed += 1
    if not packed:
        raise _no_kernels("no linear layer with the 2:4 pattern and sizes that fit")
    return packed


def _no_kernels(found: str) -> RecipeError:
    return RecipeError(
        "EW-730",
        "there are no sparse kernels for this model here",
        expected="2:4 weights in float16 or bfloat16, rows a multiple of 32 and columns of 64, on an Ampere or Ada GPU",
        found=found,
        fix="use the model as it is: the zeros are plain numbers, and every device computes them",
    )
