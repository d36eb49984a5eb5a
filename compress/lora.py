"""Adaptation: a frozen model with low-rank adapters, and perhaps a few of its blocks trained whole.

The finished model is a plain one: adapters are merged into their weights, in float32. Where the frozen weights are in 4
bits the adapters are merged into the *dequantized* weights, since it is with those that they were trained; the logits
are the trained model's, and not those of the original weights with the same adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgewright.compress.rank import RankChoice
from edgewright.errors import RecipeError
from edgewright.method import Method, MethodReport

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.adapted_linear import AdaptedLinear
    from edgewright.export.lattice import LatticeTensor


class LoraConfig(RankChoice):
    """Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685; DoRA, 2402.09353; QLoRA, 2305.14314).

    All else is frozen: embeddings, head, norms, and the layers that the method does not get. `train_blocks` and
    `train_norms` are the idea of ExPLoRA (2406.10973) for text: extended pretraining with a few blocks trained whole.
    """

    type: Literal["lora"] = "lora"
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """The adapter counts alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training."""
    dora: bool = False
    """Whether the magnitude of every row is trained apart from its direction."""
    quantize_base: Literal["nf4", "fp4"] | None = None
    """Hold the frozen weights in 4 bits (bitsandbytes): 0.56 bytes each for 4. On a CPU it works, slowly: every product
    dequantizes them first."""
    train_blocks: tuple[int, ...] = ()
    """Decoder blocks that are trained whole and get no adapters, by number; -1 is the last."""
    train_norms: bool = False
    """Whether all norms are trained too."""

    def build(self) -> Lora:
        return Lora(self)

    @property
    def freezes(self) -> bool:
        return True


class Lora(Method):
    """Puts adapters on linear layers, but the head and the excluded ones, and freezes everything else."""

    type = "lora"
    saves = "gradients and moments, r (in + out) for in * out; with quantize_base 3.4 of 4 bytes a weight"
    keeps_names: ClassVar[bool] = False

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._layers: dict[str, AdaptedLinear] = {}

    def kept_whole(self) -> str | None:
        if self.config.quantize_base:
            return "weights in 4 bits are stored in parts that no process group can exchange"
        return "norms of whole rows are taken in every forward" if self.config.dora else None

    def got_nothing(self) -> RecipeError:
        if not self.config.train_blocks:
            return super().got_nothing()
        return RecipeError(
            "EW-704",
            "no layer is left for an adapter: those of `layers` lie in blocks that are trained whole",
            key="train_blocks",
            found=f"train_blocks: {list(self.config.train_blocks)}",
            fix="train fewer blocks whole; to train all of them, leave the method out",
        )

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from edgewright.compress.layers import choose

        whole = tuple(f"{name}." for name in self._whole_blocks(model))
        layers = choose(model, self.config, method=self.type)
        return {name: linear for name, linear in layers.items() if not name.startswith(whole)}

    def before_device(self, model: PreTrainedModel, device: str) -> str | None:
        """Put the weights that stay frozen into 4 bits."""
        from edgewright.compress.four_bits import FourBitLinear

        kind = self.config.quantize_base
        if kind is None:
            return None
        chosen = self.chosen(model)
        for name, linear in chosen.items():
            model.set_submodule(name, FourBitLinear(linear, kind))
        slow = "; without a GPU this saves memory, not time: every product dequantizes them" if device == "cpu" else ""
        return f"{len(chosen)} frozen layers in {kind}, 0.56 bytes a weight{slow}"

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers, and freeze the rest of the model.

        Raises:
            RecipeError: EW-720, a rank above the matrix; EW-734, there is no such block; EW-708, EW-711 as `choose`.
        """
        from torch import nn

        from edgewright.compress.adapted_linear import AdaptedLinear
        from edgewright.compress.four_bits import FourBitLinear

        config, chosen = self.config, self.chosen(model)
        self._freeze(model)
        for name, linear in chosen.items():
            if config.quantize_base and type(linear) is nn.Linear:  # else it was done before the device saw it
                linear = FourBitLinear(linear, config.quantize_base)
            rank = config.rank_of(name, linear.out_features, linear.in_features)
            layer = AdaptedLinear(linear, rank=rank, alpha=config.alpha, dropout=config.dropout, dora=config.dora)
            model.set_submodule(name, layer)
            self._layers[name] = layer

    def _freeze(self, model: PreTrainedModel) -> None:
        """Freeze what nobody trains: not the layers of other methods, nor what an earlier method of this kind left."""
        from edgewright.compress.adapted_linear import AdaptedLinear
        from edgewright.compress.layers import CompressedLinear

        if not any(isinstance(module, AdaptedLinear) for module in model.modules()):
            owned = {
                id(p)
                for m in model.modules()
                if isinstance(m, CompressedLinear) and not m.stored
                for p in m.parameters()
            }
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in owned and parameter.requires_grad)
        for module in self._trained_whole(model):
            for parameter in module.parameters():
                parameter.requires_grad_(True)

    def _trained_whole(self, model: PreTrainedModel) -> Iterator[nn.Module]:
        """The modules that are trained as they are."""
        yield from self._whole_blocks(model).values()
        if self.config.train_norms:
            yield from (module for module in model.modules() if "norm" in type(module).__name__.lower())

    def _whole_blocks(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The blocks of `train_blocks`, by name.

        Raises:
            RecipeError: EW-734.
        """
        from edgewright.student import decoder_blocks

        blocks = decoder_blocks(model)
        numbers = []
        for number in self.config.train_blocks:
            if not -len(blocks) <= number < len(blocks):
                raise _no_such_block(number, len(blocks))
            numbers.append(number % len(blocks))
        wanted = {id(blocks[number]) for number in numbers}
        return {name: module for name, module in model.named_modules() if id(module) in wanted}

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers that hold W + s B A (with DoRA times m over the rows' norms)."""
        from edgewright.compress.layers import merged, submodules

        finished = copy.deepcopy(model)
        for name, layer in submodules(finished, self._layers).items():
            finished.set_submodule(name, merged(layer))
        return finished, {}

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers with adapters and what they cost; `frozen`: what else of the model is not trained, in parameters."""
        from edgewright.compress.layers import cost, skipped, submodules

        layers = submodules(model, self._layers).values()
        bases = {id(p) for layer in layers for name, p in layer.base.named_parameters() if name == "weight"}
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in bases)
        numbers = {**cost(layers), "frozen": float(frozen)}
        return MethodReport(changed=len(layers), skipped=skipped(model), numbers=numbers)


def _no_such_block(number: int, blocks: int) -> RecipeError:
    nearest = blocks - 1 if number > 0 else -blocks
    return RecipeError(
        "EW-734",
        "`train_blocks` names no block of this model",
        key="train_blocks",
        expected=f"numbers from {-blocks} to {blocks - 1}: it has {blocks} blocks"
        if blocks
        else "a model that marks its blocks",
        found=number,
        fix=f"train_blocks: [{nearest}]" if blocks else "remove train_blocks",
    )
