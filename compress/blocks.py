"""The repeated blocks of a decoder: which there are, and a forward through some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_BLOCK = "layer_types"
"""The setting that has an entry for each block, where a family has one."""


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model that `axes.check_axes` passed."""
    blocks = model.base_model.get_submodule("layers")
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@contextmanager
def running(model: PreTrainedModel, blocks: Sequence[int]) -> Iterator[None]:
    """Inside it the model's forward goes through these blocks only, in this order; its weights and names stay.

    Args:
        blocks: numbers from 0.
    """
    base: Any = model.base_model
    whole, config = blocks_of(model), base.config
    kinds = config.to_dict().get(PER_BLOCK)
    base.layers = nn.ModuleList(whole[block] for block in blocks)
    if kinds is not None:
        config.layer_types = [kinds[block] for block in blocks]
    try:
        yield
    finally:
        base.layers = whole
        if kinds is not None:
            config.layer_types = kinds
