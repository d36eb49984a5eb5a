"""Losses of hidden states as an objective uses them: what they record of both models, what trains with the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgewright.chunked import Head, chunked_loss, cross_entropy_rule
from edgewright.compress.feature_decoder import FeatureDecoder, HiddenTokens, Masking
from edgewright.compress.hidden_losses import Projection, check_heads, relation_loss, weighted_mse
from edgewright.compress.recording import Recorder, Wanted
from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from edgewright.objective import ModelInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What losses of hidden states ask of an architecture."""

    layers: int
    hidden: int
    heads: int
    query: int
    """Width of all queries together."""
    key: int
    """Of all keys, and of all values."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """From a Hugging Face configuration."""
        values = config.get_text_config().to_dict()
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        size = values.get("head_dim") or hidden // heads
        key_heads = values.get("num_key_value_heads") or heads
        return cls(
            layers=values["num_hidden_layers"], hidden=hidden, heads=heads, query=heads * size, key=key_heads * size
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A micro-batch as losses of hidden states see it."""

    student: Recorder
    teacher: Recorder
    hidden: Tensor
    """[B, S, H] last hidden states of the student."""
    head: Head
    inputs: ModelInputs
    weights: Tensor
    """[B, S] float32: `scale` where a token is counted, else 0."""
    scale: float
    dtype: torch.dtype


class HiddenLoss(ABC):
    """A loss of hidden states. `fit` comes first."""

    of_student = Wanted()
    of_teacher = Wanted()

    @abstractmethod
    def fit(self, student: Shape, teacher: Shape, where: str) -> nn.Module | None:
        """Settle what is recorded, and make what trains beside the student.

        Args:
            where: the loss's place in the recipe, for messages.

        Raises:
            RecipeError: EW-785, a layer that does not exist, or heads that do not divide.
        """

    def view(self, inputs: ModelInputs) -> ModelInputs:
        """What the student sees of a micro-batch."""
        return inputs

    @abstractmethod
    def value(self, seen: Seen) -> Tensor:
        """The loss, summed over tokens with their weights; with gradient."""


class MiniLM(HiddenLoss):
    """`minilm` of queries, keys and values of one layer each, averaged over the three."""

    def __init__(self, student_layer: int | None, teacher_layer: int | None, heads: int | None) -> None:
        self.layers = (student_layer, teacher_layer)
        self.wanted_heads = heads

    def fit(self, student: Shape, teacher: Shape, where: str) -> None:
        self._student, self._teacher = (
            check_layer(layer or shape.layers, 1, shape.layers, f"{where}.{key}")
            for layer, shape, key in zip(
                self.layers, (student, teacher), ("student_layer", "teacher_layer"), strict=True
            )
        )
        self.heads = self.wanted_heads or student.heads
        widths = student.query, student.key, teacher.query, teacher.key
        check_heads(self.heads, *widths, where=f"{where}.relation_heads")
        self.of_student = Wanted(attention=frozenset({self._student}))
        self.of_teacher = Wanted(attention=frozenset({self._teacher}))

    def value(self, seen: Seen) -> Tensor:
        ours, theirs = seen.student.attention(self._student), seen.teacher.attention(self._teacher)
        mask = seen.inputs.attention_mask
        found = [relation_loss(s, t, self.heads, mask, seen.weights) for s, t in zip(ours, theirs, strict=True)]
        return torch.stack(found).mean()


class TinyBert(HiddenLoss):
    """`tinybert` of mapped layers, averaged over them, through one learned projection."""

    def __init__(self, layers: Sequence[tuple[int, int]] | None) -> None:
        self.layers = None if layers is None else list(layers)

    def fit(self, student: Shape, teacher: Shape, where: str) -> nn.Module:
        self._pairs = self.layers if self.layers is not None else _uniform(student.layers, teacher.layers, where)
        for index, (ours, theirs) in enumerate(self._pairs):
            check_layer(ours, 0, student.layers, f"{where}.layers.{index}, the student's")
            check_layer(theirs, 0, teacher.layers, f"{where}.layers.{index}, the teacher's")
        self.of_student = Wanted(hidden=frozenset(ours for ours, _ in self._pairs))
        self.of_teacher = Wanted(hidden=frozenset(theirs for _, theirs in self._pairs))
        self._projection = Projection(student.hidden, teacher.hidden)
        return self._projection

    def value(self, seen: Seen) -> Tensor:
        found = [
            weighted_mse(self._projection(seen.student.hidden(ours)), seen.teacher.hidden(theirs), seen.weights)
            for ours, theirs in self._pairs
        ]
        return torch.stack(found).mean()


class Had(HiddenLoss):
    """Feature alignment on what the student sees, and reconstruction of what it does not."""

    def __init__(self, *, mask_ratio: float, span: int, reconstruction: float) -> None:
        self.masking = Masking(mask_ratio, span)
        self.reconstruction = reconstruction
        self._hidden: HiddenTokens | None = None
        self._module: nn.ModuleDict

    def fit(self, student: Shape, teacher: Shape, where: str) -> nn.Module:
        self.of_teacher = Wanted(last=True)
        self._module = nn.ModuleDict({"projection": Projection(student.hidden, teacher.hidden)})
        if self.reconstruction:
            self._module["decoder"] = FeatureDecoder(student.hidden, student.heads)
        return self._module

    def view(self, inputs: ModelInputs) -> ModelInputs:
        self._hidden = self.masking.draw(inputs)
        return self.masking.without(inputs, self._hidden)

    def value(self, seen: Seen) -> Tensor:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "the student's forward comes first"
        weights = seen.weights * hidden.mask.logical_not() / (1.0 - self.masking.ratio)
        loss = weighted_mse(self._module["projection"](seen.hidden), seen.teacher.last(), weights)
        if not self.reconstruction:
            return loss
        decoded = self._module["decoder"](seen.hidden, hidden, seen.inputs)
        rule = cross_entropy_rule(hidden.labels(seen.inputs.input_ids).flatten(), seen.scale / self.masking.ratio)
        found = chunked_loss(decoded.flatten(0, 1), seen.head, rule, parts=1, dtype=seen.dtype)[0]
        return loss + self.reconstruction * found


def check_layer(layer: int, first: int, last: int, where: str) -> int:
    """The layer, if it exists (EW-785)."""
    if first <= layer <= last:
        return layer
    raise RecipeError(
        "EW-785", "this layer does not exist", where=where, expected=f"a layer from {first} to {last}", found=layer
    )


def _uniform(student: int, teacher: int, where: str) -> list[tuple[int, int]]:
    """Layer i of the student and i n of the teacher, n = L_t / L_s; 0 are the embeddings."""
    if teacher % student:
        raise RecipeError(
            "EW-785",
            "the layers cannot be mapped evenly",
            where=f"{where}.layers",
            expected=f"a teacher of a multiple of the student's {student} layers, or pairs of a student's layer "
            f"(0 to {student}) and a teacher's (0 to {teacher})",
            found=f"{teacher} layers of the teacher",
            fix=f"layers: [[{student}, {teacher}]], or more such pairs",
        )
    return [(layer, layer * (teacher // student)) for layer in range(student + 1)]
