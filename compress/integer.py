"""Quantization-aware training for weights of 4 and 8 bits, on the very lattice of a file format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from edgewright.compress.choice import LayerChoice, check_divides
from edgewright.method import Method, MethodReport, StepContext

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgewright.compress.integer_linear import IntegerLinear
    from edgewright.export.lattice import LatticeTensor, Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerFormat:
    """A lattice of a file format."""

    rule: str
    """A key of `integer_linear.RULES`."""
    bits: int
    levels: Levels
    codes: tuple[int, int]
    """The smallest and the largest that the rule gives."""
    precision: int
    """Bits of a scale, the leading one included: 11 in fp16, 24 in fp32."""


FORMATS: dict[tuple[str, int, bool], IntegerFormat] = {
    ("q4_0", 4, True): IntegerFormat(rule="q4_0", bits=4, levels="int4", codes=(-8, 7), precision=11),
    ("q8_0", 8, True): IntegerFormat(rule="q8_0", bits=8, levels="int8", codes=(-127, 127), precision=11),
    ("matmulnbits", 4, True): IntegerFormat(rule="q4_0", bits=4, levels="int4", codes=(-8, 7), precision=11),
    ("matmulnbits", 4, False): IntegerFormat(rule="search", bits=4, levels="int4", codes=(-8, 7), precision=24),
    ("matmulnbits", 8, True): IntegerFormat(rule="absmax", bits=8, levels="int8", codes=(-127, 127), precision=24),
    ("matmulnbits", 8, False): IntegerFormat(rule="absmax", bits=8, levels="int8", codes=(-127, 127), precision=24),
}
"""By format, bits, and whether a block holds 32 weights: at 4 bits and 32 weights ONNX gets the lattice of Q4_0."""

BITS = {"q4_0": 4, "q8_0": 8, "matmulnbits": 4}
"""What each format has unless told otherwise."""


class IntegerConfig(LayerChoice):
    """Weights of 4 or 8 bits, rounded as the exporter rounds them, with a straight-through gradient.

    The rounding rules are ggml's and ONNX Runtime's; the training is that of arXiv 1712.05877, for weights alone.
    Embedding and head stay as they are.
    """

    quantizes: ClassVar[bool] = True
    type: Literal["integer"] = "integer"
    format: Literal["q4_0", "q8_0", "matmulnbits"] = "q4_0"
    """Whose lattice: GGUF's Q4_0 or Q8_0, or that of ONNX Runtime's MatMulNBits."""
    bits: Literal[4, 8] | None = None
    """4 or 8 for matmulnbits; None: 4, or what the format's name says."""
    block: Literal[32, 64, 128] = 32
    """Weights per scale; those of GGUF hold 32."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the weights go from full precision to the lattice (lambda warm-up)."""

    @model_validator(mode="after")
    def _format_exists(self) -> Self:
        if (self.format, self.bits or BITS[self.format], self.block == 32) not in FORMATS:
            raise ValueError(f"{self.format} has {BITS[self.format]} bits and blocks of 32, and nothing else")
        return self

    def form(self) -> IntegerFormat:
        """The lattice."""
        return FORMATS[self.format, self.bits or BITS[self.format], self.block == 32]

    def build(self) -> Integer:
        return Integer(self)

    def finished(self) -> str:
        return "codes and scales"

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """EW-703: a row is not made of whole blocks."""
        check_divides(layer, columns, self.block)

    def example(self, layer: str, rows: int, columns: int) -> LatticeTensor:
        from edgewright.compress.examples import example_lattice

        form = self.form()
        self.check_layer(layer, rows, columns)
        low, high = form.codes
        return example_lattice(
            rows, columns, smallest=low, largest=high, levels=form.levels, group=self.block, precision=form.precision
        )


class Integer(Method):
    """Replaces linear layers, but the head and the excluded ones, by ones whose forward uses the rounded weight."""

    type = "integer"
    saves = "nothing while training; 4.25 to 9 bits a weight in the file, and the loss of rounding"

    def __init__(self, config: IntegerConfig) -> None:
        self.config = config
        self._layers: dict[str, IntegerLinear] = {}

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        from edgewright.compress.layers import choose

        return choose(model, self.config, method=self.type)

    def prepare(self, model: PreTrainedModel) -> None:
        """Swap the linear layers.

        Raises:
            RecipeError: EW-703, a row is no multiple of the block (names the layer); EW-708, `layers` or `exclude`
                name no layer; EW-711, a layer belongs to another method.
        """
        from edgewright.compress.integer_linear import IntegerLinear

        for name, linear in self.chosen(model).items():
            layer = IntegerLinear(linear, form=self.config.form(), block=self.config.block)
            model.set_submodule(name, layer)
            self._layers[name] = layer

    def before_step(self, ctx: StepContext) -> None:
        from edgewright.compress.fake_quant import set_strength

        set_strength(self._layers, ctx, self.config.warmup_ratio)

    def after_step(self, ctx: StepContext) -> None:
        """The weights have changed: round them for whatever comes next."""
        from edgewright.compress.fake_quant import refresh

        refresh(self._layers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from edgewright.compress.fake_quant import refresh

        refresh(self._layers)

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The model with plain linear layers that hold codes * scale, and the codes and scales by weight name."""
        from edgewright.compress.fake_quant import finish

        return finish(model, self._layers)

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers changed, and the share of zeros among their codes."""
        from edgewright.compress.fake_quant import report

        return report(model, self._layers)
