"""Which axis of a decoder every dimension of its weights lies on: one table for pruning, growth and elastic models.

Shapes: V vocabulary, H hidden size, A query heads of D numbers each, K key and value heads, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

Axis = Literal["vocabulary", "hidden", "query", "key_value", "ffn", "head"]
"""query: A * D wide; key_value: K * D; head: D, which nothing here changes."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""model_type of those that are built like this: blocks of RMSNorm, attention, RMSNorm, gated MLP, and nothing besides.

Others scale by the hidden size (Gemma), have norms whose width is another axis's (BitNet), or other blocks.
"""

AXES: Mapping[str, tuple[Axis, ...]] = {
    "embed_tokens.weight": ("vocabulary", "hidden"),
    "lm_head.weight": ("vocabulary", "hidden"),
    "norm.weight": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "q_proj.weight": ("query", "hidden"),
    "q_proj.bias": ("query",),
    "k_proj.weight": ("key_value", "hidden"),
    "k_proj.bias": ("key_value",),
    "v_proj.weight": ("key_value", "hidden"),
    "v_proj.bias": ("key_value",),
    "q_norm.weight": ("head",),
    "k_norm.weight": ("head",),
    "o_proj.weight": ("hidden", "query"),
    "o_proj.bias": ("hidden",),
    "gate_proj.weight": ("ffn", "hidden"),
    "gate_proj.bias": ("ffn",),
    "up_proj.weight": ("ffn", "hidden"),
    "up_proj.bias": ("ffn",),
    "down_proj.weight": ("hidden", "ffn"),
    "down_proj.bias": ("hidden",),
}
"""[out, in] of a weight by the last two parts of its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A weight of a decoder."""

    name: str
    kind: str
    """Its key in `AXES`."""
    block: int | None
    """The block that it is in; None for embedding, last norm and head."""
    axes: tuple[Axis, ...]

    def in_block(self, block: int) -> str:
        """The name of the same weight in another block."""
        return self.name if self.block is None else self.name.replace(f"layers.{self.block}.", f"layers.{block}.", 1)


def place_of(name: str) -> Place | None:
    """Where a weight is in the table; None for one that is not there."""
    parts = name.split(".")
    kind = ".".join(parts[-2:])
    if kind not in AXES:
        return None
    block = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
    return Place(name=name, kind=kind, block=block, axes=AXES[kind])


def places(model: nn.Module) -> dict[str, Place]:
    """Every weight of a checked model by its name; tied ones under each of their names."""
    return {name: place for name in model.state_dict() if (place := place_of(name)) is not None}


def weights(model: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """Every weight of a checked model with its place."""
    state = model.state_dict()
    yield from ((place, state[name]) for name, place in places(model).items())


def check_axes(model: nn.Module, model_type: str, what: str) -> None:
    """Refuse a model whose axes are not known.

    Args:
        what: what is wanted with it, for the message.

    Raises:
        RecipeError: EW-761.
    """
    unknown = [name for name in model.state_dict() if place_of(name) is None]
    if model_type in FAMILIES and not unknown:
        return
    found = model_type if model_type not in FAMILIES else f"{model_type} with {unknown[0]}"
    raise RecipeError(
        "EW-761",
        f"a model of this family cannot be {what}",
        expected=f"plain layers of {', '.join(FAMILIES)}",
        found=found,
        fix="start from a model of one of these families; factors must be merged first (merge: true)",
    )
