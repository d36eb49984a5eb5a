"""The sizes of a decoder: those that a recipe asks for, which of them there can be, and the configuration they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgewright.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEADS_DIVIDE_HIDDEN = frozenset({"llama"})
"""Families whose configuration refuses a hidden size that is no multiple of the number of heads."""


class Sizes(BaseModel):
    """Sizes of a model under Hugging Face's names; null: as in the model that it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden_size: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    multiple_of: Literal[1, 32, 64, 128, 256] = 32
    """Sizes that change become multiples of it: of 32 for the blocks of 4 and 8 bits, of 256 for ternary ones and
    K-quants of GGUF. Attention counts with heads times their size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """All sizes of a decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """That of a configuration."""
        settings = config.to_dict()
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        return cls(
            hidden_size=hidden,
            intermediate_size=settings["intermediate_size"],
            num_hidden_layers=settings["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or hidden // heads,
        )

    @property
    def group(self) -> int:
        """Query heads that share a key and value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def text(self) -> str:
        """For messages and records."""
        return (
            f"hidden {self.hidden_size}, intermediate {self.intermediate_size}, {self.num_hidden_layers} layers, "
            f"{self.num_attention_heads} heads on {self.num_key_value_heads} of {self.head_dim}"
        )

    def numbers(self) -> dict[str, int]:
        """By name."""
        return asdict(self)

    def config(self, like: PretrainedConfig, blocks: Sequence[int]) -> PretrainedConfig:
        """A configuration of this shape that is otherwise like another one.

        Args:
            blocks: for each block of the new model, the block of the other one whose kind of attention it has.
        """
        assert len(blocks) == self.num_hidden_layers
        before, settings = Shape.of(like), like.to_dict()
        for name, value in settings.items():
            if isinstance(value, list) and len(value) == before.num_hidden_layers and name.startswith("layer"):
                settings[name] = [value[block] for block in blocks]
        settings |= {name: value for name, value in self.numbers().items() if name != "head_dim"}
        if "head_dim" in settings or self.head_dim * self.num_attention_heads != self.hidden_size:
            settings["head_dim"] = self.head_dim
        return type(like).from_dict(_plain(settings))


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what only tells where a model was stored."""
    return {name: value for name, value in settings.items() if name not in ("_name_or_path", "transformers_version")}


def legal_multiples(low: int, high: int, step: int) -> list[int]:
    """The multiples of a number between two others, both included."""
    return list(range(-(-low // step) * step, high + 1, step))


def nearest(value: int, legal: Iterable[int]) -> list[int]:
    """The legal values next to one, below and above."""
    values = sorted(set(legal))
    below = [each for each in values if each <= value][-1:]
    above = [each for each in values if each > value][:1]
    return [*below, *above]


def words(values: Iterable[int]) -> str:
    return " or ".join(map(str, values)) or "none"


def refused(code: str, setting: str, found: int, why: str, legal: Iterable[int]) -> RecipeError:
    """A size that cannot be, with the nearest that can."""
    near = nearest(found, legal)
    return RecipeError(
        code,
        f"{setting} cannot be {found}: {why}",
        key=setting,
        expected=f"the nearest that can be: {words(near)}",
        found=found,
        fix=f"{setting}: {near[0]}" if near else f"leave {setting} out",
    )


def check_changed(source: Shape, wanted: Shape, code: str, made: str) -> None:
    """Refuse a shape that is the source's: nothing would be done, silently."""
    if wanted == source:
        raise RecipeError(
            code,
            f"nothing would be {made}: these are the sizes of the source",
            expected="at least one size that differs",
            found=source.text,
            fix="give other sizes, or start from the source as it is",
        )


def divided(shape: Shape, model_type: str, heads: Iterable[int], code: str) -> list[RecipeError]:
    """The error of a hidden size that is no multiple of the heads, where the family wants it to be one."""
    if model_type not in HEADS_DIVIDE_HIDDEN or shape.hidden_size % shape.num_attention_heads == 0:
        return []
    why = f"{model_type} wants a hidden size, here {shape.hidden_size}, that is a multiple of the heads"
    legal = [number for number in heads if shape.hidden_size % number == 0]
    return [refused(code, "num_attention_heads", shape.num_attention_heads, why, legal)]


def with_sizes(source: Shape, sizes: Sizes, heads: tuple[int, int]) -> Shape:
    """A shape with the sizes that are asked for, the others as in the source."""
    asked = {
        name: value
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
        if (value := sizes.model_dump()[name]) is not None
    }
    return replace(source, **asked, num_attention_heads=heads[0], num_key_value_heads=heads[1])
