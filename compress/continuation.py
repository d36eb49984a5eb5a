"""What models write after prompts: many at once, each at a temperature of its own, one model or the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgewright.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class Reader:
    """A model and what it has read."""

    model: PreTrainedModel
    dtype: torch.dtype
    past: Any = None

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Read further tokens; logits of the one that follows, float32 [B, V].

        Args:
            ids: [B, S] new ones; mask: [B, all so far], 0 at padding; positions: [B, S].
        """
        from edgewright.student import output_head

        output = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.past, use_cache=True
        )
        self.past = output.past_key_values
        return output_head(self.model, self.dtype)(output.last_hidden_state[:, -1].to(self.dtype))


@torch.no_grad()
def continue_prompts(
    models: Sequence[PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    names: Sequence[str],
    max_new_tokens: int,
    eos_id: int,
    vocab_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[list[int]]:
    """Let models continue a batch of prompts. Next-token logits are the mean of theirs.

    Args:
        prompts: B lists of ids, the start token first; none is empty.
        temperatures: of each prompt, 0: greedy.
        names: of each prompt, for errors.
        eos_id: ends a continuation; vocab_size: ids from it on are never written.
        generator: on the models' device.

    Returns:
        What was added to each, without the end token.

    Raises:
        BadInput: EW-783, a model says NaN or infinity after one of them.
    """
    device = generator.device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), eos_id, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padding stands on the left, so that all go on at the same column
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min_(0)
    heat = torch.tensor(list(temperatures), device=device, dtype=torch.float32)[:, None]
    readers = [Reader(model, dtype) for model in models]
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for number in range(max_new_tokens):
        logits = sum_of([reader.next_logits(ids, mask, positions)[:, :vocab_size] for reader in readers])
        _check_finite(logits, open_rows, names, number)
        chosen = choose(logits, heat, generator)
        open_rows &= chosen != eos_id
        for row in open_rows.nonzero()[:, 0].tolist():
            written[row].append(int(chosen[row]))
        if not bool(open_rows.any()):
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return written


def sum_of(logits: list[Tensor]) -> Tensor:
    """The mean over models, [B, V]."""
    total = logits[0]
    for other in logits[1:]:
        total = total + other
    return total / len(logits)


def choose(logits: Tensor, heat: Tensor, generator: torch.Generator | None) -> Tensor:
    """Greedy where the temperature is 0, drawn elsewhere; every row draws, so that no row's draws hang on others'."""
    probabilities = torch.softmax(logits / heat.clamp_min(1e-6), dim=-1)
    drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return torch.where(heat[:, 0] > 0, drawn, logits.argmax(-1))


def _check_finite(logits: Tensor, open_rows: Tensor, names: Sequence[str], number: int) -> None:
    """Refuse logits [B, V] that are not finite where a row is still written on, with the first prompt of which that is
    so and how many tokens were written after it."""
    bad = (open_rows & ~logits.isfinite().all(-1)).nonzero()
    if not len(bad):
        return
    raise BadInput(
        "EW-783",
        "the teacher's logits are not finite",
        where=f"prompt {names[int(bad[0])]}",
        expected="finite numbers for every token",
        found=f"NaN or infinity for new token {number + 1} after this prompt",
        fix="look at that prompt; hold the teacher in wider numbers (weights: fp32), or take another one",
    )
