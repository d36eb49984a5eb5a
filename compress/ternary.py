"""Ternary quantization-aware training: linear weights in {-s, 0, s}, from scratch or from a checkpoint."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edgewright.errors import RecipeError
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.fake_quant import TernaryLinear
    from edgewright.export.lattice import LatticeTensor


class TernaryConfig(BaseModel):
    """Absmean ternary weights (BitNet b1.58, arXiv 2402.17764) with a straight-through gradient."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["ternary"] = "ternary"
    granularity: Literal["tensor", "row", "group"] = "row"
    """What shares a scale. All three fit TQ1_0 and TQ2_0 exactly."""
    group: int = Field(default=256, gt=0, multiple_of=256)
    """Columns per scale for `granularity: group`; GGUF's ternary blocks hold 256."""
    quantize_activations: bool = False
    """Also round activations to int8 per token, as runtimes with integer kernels do."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the weights go from full precision to ternary (lambda warm-up)."""
    exclude: tuple[str, ...] = ()
    """Linear layers left in full precision, by their name or the last parts of it: `down_proj`, `0.mlp.up_proj`."""
    head: bool = False
    """Whether the output head becomes ternary too; only where it does not share its weight with the embedding."""

    def build(self) -> Ternary:
        return Ternary(self)


class Ternary(Method):
    """Replaces linear layers, but the head and the excluded ones, by ones whose forward uses Q(W).

    The latent weights stay the parameters. Embeddings, norms and the head stay in full precision (the head unless the
    recipe says otherwise); whether the exported file stores embedding and head narrower is the export's choice.
    """

    type = "ternary"

    def __init__(self, config: TernaryConfig) -> None:
        self.config = config
        self._group = {"tensor": None, "row": 0, "group": config.group}[config.granularity]
        self._prepared: list[TernaryLinear] = []

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers.

        Raises:
            RecipeError: EW-703, a row is no multiple of the group (names the layer); EW-708, `exclude` names no
                layer; EW-709, `head` on a model that ties it to the embedding.
        """
        from torch import nn

        from edgewright.compress.fake_quant import TernaryLinear

        linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self._check_names(model, linears)
        for name, linear in linears.items():
            if any(_names(pattern, name) for pattern in self.config.exclude):
                continue
            if linear is model.get_output_embeddings() and not self.config.head:
                continue
            if self._group and linear.in_features % self._group:
                raise RecipeError(
                    "EW-703",
                    f"the ternary group does not divide the rows of {name}",
                    expected=f"{linear.in_features} columns to be a multiple of {self._group}",
                    fix="use granularity: row, or a model whose sizes are multiples of the group",
                )
            layer = TernaryLinear(linear, group=self._group, quantize_activations=self.config.quantize_activations)
            model.set_submodule(name, layer)
            self._prepared.append(layer)

    def _check_names(self, model: PreTrainedModel, linears: dict[str, nn.Linear]) -> None:
        for pattern in self.config.exclude:
            if not any(_names(pattern, name) for name in linears):
                last = sorted({name.rpartition(".")[2] for name in linears})
                raise RecipeError(
                    "EW-708",
                    f"`exclude` names no linear layer of this model: {pattern!r}",
                    expected=f"a layer's name or the last parts of it, such as {', '.join(last)}",
                    found=pattern,
                    fix="correct or remove it",
                )
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if self.config.head and head.weight is embeddings.weight:
            raise RecipeError(
                "EW-709",
                "the output head shares its weight with the token embedding: it cannot be ternary alone",
                expected="head: false, or a model with tie_word_embeddings: false",
                fix="leave the head to the export: embedding_quant stores both narrower",
            )

    def before_step(self, ctx: StepContext) -> None:
        """lambda = min(1, (step + 1) / warm-up steps): 1 from the end of the warm-up on."""
        warmup = self.config.warmup_ratio * ctx.total_steps
        strength = min(1.0, (ctx.step + 1) / warmup) if warmup else 1.0
        for layer in self._prepared:
            layer.strength.fill_(strength)

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers that hold codes * scale, and the codes and scales by weight name."""
        import torch
        from torch import nn

        from edgewright.compress.fake_quant import ternary_codes, ternary_weight
        from edgewright.export.lattice import LatticeTensor

        plain = copy.deepcopy(model)
        lattice: dict[str, LatticeTensor] = {}
        for name, layer in _layers(plain).items():
            with torch.no_grad():
                codes, scales = ternary_codes(layer.weight.float(), self._group)
                linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                linear.weight = nn.Parameter(ternary_weight(layer.weight.float(), self._group))
                linear.bias = layer.bias
            plain.set_submodule(name, linear)
            lattice[f"{name}.weight"] = LatticeTensor(
                codes=codes.cpu().numpy().astype(np.int8),
                scales=scales.cpu().numpy(),
                group=self._group or None,
                bits=2,
                levels="ternary",
            )
        return plain, lattice

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers changed, and the share of zeros among their codes (31 % for Gaussian latents)."""
        import torch
        from torch import nn

        from edgewright.compress.fake_quant import ternary_codes

        layers = _layers(model)
        with torch.no_grad():
            zeros = sum(
                int((ternary_codes(layer.weight.float(), self._group)[0] == 0).sum()) for layer in layers.values()
            )
        weights = sum(layer.weight.numel() for layer in layers.values())
        skipped = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        numbers = {"weights": float(weights), "zeros": zeros / max(1, weights)}
        return MethodReport(changed=len(self._prepared), skipped=tuple(skipped), numbers=numbers)


def _names(pattern: str, layer: str) -> bool:
    return layer == pattern or layer.endswith(f".{pattern}")


def _layers(model: nn.Module) -> dict[str, TernaryLinear]:
    from edgewright.compress.fake_quant import TernaryLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
