"""The rounding rules of ternary training: each against a formula in float64, with its levels, gradients and limits."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.compress.quantizers import QUANTIZERS, exact_scale
from edgewright.compress.ternary import TernaryConfig
from edgewright.compress.ternary_linear import TernaryLinear

every = pytest.mark.parametrize("name", QUANTIZERS)
LEARNED = ("seq_ternary", "seq_2bit")
FREE = [name for name in QUANTIZERS if name not in LEARNED]
ZEROS = {"absmean": 0.31, "median": 0.264, "twn": 0.45, "seq_ternary": 0.459, "tequila": 0.31, "sherry": 0.25}
"""The share of Gaussian weights that becomes 0; seq_2bit has no zero."""


def gaussian(rows: int = 48, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def layer_of(weight: torch.Tensor, name: str, **settings) -> TernaryLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    settings = {"dead_bias": 1e-3} | settings if name == "tequila" else settings
    return TernaryLinear(linear, quantizer=name, **settings)


def reference(name: str, weight: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Q(W) of float64 rows, written from the papers, with the steps that the layer found."""
    if name == "twn":
        threshold = 0.75 * np.abs(weight).mean(1, keepdims=True)
        return np.where(np.abs(weight) > threshold, np.sign(weight), 0) * steps
    if name == "sherry":
        fours = weight.reshape(len(weight), -1, 4)
        smallest = np.abs(fours) == np.abs(fours).min(2, keepdims=True)
        return np.where(smallest, 0, np.sign(fours)).reshape(weight.shape) * steps
    if name == "seq_2bit":
        a = 4 * steps
        return (np.round(np.clip(weight / a, -0.99, 0.99) * 2 - 0.5) + 0.5) / 2 * a
    if name == "seq_ternary":
        a = 1.5 * steps
        return np.round(np.clip(weight / a, -0.99, 0.99) * 1.5) / 1.5 * a
    return np.clip(np.round(weight / steps), -1, 1) * steps


