"""Sherry's annealed residual (Arenas): what it adds to forward and gradients, when, and that nothing of it is left."""

import math

import numpy as np
import pytest
import torch
from methods import Loop, logits, prepared
from pydantic import ValidationError
from torch import nn

from edgewright.compress.quantizers import residual_share
from edgewright.compress.ternary import TernaryConfig
from edgewright.compress.ternary_linear import TernaryLinear

SHERRY = TernaryConfig(quantizer="sherry", layers=("q_proj", "down_proj"))


@pytest.mark.parametrize("total", [1, 5, 9, 10, 100, 22_111])
def test_it_rises_for_a_tenth_of_the_steps_and_fades_to_nothing_in_the_last(total):
    shares = [residual_share(step, total) for step in range(total)]
    warmup = total // 10
    assert shares[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert all(a > b for a, b in zip(shares[max(0, warmup - 1) :], shares[max(1, warmup) :], strict=False))
    assert shares[-1] == 0 == residual_share(total, total)
    if total == 100:
        assert shares[54] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2))) and max(shares) == shares[9] == 1


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_forward_and_gradient_are_those_of_the_formula_in_float64(strength):
    """y = x ((1 - lambda) W + lambda (Q + eps W))^T, and the gradient of W is (1 + lambda eps) times the identity's."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 16)
    layer = TernaryLinear(linear, quantizer="sherry")
    layer.residual, layer.strength = 0.7, strength
    x, seen = torch.randn(5, 64), torch.randn(5, 16)
    layer(x).backward(seen)
    codes, scales = (each.double() for each in layer.round())
    weight = linear.weight.detach().double()
    used = (1 - strength) * weight + strength * (codes * scales + 0.7 * weight)
    expected = x.double() @ used.T + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    gradient = (1 + 0.7 * strength) * (seen.double().T @ x.double())
    torch.testing.assert_close(layer.weight.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_every_step_has_its_share_and_the_last_one_none():
    model, method = prepared(SHERRY)
    loop, layer = Loop(model, method, total_steps=10), model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.residual))
    for step in range(10):
        loop.run(1)
        used = seen[-1] * layer.weight.detach()
        assert seen[-1] == residual_share(step, 10) and (step == 9) == (float(used.abs().max()) == 0)
    trained = layer.effective_weight().detach().numpy()
    finished, lattice = method.finish(model)
    assert np.array_equal(trained, lattice["model.layers.0.self_attn.q_proj.weight"].dequantize())
    assert torch.equal(logits(finished), logits(model))


def test_on_the_way_evaluation_and_the_finished_model_have_none_and_training_goes_on_with_it():
    model, method = prepared(SHERRY)
    Loop(model, method, total_steps=10).run(4)
    layer = model.model.layers[0].self_attn.q_proj
    training = layer.effective_weight().detach().clone()
    finished, lattice = method.finish(model)
    plain = lattice["model.layers.0.self_attn.q_proj.weight"].dequantize()
    assert not np.array_equal(training.numpy(), plain)
    assert torch.equal(logits(finished), logits(model))
    assert np.array_equal(layer.effective_weight().detach().numpy(), plain)
    model.train()
    assert torch.equal(layer.effective_weight(), training)


def test_without_it_sherry_is_plain_rounding():
    model, method = prepared(SHERRY.model_copy(update={"residual": 0.0}))
    Loop(model, method, total_steps=10).run(3)
    layer = model.model.layers[0].self_attn.q_proj
    assert np.array_equal(layer.effective_weight().detach().numpy(), layer.lattice().dequantize())


def test_other_rules_have_none():
    with pytest.raises(ValidationError, match="residual is of quantizer: sherry alone"):
        TernaryConfig(residual=0.5)
