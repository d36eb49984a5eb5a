"""A transformers model taken apart for calibration: its decoder blocks, their linear layers, what flows into them.

Nothing here knows a family. The blocks are the one list of modules that has as many entries as the config has layers;
linear layers are `nn.Linear` and GPT-2's `Conv1D`; every block gets the arguments that the model itself gave it.

Shapes: sequences are `[count, length]` token ids without padding, run one at a time; hidden states are
`[count, length, hidden]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edgewright.errors import BadInput

Take = Callable[[str, Tensor], None]
"""Gets the name of a weight and the inputs `[..., in]` that its layer sees."""

BATCH = 8
"""Sequences that run at a time; the arguments of a block serve any number."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a block gets beside its hidden states; the same for every sequence of a length."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _Reached(Exception):
    """The place was reached; nothing behind it needs to run."""


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks, in order.

    Raises:
        BadInput: EW-552, the model is not built as one stack of blocks.
    """
    count = int(model.config.num_hidden_layers)
    lists = [
        module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    stacks = [stack for stack in lists if any(isinstance(part, nn.Linear | Conv1D) for part in stack.modules())]
    if len(stacks) != 1:
        raise BadInput(
            "EW-552",
            "calibration does not know how this model is built",
            expected=f"one list of {count} decoder blocks with linear layers",
            found=f"{len(stacks)} such lists in {type(model).__name__}",
            fix="export without --calibrate",
        )
    return list(stacks[0])


def linear_weights(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The linear layers inside a module by the state-dict name of their weight."""
    found = {name: part for name, part in module.named_modules(prefix=prefix) if isinstance(part, nn.Linear | Conv1D)}
    return {f"{name}.weight": part for name, part in found.items()}


def weight_layers(
    model: PreTrainedModel, blocks: Sequence[nn.Module], *, embedding: str, head: str
) -> dict[str, nn.Module]:
    """The layer of each linear weight of the blocks, of the token embedding and of the output head, by name."""
    ends = {head: model.get_output_embeddings(), embedding: model.get_input_embeddings()}
    prefixes = weight_prefixes(model, blocks)
    inner = [linear_weights(block, prefix) for block, prefix in zip(blocks, prefixes, strict=True)]
    return {name: layer for layers in (*inner, ends) for name, layer in layers.items()}


def weight_prefixes(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> list[str]:
    """What the state-dict names of each block's weights begin with."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as the layer stores it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def set_matrix(layer: nn.Module, values: np.ndarray) -> None:
    """Give a linear layer or an embedding the weight `[out, in]`."""
    with torch.no_grad():
        weight_of(layer).copy_(
            torch.from_numpy(np.ascontiguousarray(values.T if isinstance(layer, Conv1D) else values))
        )


def mean_squares(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], sequences: Tensor, *, embedding: str, head: str
) -> dict[str, np.ndarray]:
    """The mean square of each input column of each linear layer: float32 `[in]` by weight name.

    An embedding that is no head has none, nor has a layer that never runs.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def take(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        sums[name] = sums.get(name, 0) + (rows.double() ** 2).sum(dim=0)
        counts[name] = counts.get(name, 0) + len(rows)

    with inputs_taken({name: layer for name, layer in layers.items() if name not in (embedding, head)}, take):
        take(head, last_hidden(model, sequences))
    return {name: (value / counts[name]).float().numpy() for name, value in sums.items()}


@contextmanager
def inputs_taken(layers: Mapping[str, nn.Module], take: Take) -> Iterator[None]:
    """Show `take` what flows into these layers, while the context is open."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: take(name, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_arguments(model: PreTrainedModel, blocks: Sequence[nn.Module], sequence: Tensor) -> list[Arguments]:
    """What the model gives each of its blocks for a sequence of this length."""
    seen: list[Arguments] = []

    def note(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        inner = {name: value for name, value in named.items() if name != "hidden_states"}
        seen.append(Arguments(positional[1:] if "hidden_states" not in named else positional, inner))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        with torch.inference_mode():
            model.base_model(input_ids=sequence[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def first_hidden(model: PreTrainedModel, blocks: Sequence[nn.Module], sequences: Tensor) -> Tensor:
    """What flows into the first block."""
    found: list[Tensor] = []

    def stop(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(named["hidden_states"] if "hidden_states" in named else positional[0])
        raise _Reached

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for part in sequences.split(BATCH):
            try:
                with torch.inference_mode():
                    model.base_model(input_ids=part, use_cache=False)
            except _Reached:
                continue
    finally:
        handle.remove()
    return torch.cat(found)


def last_hidden(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """What flows into the output head."""
    with torch.inference_mode():
        return torch.cat(
            [model.base_model(input_ids=part, use_cache=False).last_hidden_state for part in sequences.split(BATCH)]
        )


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """One block on the hidden states `[1, length, hidden]` of one sequence."""
    with torch.inference_mode():
        output = block(hidden, *arguments.positional, **arguments.named)
    return output[0] if isinstance(output, tuple) else output


def inputs_of(block: nn.Module, layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """What one linear layer of a block sees, `[..., in]`; the rest of the block does not run."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        run_block(block, hidden, arguments)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def sharing(block: nn.Module, layers: Mapping[str, nn.Module], hidden: Tensor, arguments: Arguments) -> list[list[str]]:
    """The linear layers of a block in the order in which they run, those together that see the same inputs.

    A layer that does not run (an expert that no token chose) is in none of them.
    """
    groups: list[tuple[Tensor, list[str]]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for seen, names in groups:
                if seen is inputs[0]:
                    names.append(name)
                    return
            groups.append((inputs[0], [name]))

        return take

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        run_block(block, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in groups]