def scale_of(name: str, weight: np.ndarray) -> np.ndarray:
    """The step of every row, not yet rounded."""
    size = np.abs(weight)
    mean = size.mean(1, keepdims=True)
    if name == "median":
        return np.sort(size, 1)[:, (size.shape[1] - 1) // 2, None]
    if name == "twn":
        kept = size > 0.75 * mean
        return (size * kept).sum(1, keepdims=True) / kept.sum(1, keepdims=True)
    if name == "sherry":
        return np.sort(size.reshape(len(size), -1, 4), 2)[:, :, 1:].mean((1, 2))[:, None]
    return {"seq_ternary": 2.3 * 2 / 3, "seq_2bit": 2.5 / 4}.get(name, 1.0) * mean


def test_the_recipe_knows_every_rule():
    assert set(get_args(TernaryConfig.model_fields["quantizer"].annotation)) == set(QUANTIZERS)


@every
def test_against_the_formula_in_float64(name):
    weight = gaussian().double()
    codes, scales = layer_of(weight.float(), name).round()
    steps = scales.double().numpy()
    np.testing.assert_allclose(steps, scale_of(name, weight.float().double().numpy()), rtol=2**-8)
    expected = reference(name, weight.float().double().numpy(), steps)
    np.testing.assert_allclose((codes * scales).double().numpy(), expected, rtol=1e-12, atol=0)


@every
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_levels_scales_and_zeros(name, granularity):
    layer = layer_of(gaussian(), name, granularity=granularity, group=64)
    lattice = layer.lattice()
    groups = {"tensor": (1, 1), "row": (48, 1), "group": (48, 8)}[granularity]
    assert lattice.scales.shape == groups and (lattice.scales > 0).all()
    levels = {-3, -1, 1, 3} if name == "seq_2bit" else {-1, 0, 1}
    assert set(np.unique(lattice.codes)) == levels
    weight = lattice.dequantize()
    parts = weight.reshape(1, -1) if granularity == "tensor" else weight.reshape(groups[0] * groups[1], -1)
    assert all(len(np.unique(part)) <= len(levels) for part in parts)
    assert np.mean(lattice.codes == 0) == pytest.approx(ZEROS.get(name, 0.0), abs=0.02)
    assert np.array_equal(layer.effective_weight().detach().numpy(), weight)
    for dtype in (torch.float16, torch.bfloat16):
        scales = torch.from_numpy(lattice.scales)
        assert torch.equal(scales.to(dtype).float(), scales)
        rounded = torch.from_numpy(weight)
        assert name == "seq_2bit" or torch.equal(rounded.to(dtype).float(), rounded)


def test_sherry_leaves_out_the_smallest_of_every_four_and_nothing_else():
    weight = gaussian()
    weight[0] = 0  # of equals the first
    weight[1, :4] = torch.tensor([0.0, -0.0, 1e-9, -1e-9])
    codes = layer_of(weight, "sherry").round()[0].reshape(48, -1, 4)
    assert torch.equal((codes == 0).sum(-1), torch.ones(48, 128, dtype=torch.int64))
    assert torch.equal(codes[0, 0], torch.tensor([0.0, 1, 1, 1]))
    assert codes[1, 0].tolist() == [0, 1, 1, -1]


def tied(rows: int = 48, columns: int = 512) -> torch.Tensor:
    """Weights of which many are equal, of equal magnitude, or zero of either sign."""
    weight = (gaussian(rows, columns) * 50).round() / 50
    weight[0], weight[1] = 0.0, -0.0
    return weight


@pytest.mark.parametrize("weight", [gaussian(), tied()], ids=["gaussian", "tied"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_what_is_fast_is_bit_for_bit_the_plain_definition(weight, granularity):
    shape = {"tensor": (1, -1), "row": (48, -1), "group": (48 * 8, -1)}[granularity]
    blocks = weight.reshape(shape)

    def steps(name: str) -> torch.Tensor:
        return layer_of(weight, name, granularity=granularity, group=64).round()[1].flatten()

    assert torch.equal(steps("median"), exact_scale(blocks.abs().median(-1).values))
    assert torch.equal(steps("absmean"), exact_scale(blocks.abs().mean(-1)))
    fours = weight.reshape(-1, 4)
    signs = torch.where(fours >= 0, 1.0, -1.0).scatter(-1, fours.abs().argmin(-1, keepdim=True), 0)
    codes = layer_of(weight, "sherry", granularity=granularity, group=64).round()[0]
    assert torch.equal(codes.reshape(-1, 4), signs)
    kept = (blocks * signs.reshape(blocks.shape)).abs().sum(-1) / (0.75 * blocks.shape[-1])
    assert torch.equal(steps("sherry"), exact_scale(kept))


@every
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_degenerate_rows_stay_finite_and_representable(name, value):
    layer = layer_of(torch.full((2, 256), value), name)
    _, scales = layer.round()
    assert torch.isfinite(layer.rounded).all()
    assert (scales > 0).all() and torch.equal(scales.to(torch.float16).float(), scales)
    layer(torch.randn(3, 256)).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


@every
def test_strength_zero_is_full_precision_bit_for_bit_and_one_is_the_lattice(name):
    linear = nn.Linear(256, 16)
    layer = TernaryLinear(linear, quantizer=name, dead_bias=1e-3 if name == "tequila" else 0.0)
    x = torch.randn(3, 256)
    layer.strength = 0.0
    assert torch.equal(layer(x), linear(x))
    layer(x).sum().backward()
    dense = torch.autograd.grad(linear(x).sum(), linear.weight)[0]
    assert torch.equal(layer.weight.grad, dense)
    layer.strength = 0.5
    half = layer.effective_weight().detach().clone()
    layer.strength = 1.0
    assert np.array_equal(layer.effective_weight().detach().numpy(), layer.lattice().dequantize())
    torch.testing.assert_close(half, (layer.rounded + linear.weight.detach()) / 2)


@pytest.mark.parametrize("name", FREE)
def test_gradient_is_the_identity(name):
    layer = layer_of(gaussian(), name, **({"dead_bias": 0.0} if name == "tequila" else {}))
    seen = torch.randn(48, 512)
    layer.effective_weight().backward(seen)
    assert torch.equal(layer.weight.grad, seen)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_learned_scales_follow_lsq_in_float64(name, strength):
    """dQ/da = l - w/a within the range, the outer level outside; times 1 / sqrt(weights * outer level)."""
    weight = gaussian()
    layer = layer_of(weight, name)
    with torch.no_grad():
        layer.scale.mul_(0.6)  # so that some weights are out of range
    layer.strength = strength
    seen = torch.randn(48, 512, generator=torch.Generator().manual_seed(3))
    layer.effective_weight().backward(seen)
    step = {"seq_ternary": 2 / 3, "seq_2bit": 1 / 4}[name]
    outer = {"seq_ternary": 2 / 3, "seq_2bit": 3 / 4}[name]
    codes, scales = layer.round()
    a = scales.double() / step
    ratio, level = weight.double() / a, codes.double() * step
    inside = ratio.abs() < 0.99
    assert 0.001 < float((~inside).double().mean()) < 0.5
    assert torch.equal(level[~inside].abs(), torch.full_like(level[~inside], 1).mul(outer))
    slope = torch.where(inside, level - ratio, level)
    expected = strength * (seen.double() * slope).sum(1) / math.sqrt(weight.numel() * outer)
    torch.testing.assert_close(layer.scale.grad.double(), expected, rtol=1e-4, atol=1e-7)
    passed = torch.where(inside, 1.0, 1 - strength)
    torch.testing.assert_close(layer.weight.grad, (seen * passed).float())


@pytest.mark.parametrize("name", LEARNED)
def test_scales_start_where_they_lose_least(name):
    weight = gaussian(8, 4096)
    layer = layer_of(weight, name)

    def loss(factor: float) -> float:
        layer.scale.data = start * factor
        layer.refresh()
        return float((layer.rounded - weight).square().mean() / weight.square().mean())

    start = layer.scale.detach().clone()
    best = loss(1.0)
    assert best < {"seq_ternary": 0.195, "seq_2bit": 0.123}[name]
    assert best < 1.01 * min(loss(factor) for factor in (0.8, 0.9, 1.1, 1.2))
    assert loss(float(weight.abs().max() / start.mean())) > 1.5 * best  # ParetoQ's start


def test_dead_weights_feed_a_bias_and_learn_from_it():
    linear = nn.Linear(256, 16)
    layer = TernaryLinear(linear, quantizer="tequila", dead_bias=0.1)
    x = torch.randn(5, 256)
    codes, scales = (each.double() for each in layer.round())
    dead = (codes == 0).double()
    bias = linear.bias.double() + 0.1 * (linear.weight.double() * dead).sum(1)
    torch.testing.assert_close(layer(x).double(), x.double() @ (codes * scales).T + bias, rtol=1e-5, atol=1e-6)
    seen = torch.randn(5, 16)
    layer(x).backward(seen)
    expected = seen.double().T @ x.double() + 0.1 * dead * seen.double().sum(0)[:, None]
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, seen.sum(0))


def test_exact_scales_are_near():
    scales = torch.logspace(-4, 4, 1000)
    assert torch.all((exact_scale(scales) / scales - 1).abs() < 2**-8)


def test_a_bias_strength_for_a_rule_without_bias_is_refused():
    with pytest.raises(ValueError, match="tequila"):
        TernaryConfig(quantizer="twn", dead_bias=1e-3)
