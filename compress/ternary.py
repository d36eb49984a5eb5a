"""Ternary quantization-aware training: linear weights in {-s, 0, s}, from scratch or from a checkpoint."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from edgewright.compress.choice import LayerChoice
from edgewright.errors import RecipeError
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgewright.compress.fake_quant import TernaryLinear
    from edgewright.export.lattice import LatticeTensor


class TernaryConfig(LayerChoice):
    """Absmean ternary weights (BitNet b1.58, arXiv 2402.17764) with a straight-through gradient."""

    type: Literal["ternary"] = "ternary"
    granularity: Literal["tensor", "row", "group"] = "row"
    """What shares a scale. All three fit TQ1_0 and TQ2_0 exactly."""
    group: int = Field(default=256, gt=0, multiple_of=256)
    """Columns per scale for `granularity: group`; GGUF's ternary blocks hold 256."""
    quantize_activations: bool = False
    """Also round activations to int8 per token, as runtimes with integer kernels do."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the weights go from full precision to ternary (lambda warm-up)."""
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
    saves = "nothing while training; 1.6875 to 2.25 bits a weight in the file"

    def __init__(self, config: TernaryConfig) -> None:
        self.config = config
        self._group = {"tensor": None, "row": 0, "group": config.group}[config.granularity]
        self._layers: dict[str, TernaryLinear] = {}

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers.

        Raises:
            RecipeError: EW-703, a row is no multiple of the group (names the layer); EW-708, `exclude` names no
                layer; EW-709, `head` on a model that ties it to the embedding.
        """
        from edgewright.compress.fake_quant import TernaryLinear
        from edgewright.compress.layers import choose

        self._check_head(model)
        for name, linear in choose(model, self.config, method=self.type, head=self.config.head).items():
            if self._group and linear.in_features % self._group:
                raise RecipeError(
                    "EW-703",
                    f"the ternary group does not divide the rows of {name}",
                    expected=f"{linear.in_features} columns to be a multiple of {self._group}",
                    fix="use granularity: row, or a model whose sizes are multiples of the group",
                )
            layer = TernaryLinear(linear, group=self._group, quantize_activations=self.config.quantize_activations)
            model.set_submodule(name, layer)
            self._layers[name] = layer

    def _check_head(self, model: PreTrainedModel) -> None:
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
        for layer in self._layers.values():
            layer.strength.fill_(strength)

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers that hold codes * scale, and the codes and scales by weight name."""
        import torch

        from edgewright.compress.fake_quant import ternary_codes, ternary_weight
        from edgewright.compress.layers import plain_linear, submodules
        from edgewright.export.lattice import LatticeTensor

        plain = copy.deepcopy(model)
        lattice: dict[str, LatticeTensor] = {}
        for name, layer in submodules(plain, self._layers).items():
            with torch.no_grad():
                codes, scales = ternary_codes(layer.weight.float(), self._group)
                linear = plain_linear(ternary_weight(layer.weight.float(), self._group), layer.bias)
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

        from edgewright.compress.fake_quant import ternary_codes
        from edgewright.compress.layers import cost, skipped, submodules

        layers = submodules(model, self._layers)
        with torch.no_grad():
            zeros = sum(
                int((ternary_codes(layer.weight.float(), self._group)[0] == 0).sum()) for layer in layers.values()
            )
        numbers = cost(layers.values())
        numbers["zeros"] = zeros / max(1.0, numbers["weights"])
        return MethodReport(changed=len(layers), skipped=skipped(model), numbers=numbers)
