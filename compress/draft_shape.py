"""The sizes of a draft: those of its target shrunk, in any family that transformers builds from a configuration.

Head size, vocabulary (padding rows included), positions, special tokens and all settings of the family stay. Depth is
what the latency of a draft pays for, so it is small first; width gives the parameters (FastDraft, arXiv 2411.11055).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INNER = ("intermediate_size", "ffn_dim", "n_inner")
"""What families call the width of their MLP; where it is null it is four times the hidden size."""
PER_LAYER = ("layer_types", "no_rope_layers", "attention_layers")
"""Settings with an entry for each layer."""
AS_WIDE_AS_HIDDEN = ("word_embed_proj_dim",)
"""OPT's projection between embedding and blocks, which only its smallest model has."""
BLOCKS = (256, 64, 32)
"""Columns of the blocks of file formats: ternary ones and K-quants of GGUF; 2 bits; 4 and 8 bits."""
DEEPEST, TARGET_LAYERS_PER_LAYER = 4, 8
"""Layers of a draft where a recipe does not say: one for eight of the target's, at most four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape:
    """Sizes of a decoder under transformers' common names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    inner: int | None
    """Width of the MLP; None: four times the hidden size."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> DraftShape:
        """That of a configuration; AttributeError where it has no such sizes."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        settings = config.to_dict()
        return cls(
            hidden_size=hidden,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or hidden // heads,
            inner=next((settings[name] for name in INNER if name in settings), None),
        )

    @property
    def bound(self) -> bool:
        """Whether heads times their size are the hidden size."""
        return self.num_attention_heads * self.head_dim == self.hidden_size

    @property
    def text(self) -> str:
        """For messages and records."""
        inner = 4 * self.hidden_size if self.inner is None else self.inner
        return (
            f"{self.num_hidden_layers} layers, hidden {self.hidden_size}, intermediate {inner}, "
            f"{self.num_attention_heads} heads on {self.num_key_value_heads} of {self.head_dim}"
        )

    def numbers(self) -> dict[str, int | None]:
        """By name."""
        return asdict(self)

    def step(self, block: int) -> int:
        """What hidden sizes of a draft are multiples of: a block, and whole heads where heads fill the hidden size."""
        return math.lcm(block, self.head_dim) if self.bound else block

    def usual_layers(self) -> int:
        """Layers of a draft of this model."""
        return max(1, min(DEEPEST, math.ceil(self.num_hidden_layers / TARGET_LAYERS_PER_LAYER)))

    def shrunk(self, *, hidden_size: int, num_hidden_layers: int, block: int) -> DraftShape:
        """The shape of that width and depth with this one's proportions."""
        if self.bound:
            heads = hidden_size // self.head_dim
        else:
            ratio = self.num_attention_heads * self.head_dim / self.hidden_size
            heads = max(1, round(hidden_size * ratio / self.head_dim))
        inner = self.inner
        if inner is not None:
            inner = max(block, round(hidden_size * inner / self.hidden_size / block) * block)
        return DraftShape(
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=self.key_value_heads(heads),
            head_dim=self.head_dim,
            inner=inner,
        )

    def key_value_heads(self, heads: int) -> int:
        """The largest number that divides so many heads and shares a key among no fewer of them than here."""
        most = max(1, heads * self.num_key_value_heads // self.num_attention_heads)
        return max(number for number in range(1, most + 1) if heads % number == 0)

    def config(self, like: PretrainedConfig, tied: bool | None) -> PretrainedConfig:
        """A configuration of this shape that is otherwise like another one.

        Settings with an entry for each layer keep their first entries, since runtimes know the kinds of layers as a
        pattern from the first one on.

        Args:
            tied: whether the head shares its weight with the embedding; None: as in the other one.
        """
        settings = dict(_changed(self, like))
        if tied is not None:
            settings["tie_word_embeddings"] = tied
        return type(like).from_dict(settings)


def _changed(shape: DraftShape, like: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    own = like.attribute_map
    sizes: dict[str, Any] = {
        own.get(name, name): value for name, value in shape.numbers().items() if name not in ("inner", "head_dim")
    }
    for name, value in like.to_dict().items():
        if name in ("_name_or_path", "transformers_version"):  # where a model was stored
            continue
        if name in sizes:
            value = sizes[name]
        elif name in INNER:
            value = shape.inner
        elif name in PER_LAYER and isinstance(value, list):
            value = value[: shape.num_hidden_layers]
        elif name in AS_WIDE_AS_HIDDEN and value == like.hidden_size:
            value = shape.hidden_size
        elif name == "head_dim":
            value = shape.head_dim
        yield name, value
