"""A student grown from a smaller model: bert2BERT (arXiv 2110.07143), wider and deeper, with the same function or with
what the blocks above know; or G_stack (arXiv 2405.15319), the whole stack of blocks several times over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from edgewright.compress.shape import Shape, Sizes, check_changed, divided, legal_multiples, refused, with_sizes
from edgewright.derived import Calibration, Derived, DerivedStudentConfig
from edgewright.errors import BadInput, RecipeError, RecipeErrors
from edgewright.student import StageStudentConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.compress.axes import Place
    from edgewright.compress.widen import Widening
    from edgewright.recipe import Recipe, StageConfig

STACKED = 4
"""How often G_stack's paper stacks."""
LARGEST_SHARE = 0.05
"""Of the tokens after stacking: where the published rule asks for more before it, it is far from what it was fitted
to."""
USUAL_SHARE = 0.03
"""What is advised there."""
SAME = 1e-4
"""Largest difference of logits, relative to the largest one, with which a grown model still has the same function."""
SEEN_SEQUENCES = 2
"""That this is looked at on."""
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class GrownStudentConfig(Sizes, DerivedStudentConfig):
    """A larger model made of a smaller one, which it goes on from (bert2BERT, arXiv 2110.07143; G_stack,
    arXiv 2405.15319)."""

    type: Literal["grown"] = "grown"
    method: Literal["function_preserving", "advanced", "stack"] = "function_preserving"
    """function_preserving: the same logits, by copies of channels and heads that share what they are read with, and
    new blocks that add nothing yet; advanced: new channels come from the block above, new blocks from the top, another
    function that learns faster (bert2BERT); stack: the blocks several times over, four if no num_hidden_layers is given
    (G_stack)."""
    unevenness: float = Field(default=0.1, ge=0, lt=1)
    """How far the shares of copies are from even, so that the copies learn different things; the function stays."""

    @model_validator(mode="after")
    def _something(self) -> GrownStudentConfig:
        sizes = self.model_dump()
        widths = [name for name in SIZES if name != "num_hidden_layers" and sizes[name] is not None]
        if self.method == "stack" and widths:
            raise ValueError(f"stack repeats blocks and changes no width: remove {', '.join(widths)}")
        if self.method != "stack" and all(sizes[name] is None for name in SIZES):
            raise ValueError(f"nothing to grow: give at least one of {', '.join(SIZES)}")
        return self

    @property
    def made(self) -> str:
        return "grown"

    def architecture(self, source: PretrainedConfig) -> PretrainedConfig:
        """Errors: EW-763, all sizes that cannot be, each with the nearest that can."""
        before = Shape.of(source)
        shape = self.shape(before, source.model_type)
        return shape.config(source, [block.source for block in self.blocks(before, shape)])

    def shape(self, source: Shape, model_type: str) -> Shape:
        """The shape that is grown to; errors as `architecture`."""
        heads = self._heads(source)
        errors = [*self._too_small(source), *self._depth(source)]
        if heads is None:
            errors.append(self._wrong_heads(source))
        if errors:
            raise errors[0] if len(errors) == 1 else RecipeErrors(errors)
        assert heads is not None
        shape = with_sizes(source, self, heads)
        if self.method == "stack" and self.num_hidden_layers is None:
            shape = with_sizes(shape, Sizes(num_hidden_layers=STACKED * source.num_hidden_layers), heads)
        legal = {first for first, _ in self._head_choices(source, 4 * source.num_attention_heads)}
        errors = divided(shape, model_type, legal, "EW-763")
        if errors:
            raise errors[0]
        check_changed(source, shape, "EW-763", self.made)
        return shape

    def _too_small(self, source: Shape) -> Iterator[RecipeError]:
        for name in ("hidden_size", "intermediate_size"):
            asked, there = self.model_dump()[name], source.numbers()[name]
            if asked is None or asked == there:
                continue
            legal = [there, *legal_multiples(there + 1, max(asked, there) + 2 * self.multiple_of, self.multiple_of)]
            if asked < there:
                yield refused("EW-763", name, asked, f"the source has {there} already", legal)
            elif asked % self.multiple_of:
                yield refused("EW-763", name, asked, f"it must be a multiple of {self.multiple_of}", legal)

    def _depth(self, source: Shape) -> Iterator[RecipeError]:
        asked, there = self.num_hidden_layers, source.num_hidden_layers
        if asked is None:
            return
        if asked < there:
            yield refused("EW-763", "num_hidden_layers", asked, f"the source has {there} already", [there])
        elif self.method == "stack" and asked % there:
            legal = legal_multiples(there, asked + there, there)
            yield refused("EW-763", "num_hidden_layers", asked, f"stack repeats all of the {there} blocks", legal)

    def _head_choices(self, source: Shape, most: int) -> list[tuple[int, int]]:
        """(heads, key and value heads) in which every head of the source has a copy."""
        here = (source.num_attention_heads, source.num_key_value_heads)
        return [
            (on * pairs, pairs)
            for pairs in range(source.num_key_value_heads, most + 1)
            for on in range(1, most // pairs + 1)
            if pairs // source.num_key_value_heads * on >= source.group
            and ((on * pairs, pairs) == here or on * pairs * source.head_dim % self.multiple_of == 0)
        ]

    def _heads(self, source: Shape) -> tuple[int, int] | None:
        """(heads, key and value heads), with as many on each as there are now where that can be."""
        heads, pairs = self.num_attention_heads, self.num_key_value_heads
        if heads is None and pairs is None:
            return source.num_attention_heads, source.num_key_value_heads
        most = max(heads or 0, (pairs or 0) * source.group, source.num_attention_heads)
        fitting = [
            choice
            for choice in self._head_choices(source, most)
            if (heads is None or choice[0] == heads) and (pairs is None or choice[1] == pairs)
        ]
        return min(fitting, key=lambda choice: (abs(choice[0] // choice[1] - source.group), choice), default=None)

    def _wrong_heads(self, source: Shape) -> RecipeError:
        heads, pairs = self.num_attention_heads, self.num_key_value_heads
        asked = heads or (pairs or 1) * source.group
        near = sorted(
            self._head_choices(source, asked + 4 * source.num_attention_heads),
            key=lambda choice: (abs(choice[0] - asked), abs(choice[1] - (pairs or source.num_key_value_heads))),
        )[:3]
        return RecipeError(
            "EW-763",
            "the source cannot be grown to these heads",
            key="num_attention_heads",
            expected=f"at least {source.num_key_value_heads} key and value heads, a place for each of the "
            f"{source.num_attention_heads} heads on a copy of its own, and a multiple of {self.multiple_of} for heads "
            f"times {source.head_dim}; the nearest: " + "; ".join(f"{first} on {on}" for first, on in near),
            found=f"num_attention_heads {heads or 'not given'}, num_key_value_heads {pairs or 'not given'}",
            fix=f"num_attention_heads: {near[0][0]}, num_key_value_heads: {near[0][1]}",
        )

    def blocks(self, source: Shape, wanted: Shape) -> list[GrownBlock]:
        """What each block of the grown model is made of."""
        made = {"function_preserving": interleaved, "advanced": from_the_top, "stack": stacked}
        return made[self.method](source.num_hidden_layers, wanted.num_hidden_layers)

    def derive(self, source: PreTrainedModel, calibration: Calibration, seed: int) -> Derived:
        """Make it, and where the function is to stay look whether it did.

        Raises:
            BadInput: EW-764, it did not: the weights are too large for float32.
        """
        from edgewright.compress.widen import Widening

        shape = Shape.of(source.config)
        wanted = self.shape(shape, source.config.model_type)
        blocks = self.blocks(shape, wanted)
        tied = bool(source.config.tie_word_embeddings)
        widening = Widening(shape, wanted, unevenness=self.unevenness, tied=tied, seed=seed)
        grown = grow(source, wanted, blocks, widening, advanced=self.method == "advanced")
        difference = logit_difference(source, grown, calibration)
        if self.method == "function_preserving" and not difference <= SAME:
            raise BadInput(
                "EW-764",
                "the grown model does not compute what the source does",
                expected=f"logits within {SAME:g} of those of the source, relative to the largest",
                found=f"{difference:.3g}",
                fix="look for weights of the source that are far too large; or method: advanced",
            )
        return Derived(
            model=grown,
            record={
                "from": shape.numbers(),
                "to": wanted.numbers(),
                "blocks": [{"source": block.source, "adds_nothing": block.idle} for block in blocks],
                "copies": {
                    "hidden": widening.axes["hidden"].origin.tolist(),
                    "intermediate": widening.axes["ffn"].origin.tolist(),
                    "heads": widening.heads.origin.tolist(),
                    "key_value_heads": widening.pairs.origin.tolist(),
                },
                "logit_difference": difference,
            },
            summary=f"{wanted.text}; {self.method}; logits differ by {difference:.1e} of the largest",
        )

    def notes(self, recipe: Recipe, stage: StageConfig, parameters: int) -> Iterator[str]:
        """For `stack`: how long the small model should train before."""
        if self.method != "stack":
            return
        length = recipe.data.sequence_length
        tokens = _tokens(stage, length)
        advice = stacking_tokens(parameters, tokens)
        before = recipe.stage(self.source.stage) if isinstance(self.source, StageStudentConfig) else None
        trained = "" if before is None else f"; stage {before.name} trains for {_tokens(before, length):,}"
        yield f"stacking pays after about {advice.tokens:,} tokens of the small model ({advice.why}){trained}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrownBlock:
    """A block of a grown model."""

    source: int
    """The block that it is made of."""
    idle: bool = False
    """Whether its outputs are 0 at first, so that it adds nothing to the stream."""


def interleaved(there: int, wanted: int) -> list[GrownBlock]:
    """All blocks, and spread evenly after them copies that add nothing yet, as in LLaMA Pro (arXiv 2401.02415)."""
    extra = wanted - there
    found = []
    for block in range(there):
        found.append(GrownBlock(source=block))
        more = (block + 1) * extra // there - block * extra // there
        found += [GrownBlock(source=block, idle=True)] * more
    return found


def from_the_top(there: int, wanted: int) -> list[GrownBlock]:
    """bert2BERT: the stack as often as it fits, and what is left over from its top."""
    order = [*list(range(there)) * (wanted // there), *range(there - wanted % there, there)]
    return [GrownBlock(source=block) for block in order]


def stacked(there: int, wanted: int) -> list[GrownBlock]:
    """G_stack: block i is block i mod l."""
    return [GrownBlock(source=number % there) for number in range(wanted)]


def grow(
    source: PreTrainedModel, wanted: Shape, blocks: list[GrownBlock], widening: Widening, *, advanced: bool
) -> PreTrainedModel:
    """A new model, with memory of its own.

    Args:
        source: `axes.check_axes` passed it.
        advanced: whether new outputs of a block come from the block above it (the last one's from itself).
    """
    import torch

    from edgewright.compress.cut import assembled
    from edgewright.compress.widen import WRITERS

    state, last = source.state_dict(), Shape.of(source.config).num_hidden_layers - 1
    config = wanted.config(source.config, [block.source for block in blocks])

    def part(place: Place) -> Tensor:
        if place.block is None:
            return widening.widened(place, state[place.name]).to(source.dtype)
        block = blocks[place.block]
        above = state[place.in_block(min(block.source + 1, last))] if advanced and "norm" not in place.kind else None
        value = widening.widened(place, state[place.in_block(block.source)], above).to(source.dtype)
        return torch.zeros_like(value) if block.idle and place.kind in WRITERS else value

    return assembled(config, part, like=source)


def logit_difference(source: PreTrainedModel, grown: PreTrainedModel, calibration: Calibration) -> float:
    """Largest difference of two models' logits on a little text, relative to the largest logit of the first."""
    import torch

    from edgewright.student import hidden_states, output_head

    worst = 0.0
    with torch.no_grad():
        for inputs in calibration.inputs(SEEN_SEQUENCES):
            before, after = (output_head(model.eval())(hidden_states(model, inputs)) for model in (source, grown))
            difference = float((before - after).abs().max() / before.abs().max())
            worst = difference if not difference <= worst else worst  # NaN stays
    return worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """How long to train a model before it is stacked."""

    tokens: int
    why: str


def published_rule(parameters: float, tokens: float) -> float:
    """log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, C = 6 N D: tokens before stacking (arXiv 2405.15319, eq. 3).

    Args:
        parameters: N, of the grown model.
        tokens: D, that it is trained on.
    """
    compute = 6 * parameters * tokens
    exponent = 0.88 * math.log10(parameters) + 163.27 / math.log10(compute) - 5.74
    return math.inf if exponent > 300 else float(10**exponent)


def stacking_tokens(parameters: int, tokens: int) -> Advice:
    """Tokens that the small model should train for.

    The published rule was fitted to models of hundreds of millions of parameters and more; for small ones it asks for
    more tokens than the whole run has (9.9 of 10 billion for N = 100M). There 3 % of the run are advised.
    """
    rule = published_rule(parameters, tokens)
    if rule <= LARGEST_SHARE * tokens:
        return Advice(tokens=round(rule), why="the published rule")
    told = f"{rule:,.0f}" if rule < 1e15 else "more than there are"
    return Advice(
        tokens=max(1, round(USUAL_SHARE * tokens)),
        why=f"{USUAL_SHARE:.0%} of the tokens after it; the published rule, which is for larger models, says {told}",
    )


def _tokens(stage: StageConfig, sequence_length: int) -> int:
    per_step = stage.training.tokens_per_step(sequence_length)
    return stage.budget.steps(per_step) * per_step
