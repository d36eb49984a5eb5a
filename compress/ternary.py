"""Ternary quantization-aware training: linear weights in {-s, 0, s}, from scratch or from a checkpoint.

Continuation of a full-precision model (BitCPM4's two stages, arXiv 2506.07900) is a second stage with `student: {type:
stage}` and a schedule of its own: it starts from the weights of the first, and warms its learning rate up again. The
latent weights go on, also from one ternary stage to the next; learned scales do where the next stage has the same rule
and the same groups, and Tequila's bias to another stage of Tequila, which makes it of the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from edgewright.compress.choice import LayerChoice, check_divides
from edgewright.compress.quantizers import QUANTIZERS, Granularity, residual_share
from edgewright.errors import RecipeError
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgewright.compress.ternary_linear import TernaryLinear
    from edgewright.export.lattice import LatticeTensor

DEAD_BIAS = 1e-3
"""Tequila's lambda."""
RESIDUAL = 1.0
"""Sherry's largest eps."""
GROUP = 256
"""Columns per scale unless told otherwise."""


class TernaryConfig(LayerChoice):
    """Absmean ternary weights (BitNet b1.58, arXiv 2402.17764) or others (`quantizers.py`), straight-through."""

    quantizes: ClassVar[bool] = True
    type: Literal["ternary"] = "ternary"
    quantizer: Literal["absmean", "median", "twn", "seq_ternary", "seq_2bit", "tequila", "sherry"] = "absmean"
    """The rounding rule. seq_2bit has four levels and no zero; sherry makes one weight of every four zero."""
    granularity: Granularity = "row"
    """What shares a scale. tensor and row fit every format's blocks."""
    group: int = Field(default=GROUP, gt=0, multiple_of=32)
    """Columns per scale for `granularity: group`. GGUF's ternary blocks hold multiples of 256 (q2_0: 64), ONNX and
    OpenVINO any of 32."""
    dead_bias: float | None = Field(default=None, gt=0)
    """How strongly weights of code 0 feed a bias, for `quantizer: tequila`; None: 1e-3."""
    residual: float | None = Field(default=None, ge=0)
    """eps of `quantizer: sherry` at its largest: so much of the weights themselves is added to the rounded ones, rising
    over the first tenth of the steps and then fading to nothing (Arenas); None: 1, 0: none."""
    quantize_activations: bool = False
    """Also round activations to int8 per token, as runtimes with integer kernels do."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the weights go from full precision to ternary (lambda warm-up)."""
    head: bool = False
    """Whether the output head becomes ternary too; only where it does not share its weight with the embedding."""

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        if self.dead_bias is not None and not QUANTIZERS[self.quantizer].dead_bias:
            raise ValueError(f"dead_bias is of quantizer: tequila alone, not of {self.quantizer}")
        if self.residual is not None and not QUANTIZERS[self.quantizer].residual:
            raise ValueError(f"residual is of quantizer: sherry alone, not of {self.quantizer}")
        if self.granularity != "group" and self.group != GROUP:  # the resolved recipe spells out the default
            raise ValueError(f"group is of granularity: group alone, not of {self.granularity}")
        if self.head and self.quantize_activations:
            raise ValueError("quantize_activations does not reach the head: leave out one of the two")
        return self

    def build(self) -> Ternary:
        return Ternary(self)

    def whole(self) -> int:
        """What the columns of every layer must be a multiple of."""
        return self.group if self.granularity == "group" else QUANTIZERS[self.quantizer].columns

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """EW-703: a row is not made of whole groups."""
        check_divides(layer, columns, self.whole())

    def left_behind(self, after: Sequence[LayerChoice]) -> str | None:
        """Learned scales but for layers of the same rule and groups, Tequila's bias but for Tequila."""
        rule = QUANTIZERS[self.quantizer]
        kind = "the learned scales" if rule.learned else "the biases of dead weights" if rule.dead_bias else None
        again = [method for method in after if self.leaves_to(method)]
        if kind is None or any(method.asks_for_all_of(self) for method in again):
            return None
        return f"some of {kind}" if again else kind

    def leaves_to(self, after: LayerChoice | None) -> bool:
        """Whether what is trained beside the weights means the same to another method."""
        if not isinstance(after, TernaryConfig) or after.quantizer != self.quantizer:
            return False
        alike = (after.granularity, after.group) == (self.granularity, self.group)
        return alike or not QUANTIZERS[self.quantizer].learned

    def finished(self) -> str:
        return "codes and scales"

    def example(self, layer: str, rows: int, columns: int) -> LatticeTensor:
        from edgewright.compress.examples import example_lattice

        rule = QUANTIZERS[self.quantizer]
        self.check_layer(layer, rows, columns)
        return example_lattice(
            rows,
            columns,
            largest=rule.largest,
            levels=rule.levels,
            group=self.group if self.granularity == "group" else None,
            per_tensor=self.granularity == "tensor",
        )


