"""A smaller decoder cut out of a larger one: which channels, heads and blocks are kept, and what they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgewright.compress.axes import Axis, Place, places
from edgewright.compress.shape import Shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBlock:
    """What is kept of a block, as numbers in the source; int64 [kept]."""

    block: int
    """Its own number there."""
    heads: Tensor
    """Query heads, those of a key and value head next to each other."""
    key_value_heads: Tensor
    ffn: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept of a decoder."""

    hidden: Tensor
    """[H'], the same everywhere, since the residual stream is one."""
    blocks: tuple[KeptBlock, ...]

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "hidden": self.hidden.tolist(),
            "blocks": [
                {
                    "block": kept.block,
                    "heads": kept.heads.tolist(),
                    "key_value_heads": kept.key_value_heads.tolist(),
                    "intermediate": kept.ffn.tolist(),
                }
                for kept in self.blocks
            ],
        }

    def shape(self, source: Shape) -> Shape:
        """Of the model that is left; every block keeps as much."""
        first = self.blocks[0]
        return Shape(
            hidden_size=len(self.hidden),
            intermediate_size=len(first.ffn),
            num_hidden_layers=len(self.blocks),
            num_attention_heads=len(first.heads),
            num_key_value_heads=len(first.key_value_heads),
            head_dim=source.head_dim,
        )


def prefix(source: Shape, wanted: Shape, blocks: Sequence[int]) -> Kept:
    """The first channels and heads of these blocks: as many as the wanted shape has."""
    queries = torch.arange(source.num_attention_heads).view(source.num_key_value_heads, source.group)
    heads = queries[: wanted.num_key_value_heads, : wanted.group].flatten()
    return Kept(
        hidden=torch.arange(wanted.hidden_size),
        blocks=tuple(
            KeptBlock(
                block=block,
                heads=heads,
                key_value_heads=torch.arange(wanted.num_key_value_heads),
                ffn=torch.arange(wanted.intermediate_size),
            )
            for block in blocks
        ),
    )


@torch.no_grad()
def cut(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A new model, with memory of its own, that is made of the kept parts; in the source's type, on its device.

    Args:
        model: `axes.check_axes` passed it.
    """
    source = Shape.of(model.config)
    config = kept.shape(source).config(model.config, [block.block for block in kept.blocks])
    state = model.state_dict()

    def part(place: Place) -> Tensor:
        block = None if place.block is None else kept.blocks[place.block]
        value = state[place.name if block is None else place.in_block(block.block)]
        for dimension, axis in enumerate(place.axes):
            index = _index(axis, kept, block, source.head_dim)
            if index is not None:
                value = value.index_select(dimension, index.to(value.device))
        return value.contiguous().clone()

    return assembled(config, part, like=model)


def assembled(config: PretrainedConfig, part: Any, *, like: PreTrainedModel) -> PreTrainedModel:
    """A model of a configuration whose weights a function gives.

    Args:
        part: from the place of a weight to its value; tied weights are asked for once.
        like: the model whose attention and settings for generation it gets.
    """
    from edgewright.compress.factored_model import empty_model

    model: Any = empty_model(config, like.dtype, like.config._attn_implementation)
    tied = set(model.all_tied_weights_keys)
    found = {name: part(place) for name, place in places(model).items() if name not in tied}
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    model.to(like.device)
    model.generation_config = like.generation_config
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not missing, f"no values for {missing}"
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    made: PreTrainedModel = model
    return made


def _index(axis: Axis, kept: Kept, block: KeptBlock | None, head_dim: int) -> Tensor | None:
    """The numbers to keep along an axis; None for all of them."""
    if axis == "hidden":
        return kept.hidden
    if block is None:
        return None
    by_axis = {
        "query": lambda: rows_of_heads(block.heads, head_dim),
        "key_value": lambda: rows_of_heads(block.key_value_heads, head_dim),
        "ffn": lambda: block.ffn,
    }
    return by_axis[axis]() if axis in by_axis else None


def rows_of_heads(heads: Tensor, head_dim: int) -> Tensor:
    """The rows [heads * D] that these heads have in a projection."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
