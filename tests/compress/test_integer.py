"""4- and 8-bit training: the lattice is that of the exporter, and what is trained is what its file holds."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from methods import logits, prepared, small_model
from torch import nn

from edgewright.compress.integer import FORMATS, IntegerConfig
from edgewright.compress.integer_linear import RULES, SCALE_FACTORS, IntegerLinear
from edgewright.errors import RecipeError
from edgewright.export.lattice import LatticeTensor, round_int, round_q4_0, round_q8_0
from edgewright.export.onnx import packing

sys.path.append(str(Path(__file__).parents[1] / "export"))
from lattices import adversarial  # noqa: E402


def exporters(rule: str, weight: np.ndarray, block: int) -> LatticeTensor:
    """What the exporter makes of a weight that lies on no lattice."""
    if rule == "q8_0":
        return round_q8_0(weight)
    if rule == "q4_0":
        return round_q4_0(weight)
    if rule == "absmax":
        return round_int(weight, bits=8, group=block)
    codes, scales = packing._least_squares(weight, block)
    return LatticeTensor(codes=codes, scales=scales, group=block, bits=4, levels="int4")


def weights() -> np.ndarray:
    """Ordinary ones, and all that is hard: zeros, -0.0, ties, huge, tiny and subnormal ones."""
    draw = np.random.default_rng(1)
    ordinary = draw.standard_normal((64, 256)) * 0.02
    subnormal = draw.standard_normal((8, 256)) * 1e-39
    halves = (np.arange(512).reshape(2, 256) % 15 - 7.5) / [[8], [64]]
    halves[0, ::32], halves[1, ::32] = -1, 127 / 64  # scales of 1/8 at 4 bits and 1/64 at 8: all others are ties
    extremes = np.round(draw.standard_normal((16, 256)) * 2) / 8  # whose largest and smallest are often one magnitude
    return np.concatenate([adversarial(16, 256), ordinary, subnormal, halves, extremes]).astype(np.float32)


@pytest.mark.parametrize(("rule", "block"), [
    ("q4_0", 32), ("q8_0", 32), *(("absmax", block) for block in (32, 64, 128)), ("search", 64), ("search", 128),
])  # fmt: skip
def test_the_rules_are_those_of_the_exporter_bit_for_bit(rule, block):
    weight = weights()
    codes, scales = RULES[rule](torch.from_numpy(weight).reshape(len(weight), -1, block))
    expected = exporters(rule, weight, block)
    assert np.array_equal(codes.reshape(weight.shape).numpy(), expected.codes)
    assert np.array_equal(scales[:, :, 0].numpy(), expected.scales)


def test_the_tables_agree():
    assert {form.rule for form in FORMATS.values()} == set(RULES)
    assert SCALE_FACTORS == packing.SCALE_FACTORS


@pytest.mark.parametrize("key", FORMATS)
def test_codes_stay_within_what_the_format_says(key):
    form = FORMATS[key]
    linear = nn.Linear(256, len(weights()), bias=False)
    linear.weight = nn.Parameter(torch.from_numpy(weights()))
    layer = IntegerLinear(linear, form=form, block=32 if key[2] else 64)
    lattice = layer.lattice()
    assert form.codes[0] <= lattice.codes.min() and lattice.codes.max() <= form.codes[1]
    kind = {11: np.float16, 24: np.float32}[form.precision]
    assert np.array_equal(lattice.scales, lattice.scales.astype(kind).astype(np.float32))
    assert np.array_equal(layer.effective_weight().detach().numpy(), lattice.dequantize())


def test_gradient_passes_straight_through_and_strength_zero_is_dense():
    linear = nn.Linear(256, 16)
    layer = IntegerLinear(linear, form=IntegerConfig().form(), block=32)
    x = torch.randn(3, 256)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(16, 256))
    layer.strength = 0.0
    assert torch.equal(layer(x), linear(x))


def test_every_format_and_size_has_its_lattice():
    legal = [("q4_0", None, 32), ("q8_0", 8, 32), ("matmulnbits", 4, 32), ("matmulnbits", 8, 128)]
    for name, bits, block in legal:
        assert IntegerConfig(format=name, bits=bits, block=block).form().bits == (bits or 4)
    for name, bits, block in [("q4_0", 8, 32), ("q8_0", None, 64), ("q4_0", None, 128)]:
        with pytest.raises(ValueError, match=f"{name} has"):
            IntegerConfig(format=name, bits=bits, block=block)


def test_a_block_that_does_not_divide_a_row_names_the_layer_and_a_block_that_does():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(RecipeError, match=r"mlp\.down_proj[\s\S]*EW-703[\s\S]*96 columns[\s\S]*a group of 32") as error:
        IntegerConfig(format="matmulnbits", block=64).build().prepare(model)
    assert "exclude: [down_proj]" in error.value.fix


def test_a_weight_that_lies_on_the_lattice_stays_where_it_is():
    """Rounding twice is rounding once, so a finished model that is trained on starts from itself."""
    model, method = prepared(IntegerConfig(format="q8_0"))
    plain, lattice = method.finish(model)
    again = IntegerConfig(format="q8_0").build()
    again.prepare(plain)
    _, second = again.finish(plain)
    for name, tensor in lattice.items():
        np.testing.assert_allclose(second[name].dequantize(), tensor.dequantize(), rtol=2e-3, atol=1e-6)


def test_eight_bits_lose_little():
    model, _ = prepared(IntegerConfig(format="q8_0"))
    dense = logits(small_model())
    assert float((logits(model) - dense).abs().max() / dense.abs().max()) < 0.02
