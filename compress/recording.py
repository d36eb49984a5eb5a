"""What goes on inside a model while it runs: hidden states of its blocks, and the inputs of its attention.

Hooks stay on the modules and record only inside `recording()`, so neither an evaluation nor a block that is computed
again for its backward pass is recorded. Nothing of the forward changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgewright.errors import RecipeError
from edgewright.student import decoder_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Role = Literal["q", "k", "v"]
ROLES: tuple[Role, ...] = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be recorded of a model."""

    hidden: frozenset[int] = frozenset()
    """Hidden states [B, S, H]: 0 goes into the first block, i comes out of the i-th, before the last norm."""
    attention: frozenset[int] = frozenset()
    """Blocks, from 1, whose queries, keys and values [B, S, heads * size] are recorded as the projections give them:
    before positions are turned in."""
    last: bool = False
    """The last hidden states, after the last norm."""

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(self.hidden | other.hidden, self.attention | other.attention, self.last or other.last)


class Recorder:
    """Records what is wanted of a model.

    Args:
        model: whose blocks transformers marks, with separate projections where attention is wanted.

    Raises:
        RecipeError: EW-784, the architecture has no such places.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted) -> None:
        self.wanted = wanted
        self.active = False
        self._found: dict[str, Tensor] = {}
        blocks = decoder_blocks(model)
        for layer in wanted.hidden:
            if layer == 0:
                blocks[0].register_forward_pre_hook(self._input, with_kwargs=True)
            else:
                blocks[layer - 1].register_forward_hook(self._output(f"hidden {layer}"))
        if wanted.last:
            model.base_model.register_forward_hook(self._last)
        for layer in wanted.attention:
            for role, module in projections(model, layer).items():
                module.register_forward_hook(self._output(f"{role} {layer}"))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the one forward of the block; what was recorded before is forgotten."""
        self._found.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def hidden(self, layer: int) -> Tensor:
        """[B, S, H]"""
        return self._found[f"hidden {layer}"]

    def attention(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block."""
        q, k, v = (self._found[f"{role} {layer}"] for role in ROLES)
        return q, k, v

    def last(self) -> Tensor:
        """[B, S, H]"""
        return self._found["last"]

    def forget(self) -> None:
        """Free what was recorded."""
        self._found.clear()

    def _input(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.active:
            self._found["hidden 0"] = arguments[0] if arguments else named["hidden_states"]

    def _last(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self.active:
            self._found["last"] = output.last_hidden_state

    def _output(self, key: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if self.active:
                self._found[key] = output[0] if isinstance(output, tuple) else output

        return hook


def projections(model: PreTrainedModel, layer: int) -> dict[Role, nn.Module]:
    """The modules of a block (from 1) that make queries, keys and values.

    Raises:
        RecipeError: EW-784, they are not three.
    """
    blocks = decoder_blocks(model)
    found: dict[Role, nn.Module] = {}
    if blocks:
        for name, module in blocks[layer - 1].named_modules():
            for role in ROLES:
                if name.rpartition(".")[2] == f"{role}_proj":
                    found[role] = module
    if len(found) < len(ROLES):
        raise RecipeError(
            "EW-784",
            "attention relations need queries, keys and values apart",
            where=f"{model.config.model_type}, block {layer}",
            expected="modules named q_proj, k_proj and v_proj",
            found=", ".join(f"{role}_proj" for role in found) or "none of them",
            fix="take the loss out of the list, or models of a family like Llama, Qwen2, Mistral or OPT",
        )
    return found
