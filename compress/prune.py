"""A student pruned from a larger model: width by activations (Minitron, arXiv 2407.14679), depth by block influence
(ShortGPT, arXiv 2403.03853), by how little a run of blocks does (arXiv 2403.17887), or by the loss without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from edgewright.compress.shape import Shape, Sizes, check_changed, divided, legal_multiples, refused, with_sizes
from edgewright.derived import Calibration, Derived, DerivedStudentConfig
from edgewright.errors import RecipeError, RecipeErrors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.compress.cut import Kept
    from edgewright.compress.importance import Importance


class PrunedSizes(Sizes):
    """Sizes that a model can be pruned to."""

    def pruned_shape(self, source: Shape, model_type: str) -> Shape:
        """The shape that is left of a source.

        Raises:
            RecipeErrors: EW-762, all sizes that cannot be, each with the nearest that can.
        """
        errors = [*self._unlike(source), *self.depth_errors(source)]
        heads = self._heads(source)
        if heads is None:
            errors.append(self._wrong_heads(source, self.num_attention_heads or source.num_attention_heads))
        if errors:
            raise errors[0] if len(errors) == 1 else RecipeErrors(errors)
        assert heads is not None
        shape = with_sizes(source, self, heads)
        errors = divided(shape, model_type, [first for first, _ in head_choices(source, self.multiple_of)], "EW-762")
        if errors:
            raise errors[0]
        return shape

    def depth_errors(self, source: Shape) -> Iterator[RecipeError]:
        """More blocks than there are."""
        asked, there = self.num_hidden_layers, source.num_hidden_layers
        if asked is not None and asked > there:
            why = f"the source has {there} blocks"
            yield refused("EW-762", "num_hidden_layers", asked, why, range(1, there + 1))

    def _unlike(self, source: Shape) -> Iterator[RecipeError]:
        """Hidden and intermediate sizes that are too large, or no multiples."""
        for name in ("hidden_size", "intermediate_size"):
            asked, there = self.model_dump()[name], source.numbers()[name]
            if asked is None or asked == there:
                continue
            legal = [*legal_multiples(1, there - 1, self.multiple_of), there]
            if asked > there:
                yield refused("EW-762", name, asked, f"the source has {there}", legal)
            elif asked % self.multiple_of:
                yield refused("EW-762", name, asked, f"it must be a multiple of {self.multiple_of}", legal)

    def _heads(self, source: Shape) -> tuple[int, int] | None:
        """(heads, key and value heads), as few of the latter as must go; None where they cannot be."""
        heads, pairs = self.num_attention_heads, self.num_key_value_heads
        fitting = [
            choice
            for choice in head_choices(source, self.multiple_of)
            if (heads is None or choice[0] == heads) and (pairs is None or choice[1] == pairs)
        ]
        return max(fitting, key=lambda choice: (choice[1], choice[0]), default=None)

    def _wrong_heads(self, source: Shape, asked: int) -> RecipeError:
        pairs = self.num_key_value_heads
        near = sorted(
            head_choices(source, self.multiple_of),
            key=lambda choice: (abs(choice[0] - asked), abs(choice[1] - (pairs or choice[1]))),
        )[:3]
        return RecipeError(
            "EW-762",
            "the source cannot be pruned to these heads",
            key="num_attention_heads",
            expected=f"{source.num_key_value_heads} or fewer key and value heads, {source.group} or fewer heads on "
            f"each, and a multiple of {self.multiple_of} for heads times {source.head_dim}; the nearest: "
            + "; ".join(f"{heads} on {on}" for heads, on in near),
            found=f"num_attention_heads {asked}, num_key_value_heads {pairs if pairs is not None else 'not given'}",
            fix=f"num_attention_heads: {near[0][0]}, num_key_value_heads: {near[0][1]}",
        )


class PrunedStudentConfig(PrunedSizes, DerivedStudentConfig):
    """A smaller model made of the parts of a larger one that matter most on the run's own text (Minitron,
    arXiv 2407.14679).

    Hidden channels are kept alike in the whole model, heads and intermediate channels in each block by themselves.
    """

    type: Literal["pruned"] = "pruned"
    depth: Literal["contiguous", "block_influence", "loss"] = "contiguous"
    """Which blocks go: the neighbours over which hidden states turn least; those that by themselves turn them least
    (ShortGPT); or the neighbours without which the loss is lowest."""
    layers: tuple[int, ...] | None = None
    """The blocks that stay, by number from 0, in the place of `depth` and `num_hidden_layers`."""
    calibration_sequences: int = Field(default=256, gt=0)
    """Training sequences that importance is measured on."""
    sort: bool = False
    """Put what matters most first, so that the first channels of the student are a good network by themselves: a start
    for `elastic` (Flextron, arXiv 2406.10260). With the sizes left as they are the function stays the same."""

    @model_validator(mode="after")
    def _one_depth(self) -> PrunedStudentConfig:
        if self.layers is not None and self.num_hidden_layers is not None:
            raise ValueError("give one of layers, which names the blocks that stay, and num_hidden_layers")
        sizes = self.model_dump(exclude={"multiple_of"})
        if self.layers is None and not self.sort and all(sizes[name] is None for name in SIZES):
            raise ValueError(f"nothing to prune: give at least one of {', '.join(SIZES)}, layers, or sort: true")
        return self

    @property
    def made(self) -> str:
        return "pruned"

    def architecture(self, source: PretrainedConfig) -> PretrainedConfig:
        """Errors: EW-762, all sizes that cannot be, each with the nearest that can."""
        shape = self.shape(Shape.of(source), source.model_type)
        blocks = range(shape.num_hidden_layers) if self.layers is None else self.layers
        return shape.config(source, list(blocks))

    def shape(self, source: Shape, model_type: str) -> Shape:
        """The shape that is left; errors as `architecture`."""
        shape = self.pruned_shape(source, model_type)
        if self.layers is not None:
            shape = replace(shape, num_hidden_layers=len(self.layers))
        if not self.sort:
            check_changed(source, shape, "EW-762", self.made)
        return shape

    def depth_errors(self, source: Shape) -> Iterator[RecipeError]:
        """Blocks that are not there."""
        yield from super().depth_errors(source)
        if self.layers is None:
            return
        there = source.num_hidden_layers
        wrong = sorted({block for block in self.layers if not 0 <= block < there})
        legal = sorted({block for block in self.layers if 0 <= block < there}) or range(there)
        if wrong or list(self.layers) != sorted(set(self.layers)) or not self.layers:
            yield RecipeError(
                "EW-762",
                "layers names blocks that cannot be kept",
                key="layers",
                expected=f"numbers from 0 to {there - 1}, each once, in their order",
                found=f"{', '.join(map(str, wrong))}, which are not there" if wrong else list(self.layers),
                fix=f"layers: [{', '.join(map(str, legal))}]",
            )

    def derive(self, source: PreTrainedModel, calibration: Calibration, seed: int) -> Derived:
        """Measure, choose, cut; deterministic in the text."""
        from edgewright.compress.cut import cut
        from edgewright.compress.importance import losses_without, measure

        shape = Shape.of(source.config)
        wanted = self.shape(shape, source.config.model_type)
        gone = shape.num_hidden_layers - wanted.num_hidden_layers
        found = measure(source, calibration.inputs(self.calibration_sequences), span=max(1, gone))
        without = None
        if gone and self.depth == "loss" and self.layers is None:
            without, _ = losses_without(source, lambda: calibration.inputs(self.calibration_sequences), span=gone)
        blocks = self._kept_blocks(found, gone, without)
        kept = choose(found, shape, wanted, blocks, sort=self.sort)
        return Derived(
            model=cut(source, kept),
            record={
                "from": shape.numbers(),
                "to": wanted.numbers(),
                "calibration": {"sequences": found.sequences, "tokens": found.tokens},
                "kept": kept.record(),
                "importance": {
                    "block_influence": found.influence.tolist(),
                    "spans": found.spans.tolist() if gone else None,
                    "losses_without": None if without is None else without.tolist(),
                    "kept_share": kept_share(found, kept),
                },
            },
            summary=f"{wanted.text}; blocks {', '.join(map(str, blocks))}; seen on {found.tokens:,} tokens",
        )

    def _kept_blocks(self, found: Importance, gone: int, without: Tensor | None) -> list[int]:
        number = len(found.influence)
        if self.layers is not None:
            return list(self.layers)
        if not gone:
            return list(range(number))
        if self.depth == "block_influence":
            return sorted(ranking(found.influence)[: number - gone])
        least = found.spans if without is None else without
        start = ranking(-least)[0]
        return [block for block in range(number) if not start <= block < start + gone]


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def head_choices(source: Shape, multiple_of: int) -> list[tuple[int, int]]:
    """Every (heads, key and value heads) that the heads of a source can be pruned to: as many on each as on any."""
    here = (source.num_attention_heads, source.num_key_value_heads)
    return [
        (on * pairs, pairs)
        for pairs in range(1, source.num_key_value_heads + 1)
        for on in range(1, source.group + 1)
        if (on * pairs, pairs) == here or (on * pairs * source.head_dim) % multiple_of == 0
    ]


def ranking(scores: Tensor) -> list[int]:
    """Indices from the highest score to the lowest; the earlier one of equals first."""
    import torch

    order: list[int] = torch.argsort(-scores, stable=True).tolist()
    return order


def choose(found: Importance, source: Shape, wanted: Shape, blocks: list[int], *, sort: bool) -> Kept:
    """The parts of a decoder that matter most.

    Key and value heads are ranked by the sum over their query heads, then the query heads of each that stays.

    Args:
        blocks: those that stay.
        sort: in the order of their importance, else in the order of the source.
    """
    import torch

    from edgewright.compress.cut import Kept, KeptBlock

    def best(scores: Tensor, count: int) -> list[int]:
        top = ranking(scores)[:count]
        return top if sort else sorted(top)

    def block(number: int) -> KeptBlock:
        by_pair = found.heads[number].view(source.num_key_value_heads, source.group)
        pairs = best(by_pair.sum(1), wanted.num_key_value_heads)
        heads = [pair * source.group + head for pair in pairs for head in best(by_pair[pair], wanted.group)]
        return KeptBlock(
            block=number,
            heads=torch.tensor(heads),
            key_value_heads=torch.tensor(pairs),
            ffn=torch.tensor(best(found.ffn[number], wanted.intermediate_size)),
        )

    return Kept(
        hidden=torch.tensor(best(found.hidden, wanted.hidden_size)), blocks=tuple(block(number) for number in blocks)
    )


def kept_share(found: Importance, kept: Kept) -> dict[str, float]:
    """How much of the importance stays, by kind, over the blocks that stay."""

    def share(kind: Tensor, chosen: list[Tensor]) -> float:
        whole = sum(float(kind[block.block].sum()) for block in kept.blocks)
        part = sum(float(kind[block.block][index].sum()) for block, index in zip(kept.blocks, chosen, strict=True))
        return part / whole if whole else 1.0

    return {
        "hidden": float(found.hidden[kept.hidden].sum() / found.hidden.sum()),
        "heads": share(found.heads, [block.heads for block in kept.blocks]),
        "intermediate": share(found.ffn, [block.ffn for block in kept.blocks]),
    }
