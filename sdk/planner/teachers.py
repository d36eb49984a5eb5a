"""Teachers for the planner: with shapes alone, their weights as narrow as they will be held."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.compress.cache_format import Layout
from edgewright.compress.targets import Logits, Sampled, TargetSource, TopK
from edgewright.compress.teacher import PACKED_BITS, packable
from edgewright.preview import stored_architecture
from edgewright.student import WITHOUT_SDPA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.compress.teacher_config import TeacherWeights
    from edgewright.objective import ModelInputs

SCALE_GROUP = 64
"""Weights that share a scale of one byte in bitsandbytes' NF4; 256 of those share a float32."""


class Packed(nn.Module):
    """The memory of a linear layer in few bits: its codes and scales, and the wide weight while it is used."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        count, rows = linear.weight.numel(), linear.out_features
        scales = count // SCALE_GROUP if bits == 4 else 4 * rows
        self.shape = linear.weight.shape
        self.codes = nn.Parameter(torch.empty(count * bits // 8, dtype=torch.uint8, device="meta"), False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=torch.uint8, device="meta"), False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.empty(self.shape, dtype=x.dtype, device=x.device), self.bias)


def as_held(model: PreTrainedModel, weights: TeacherWeights) -> PreTrainedModel:
    """A model on meta, changed as `teacher.open_frozen` does."""
    if weights != "fp32":
        nn.Module.to(model, torch.bfloat16)
    if weights in PACKED_BITS:
        for name, linear in packable(model, model.get_output_embeddings()):
            model.set_submodule(name, Packed(linear, PACKED_BITS[weights]))
    return model


def stored(directory: Path) -> PreTrainedModel:
    """The model of a directory on meta, with the attention that training gives it."""
    model = stored_architecture(directory)
    if model.config.model_type in WITHOUT_SDPA:
        model.set_attn_implementation("eager")
    return model


def stored_teacher(directory: Path, weights: TeacherWeights) -> PreTrainedModel:
    """The same as a teacher holds it."""
    return as_held(stored(directory), weights)


def parameter_count(model: PreTrainedModel) -> int:
    """Of a model as it is held: layers in few bits count by their weights."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    inside = {id(tensor) for module in packed for tensor in (module.codes, module.scales)}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return plain + sum(module.shape.numel() for module in packed)


def loading_bytes(model: PreTrainedModel) -> int:
    """Host memory that opening a teacher takes: layers in few bits are wide until their turn comes."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    wide = sum(2 * module.shape.numel() for module in packed)
    inside = {id(tensor) for module in packed for tensor in (module.codes, module.scales)}
    tensors = [*model.parameters(), *model.buffers()]
    return wide + sum(t.numel() * t.element_size() for t in tensors if id(t) not in inside)


class CachedShapes(TargetSource):
    """Stands for a cache: the shapes of its targets at their widest."""

    gives = Logits

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.gives = Sampled if layout.kind == "sampled" else TopK  # type: ignore[misc, assignment]

    def targets(self, inputs: ModelInputs, dtype: torch.dtype) -> Sampled | TopK:
        shape = (inputs.input_ids.numel(), self.layout.most)
        ids, values = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        if self.layout.kind == "sampled":
            return Sampled(ids=ids, weights=values)
        return TopK(ids=ids, log_probs=values, tail=torch.zeros(shape[0]))
