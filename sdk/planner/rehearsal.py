"""A batch of a stage that trains nothing, for real: its teachers as they are held, tokens at random, nothing kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from edgewright.compress.cache_config import CacheStageConfig
    from edgewright.compress.generate_config import GenerateStageConfig
    from edgewright.recipe import Recipe

NEW_TOKENS = 16
"""That are written for the time of one."""


def rehearsal_of(
    recipe: Recipe, stage: CacheStageConfig | GenerateStageConfig, vocab_size: int, decisions: dict[str, Any]
) -> Callable[[], float]:
    """Open the teachers of a stage; what is returned carries out a batch and says how many seconds that takes.

    Args:
        vocab_size: of the data's tokenizer; tokens are drawn from it.
        decisions: device and compute type.

    Raises:
        EdgewrightError: as opening the teachers.
    """
    if stage.type == "cache":
        return _reading(recipe, stage, vocab_size, decisions)
    return _writing(recipe, stage, vocab_size, decisions)


def _reading(
    recipe: Recipe, stage: CacheStageConfig, vocab_size: int, decisions: dict[str, Any]
) -> Callable[[], float]:
    from edgewright.compress.cache import CacheKey
    from edgewright.compress.cache_stage import encoded, layout_of
    from edgewright.compress.teacher_notes import smallest_vocabulary
    from edgewright.planner.probe import random_batches
    from edgewright.trainer import model_inputs

    device, dtype = torch.device(decisions["device"]), getattr(torch, decisions["precision"])
    batches = random_batches(recipe, vocab_size, stage.per_device_batch_size)
    key = CacheKey(tokens="", tokenizer="", sequence_length=0, restart_at_documents=True)  # of no cache
    source = stage.teacher.build({}, key)
    source.prepare(None, device)
    layout = layout_of(stage, smallest_vocabulary(stage.teachers, {}))
    generator = torch.Generator(device).manual_seed(recipe.seed)

    def batch() -> float:
        started = time.perf_counter()
        inputs = model_inputs(batches.rows(list(range(stage.per_device_batch_size))), device)
        targets, tokens = source.targets(inputs, dtype), inputs.input_ids.numel()
        for _ in encoded(targets, tokens, layout, stage.temperature, generator):
            pass
        return time.perf_counter() - started

    return batch


def _writing(
    recipe: Recipe, stage: GenerateStageConfig, vocab_size: int, decisions: dict[str, Any]
) -> Callable[[], float]:
    from edgewright.compress.continuation import continue_prompts
    from edgewright.compress.teacher import open_frozen
    from edgewright.planner.written import plan_written

    device, dtype = torch.device(decisions["device"]), getattr(torch, decisions["precision"])
    written = plan_written(recipe, stage, vocab_size)
    rows, new = min(stage.per_device_batch_size, written.texts), written.new_tokens
    models = [open_frozen(teacher.directory({}), teacher.weights, device) for teacher in stage.teachers]
    generator = torch.Generator(device).manual_seed(recipe.seed)
    numbers = torch.Generator().manual_seed(recipe.seed)

    def seconds(prompt: int, tokens: int) -> float:
        """Of reading prompts of a length and writing so many tokens after them."""
        prompts = torch.randint(vocab_size, (rows, prompt), generator=numbers).tolist()
        started = time.perf_counter()
        continue_prompts(
            models,
            prompts,
            [1.0] * rows,
            names=[""] * rows,
            max_new_tokens=tokens,
            eos_id=-1,  # all write on to the end
            vocab_size=vocab_size,
            dtype=dtype,
            generator=generator,
        )
        return time.perf_counter() - started

    def batch() -> float:
        """Prompts as long as those of the stage are read; a token in the middle stands for all that are written."""
        first = seconds(round(written.prompt_tokens), 1)
        if new == 1:
            return first
        middle, some = round(written.prompt_tokens + new / 2), min(new, NEW_TOKENS)
        read, wrote = seconds(middle, 1), seconds(middle, some)
        return first + max(0.0, wrote - read) / max(1, some - 1) * (new - 1)

    return batch
