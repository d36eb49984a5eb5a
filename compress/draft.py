"""A draft for speculative decoding: the architecture of its target shrunk, with the target's very tokens (FastDraft,
arXiv 2411.11055).

The draft is trained in three stages (`examples/draft.yaml`): on text, on text of its domain, and on text that the
target itself wrote, with the loss that its runtime rewards (`compress/align.py`). Here is where it starts: random
weights of a shape that follows from the target's. Runtimes refuse or silently misread a draft of other tokens, so rows
of the embedding that only pad the vocabulary are there as well, and special tokens are the target's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from edgewright.compress.draft_shape import BLOCKS, DraftShape
from edgewright.compress.shape import legal_multiples, refused
from edgewright.derived import Calibration, Derived, DerivedStudentConfig
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.recipe import Recipe, StageConfig

SHARE = 0.05
"""Of the target's parameters, where a recipe says nothing."""
CLOSE, FARTHEST = 1.25, 2.0
"""How far, as a factor, a draft may be from the parameters asked for: for the sake of larger blocks, and at all."""


class DraftStudentConfig(DerivedStudentConfig):
    """A draft of another model: its architecture shrunk, random weights, its tokens row by row (FastDraft,
    arXiv 2411.11055)."""

    type: Literal["draft"] = "draft"
    parameters: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Below 1 a share of the target's, else their number; null: 0.05, or what the sizes make."""
    num_hidden_layers: int | None = Field(default=None, gt=0)
    """null: one for eight of the target's, at most four; at equal parameters depth is what latency pays for."""
    hidden_size: int | None = Field(default=None, gt=0)
    """null: what makes the parameters."""
    intermediate_size: int | None = Field(default=None, gt=0)
    """null: in the target's proportion to the hidden size."""
    tie_word_embeddings: bool | None = None
    """Whether the head shares its weight with the embedding; null: as in the target."""
    multiple_of: Literal[1, 32, 64, 256] | None = None
    """What sizes are multiples of; null: the largest of 256, 64 and 32 with which the parameters are near."""

    @model_validator(mode="after")
    def _one_of_both(self) -> DraftStudentConfig:
        if self.parameters is not None and self.hidden_size is not None:
            raise ValueError("give parameters or hidden_size, not both: one follows from the other")
        return self

    @property
    def made(self) -> str:
        return "shrunk to a draft"

    def open_source(self, directory: Path, device: torch.device) -> PreTrainedModel:
        """The target's architecture, on meta: none of its weights goes into a draft."""
        from edgewright.preview import stored_architecture

        return stored_architecture(directory)

    def check(self, source: PreTrainedModel) -> PretrainedConfig:
        return self.architecture(source.config)

    def architecture(self, source: PretrainedConfig) -> PretrainedConfig:
        """The draft's configuration.

        Raises:
            RecipeError: EW-840, a size that cannot be, with the nearest that can; EW-841, it is no smaller than its
                target; EW-842, a family whose sizes are not known.
        """
        source = source.get_text_config()
        whole = count(source)
        try:
            found = self._config(source, self._shape(source, whole))
            parameters = count(found)
        except (AttributeError, ValueError, TypeError, ZeroDivisionError) as error:  # what transformers raises
            raise RecipeError(
                "EW-842",
                f"a model of this family cannot be {self.made}",
                expected="an architecture with one hidden size, heads, layers and MLP, as Llama, Qwen, Gemma or GPT-2",
                found=f"{source.model_type}: {str(error)[:200]}",
                fix="take a small model of the same tokenizer as the draft: {type: draft_vocabulary, ...}",
            ) from error
        if parameters >= whole:
            raise RecipeError(
                "EW-841",
                "a draft has to be smaller than its target",
                expected=f"fewer than {whole:,} parameters, as a rule less than a tenth",
                found=f"{parameters:,}: {DraftShape.of(found).text}",
                fix=f"parameters: {SHARE}, and no sizes",
            )
        return found

    def _config(self, source: PretrainedConfig, shape: DraftShape) -> PretrainedConfig:
        return shape.config(source, self.tie_word_embeddings)

    def _shape(self, source: PretrainedConfig, whole: int) -> DraftShape:
        """The shape that is asked for, or that comes nearest to the parameters."""
        target = DraftShape.of(source)
        layers = self.num_hidden_layers or target.usual_layers()
        if layers > target.num_hidden_layers:
            why = f"the target has {target.num_hidden_layers} layers"
            raise refused("EW-840", "num_hidden_layers", layers, why, range(1, target.num_hidden_layers + 1))
        if self.hidden_size is not None:
            return self._of_width(target, layers, self.hidden_size)
        asked = SHARE if self.parameters is None else self.parameters
        wanted = asked * whole if asked < 1 else asked

        @cache
        def parameters(hidden: int, *, block: int) -> int:
            return count(self._config(source, self._with_inner(target, hidden, layers, block)))

        found = []
        for block in (self.multiple_of,) if self.multiple_of else BLOCKS:
            hidden = _nearest_width(target, block, partial(parameters, block=block), wanted)
            if hidden is None:
                continue
            off = math.exp(abs(math.log(parameters(hidden, block=block) / wanted)))
            found.append((off, hidden, block))
            if off <= CLOSE:
                break
        if not found:
            legal = [target.step(block) for block in BLOCKS]
            raise refused(
                "EW-840", "hidden_size", target.hidden_size, "no width of the target's can be narrower", legal
            )
        off, hidden, block = min(found)
        if off > FARTHEST:
            raise self._too_far(asked, whole, parameters(hidden, block=block), layers)
        return self._with_inner(target, hidden, layers, block)

    def _of_width(self, target: DraftShape, layers: int, hidden: int) -> DraftShape:
        blocks = (self.multiple_of,) if self.multiple_of else BLOCKS
        step = target.step(blocks[-1])
        if hidden % step or hidden > target.hidden_size:
            why = f"it must be a multiple of {step} (whole heads, whole blocks) and at most the target's"
            legal = legal_multiples(step, target.hidden_size, step)
            raise refused("EW-840", "hidden_size", hidden, why, legal)
        block = next(block for block in blocks if hidden % target.step(block) == 0)
        return self._with_inner(target, hidden, layers, block)

    def _with_inner(self, target: DraftShape, hidden: int, layers: int, block: int) -> DraftShape:
        shape = target.shrunk(hidden_size=hidden, num_hidden_layers=layers, block=block)
        return shape if self.intermediate_size is None else replace(shape, inner=self._checked_inner())

    def _checked_inner(self) -> int:
        inner, block = self.intermediate_size, self.multiple_of or BLOCKS[-1]
        assert inner is not None
        if inner % block:
            legal = legal_multiples(block, inner + block, block)
            raise refused("EW-840", "intermediate_size", inner, f"it must be a multiple of {block}", legal)
        return inner

    def _too_far(self, asked: float, whole: int, found: int, layers: int) -> RecipeError:
        best = f"{found / whole:.3g}" if asked < 1 else f"{found}"
        return RecipeError(
            "EW-840",
            "no draft of this target has about so many parameters",
            expected=f"with {layers} layers the nearest that can be: {found:,}, {found / whole:.1%} of the target's",
            found=f"parameters: {asked:g}",
            fix=f"parameters: {best}, another num_hidden_layers, or multiple_of: 1",
        )

    def derive(self, source: PreTrainedModel, calibration: Calibration, seed: int) -> Derived:
        """Random weights, reproducible from the seed, by the family's own initialisation."""
        import torch
        from transformers import AutoModelForCausalLM

        from edgewright.student import WITHOUT_SDPA

        config, whole = self.architecture(source.config), count(source.config.get_text_config())
        torch.manual_seed(seed)
        attention = "eager" if config.model_type in WITHOUT_SDPA else "sdpa"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        shape = DraftShape.of(config)
        share = sum(parameter.numel() for parameter in model.parameters()) / whole
        record = {"share": share, "shape": shape.numbers(), "vocab_size": config.vocab_size}
        return Derived(model=model, record=record, summary=f"{share:.1%} of its target: {shape.text}")

    def notes(self, recipe: Recipe, stage: StageConfig, parameters: int) -> Iterator[str]:
        """Shape and share, where the target is a directory."""
        from edgewright.export.architecture import open_config

        if self.source.type == "checkpoint":
            target = open_config(self.source.model)
            whole = count(target.get_text_config())
            shape = DraftShape.of(self.architecture(target))
            yield f"draft: {parameters / whole:.1%} of its target's {whole:,} parameters, {shape.text}"


def count(config: PretrainedConfig) -> int:
    """Parameters of the model of a configuration, tied ones once. Nothing of their size is made."""
    from edgewright.preview import tied

    return sum(parameter.numel() for parameter in tied(config).parameters())


def _nearest_width(target: DraftShape, block: int, parameters: Callable[[int], int], wanted: float) -> int | None:
    """The width, at most the target's, whose parameters are nearest; they grow with it, so half of the rest is left
    out each time. None where no width is a multiple of the block."""
    step = target.step(block)
    low, high = 1, target.hidden_size // step
    if not high:
        return None
    while low < high:
        middle = (low + high) // 2
        if parameters(middle * step) < wanted:
            low = middle + 1
        else:
            high = middle
    around = [number * step for number in (low - 1, low) if number]
    return min(around, key=lambda hidden: abs(math.log(parameters(hidden) / wanted)))