class Ternary(Method):
    """Replaces linear layers, but the head and the excluded ones, by ones whose forward uses Q(W).

    The latent weights stay the parameters. Embeddings, norms and the head stay in full precision (the head unless the
    recipe says otherwise); whether the exported file stores embedding and head narrower is the export's choice.
    """

    type = "ternary"
    saves = "nothing while training; 1.6875 to 2.25 bits a weight in the file (seq_2bit: 4.5)"

    def __init__(self, config: TernaryConfig) -> None:
        self.config = config
        self._layers: dict[str, TernaryLinear] = {}
        self._bias_settings: dict[str, bool] = {}

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from edgewright.compress.biases import settings_for_biases
        from edgewright.compress.layers import choose

        self._check_head(model)
        chosen = choose(model, self.config, method=self.type, head=self.config.head)
        if QUANTIZERS[self.config.quantizer].dead_bias:
            settings_for_biases(model, chosen)
        return chosen

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers.

        Raises:
            RecipeError: EW-703, a row is no multiple of the group (names the layer); EW-708, `layers` or `exclude`
                name no layer; EW-709, `head` on a model that ties it to the embedding; EW-711, a layer belongs to
                another method; EW-732, the architecture has no place for Tequila's bias.
        """
        from edgewright.compress.biases import settings_for_biases
        from edgewright.compress.ternary_linear import TernaryLinear

        config = self.config
        chosen = self.chosen(model)
        rule = QUANTIZERS[config.quantizer]
        if rule.dead_bias:
            self._bias_settings = settings_for_biases(model, chosen)
        for name, linear in chosen.items():
            layer = TernaryLinear(
                linear,
                quantizer=config.quantizer,
                granularity=config.granularity,
                group=config.group,
                quantize_activations=config.quantize_activations,
                dead_bias=(config.dead_bias or DEAD_BIAS) if rule.dead_bias else 0.0,
            )
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
        """The strength and the residual of this step; what `after_step` has set already is not rounded again."""
        from edgewright.compress.fake_quant import set_strength

        self._set_residual(ctx.step, ctx.total_steps)
        set_strength(self._layers, ctx, self.config.warmup_ratio)

    def _set_residual(self, step: int, total_steps: int) -> None:
        if QUANTIZERS[self.config.quantizer].residual:
            largest = RESIDUAL if self.config.residual is None else self.config.residual
            for layer in self._layers.values():
                layer.residual = largest * residual_share(step, total_steps)

    def after_step(self, ctx: StepContext) -> None:
        """The weights have changed: round them for whatever comes next."""
        from edgewright.compress.fake_quant import refresh

        self._set_residual(ctx.step + 1, ctx.total_steps)
        refresh(self._layers)

    def go_on(self, before: Sequence[LayerChoice], trained: Mapping[str, Tensor]) -> None:
        """Take over the learned scales of layers that had the same rule and the same groups."""
        import torch

        for name, layer in self._layers.items():
            owner = next((config for config in before if config.asks_for(name)), None)
            scale = trained.get(f"{name}.scale")
            if layer.scale is not None and scale is not None and self.config.leaves_to(owner):
                with torch.no_grad():
                    layer.scale.copy_(scale)
                layer.refresh()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from edgewright.compress.fake_quant import refresh

        refresh(self._layers)

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers that hold codes * scale, and the codes and scales by weight name.

        With Tequila the layers get biases, which the configuration announces (`attention_bias`, `mlp_bias`); layers of
        the same kind that are not ternary get zeros.
        """
        from edgewright.compress.biases import add_biases
        from edgewright.compress.fake_quant import finish

        plain, lattice = finish(model, self._layers)
        if self._bias_settings:
            add_biases(plain, self._bias_settings)
        return plain, lattice

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers changed, and the share of zeros among their codes (31 % for Gaussian latents and absmean)."""
        from edgewright.compress.fake_quant import report

        return report(model, self._layers)
