"""How much the channels, heads and blocks of a decoder matter, seen by a forward over calibration text.

Minitron (arXiv 2407.14679): from what enters a pruned dimension, a[b, t, i] of sequence b, token t, channel i,

    score_i = sqrt( sum_b ( mean_t |a[b, t, i]| )^2 ),

for hidden channels on the output of every norm, summed over the norms, so that there is one ranking for the residual
stream; for heads on the 2-norm over a head's part of what enters the output projection; for intermediate channels on
what enters the down projection. Blocks by ShortGPT's influence (arXiv 2403.03853), 1 - mean_t cos(h_in, h_out).

What comes after the last learned token of a sequence, as padding does, has no say: nothing that is learned hangs on it.
Nothing but sums is kept, in float64: memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.chunked import IGNORED
from edgewright.compress.blocks import blocks_of, running
from edgewright.compress.shape import Shape
from edgewright.student import hidden_states, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.objective import ModelInputs

See = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Scores of a decoder of L blocks; the larger, the more it matters. All float64, on the CPU."""

    hidden: Tensor
    """[H]"""
    heads: Tensor
    """[L, A]"""
    ffn: Tensor
    """[L, F]"""
    influence: Tensor
    """[L], of single blocks."""
    spans: Tensor
    """[L - n + 1], of every n neighbouring blocks together: 1 - mean cos over the span (arXiv 2403.17887)."""
    tokens: int
    sequences: int


class _Places:
    """Which places of the micro-batch that runs are looked at."""

    seen: Tensor
    """bool [B, S]"""

    def look_at(self, labels: Tensor) -> None:
        """Those up to the last label that counts, in every row."""
        self.seen = (labels != IGNORED).flip(1).int().cummax(1).values.flip(1).bool()


class _Sums:
    """sum_b (mean_t |a|)^2 for every channel of something."""

    def __init__(self, size: int, places: _Places) -> None:
        self.total = torch.zeros(size, dtype=torch.float64)
        self.places = places

    def add(self, activation: Tensor) -> None:
        """activation: [B, S, size]."""
        seen = self.places.seen
        sums = activation.detach().abs().mul(seen[..., None]).sum(1, dtype=torch.float64)
        self.total += (sums / seen.sum(1, keepdim=True).clamp_min(1)).square().sum(0).cpu()

    def score(self) -> Tensor:
        return self.total.sqrt()


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Iterable[ModelInputs], *, span: int) -> Importance:
    """Run a model over calibration text, and score all of its parts.

    Args:
        model: `axes.check_axes` passed it; it is put into evaluation mode.
        batches: micro-batches on the model's device.
        span: n, how many neighbouring blocks are scored together, at least 1.
    """
    shape, blocks = Shape.of(model.config), blocks_of(model)
    places = _Places()
    norms = [_Sums(shape.hidden_size, places) for _ in range(2 * len(blocks) + 1)]
    heads = [_Sums(shape.num_attention_heads, places) for _ in blocks]
    ffn = [_Sums(shape.intermediate_size, places) for _ in blocks]
    alone, together = (torch.zeros(len(blocks) - n + 1, dtype=torch.float64) for n in (1, span))
    states: list[Tensor] = []

    def by_head(activation: Tensor) -> Tensor:
        return activation.unflatten(-1, (shape.num_attention_heads, shape.head_dim)).norm(dim=-1)

    model.eval()
    tokens = sequences = 0
    with _watching() as watch:
        base: Any = model.base_model
        for number, block in enumerate(blocks):
            watch(block, before=states.append)
            watch(block.get_submodule("input_layernorm"), after=norms[2 * number].add)
            watch(block.get_submodule("post_attention_layernorm"), after=norms[2 * number + 1].add)
            watch(block.get_submodule("self_attn.o_proj"), before=lambda x, n=number: heads[n].add(by_head(x)))
            watch(block.get_submodule("mlp.down_proj"), before=ffn[number].add)
        watch(base.norm, before=states.append, after=norms[-1].add)
        for inputs in batches:
            states.clear()
            places.look_at(inputs.labels)
            hidden_states(model, inputs)
            alone += _distances(states, 1, places.seen)
            together += _distances(states, span, places.seen)
            tokens += int(places.seen.sum())
            sequences += len(inputs.input_ids)
    states.clear()
    return Importance(
        hidden=torch.stack([norm.score() for norm in norms]).sum(0),
        heads=torch.stack([head.score() for head in heads]),
        ffn=torch.stack([each.score() for each in ffn]),
        influence=alone / tokens,
        spans=together / tokens,
        tokens=tokens,
        sequences=sequences,
    )


def _distances(states: list[Tensor], span: int, seen: Tensor) -> Tensor:
    """sum_t 1 - cos(h_l, h_{l + span}) over the places that are seen, for every l: float64 [L - span + 1]."""
    return torch.stack(
        [
            (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).mul(seen).sum(dtype=torch.float64).cpu()
            for before, after in zip(states, states[span:], strict=False)
        ]
    )


@torch.no_grad()
def losses_without(
    model: PreTrainedModel, batches: Callable[[], Iterable[ModelInputs]], *, span: int
) -> tuple[Tensor, float]:
    """Cross-entropy when `span` neighbouring blocks are left out, for every place where they may begin.

    Args:
        batches: gives the same micro-batches each time.

    Returns:
        (float64 [L - span + 1], that of the whole model), nats per token.
    """
    number = len(blocks_of(model))
    model.eval()
    found = []
    for start in range(number - span + 1):
        with running(model, [block for block in range(number) if not start <= block < start + span]):
            found.append(_loss(model, batches()))
    return torch.tensor(found, dtype=torch.float64), _loss(model, batches())


def _loss(model: PreTrainedModel, batches: Iterable[ModelInputs]) -> float:
    from edgewright.chunked import chunked_loss, cross_entropy_rule

    nats, counted = 0.0, 0
    for inputs in batches:
        labels = inputs.labels.flatten()
        rule = cross_entropy_rule(labels, 1.0)
        loss, _ = chunked_loss(hidden_states(model, inputs), output_head(model), rule, parts=1, dtype=torch.float32)
        nats += float(loss)
        counted += int((labels != IGNORED).sum())
    return nats / max(1, counted)


@contextmanager
def _watching() -> Iterator[Callable[..., None]]:
    """Gives a function that shows what enters or leaves a module to others, until the block ends."""
    handles = []

    def watch(module: nn.Module, *, before: See | None = None, after: See | None = None) -> None:
        if before is not None:
            handles.append(module.register_forward_pre_hook(_on_input(before)))
        if after is not None:
            handles.append(module.register_forward_hook(_on_output(after)))

    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _on_input(see: See) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(inputs[0])

    return hook


def _on_output(see: See) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(output)

    return hook
