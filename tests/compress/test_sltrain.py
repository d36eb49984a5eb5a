"""SLTrain: the gradient of the built weight, the exact support, what is kept for the backward, and what it costs."""

import pytest
import torch
from methods import Loop, difference, prepared, small_model, tokens
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgewright.compress.sltrain import SLTrainConfig
from edgewright.compress.sparse_lowrank import SparseLowRankLinear

OUT, IN, RANK = 24, 40, 6


def layer(*, density=0.1, scale=0.5, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    made = SparseLowRankLinear(nn.Linear(IN, OUT, bias=bias), rank=RANK, scale=scale, density=density)
    nn.init.normal_(made.up)  # 0 at the start, and then A has no gradient
    return made.to(dtype)


def dense(made):
    """W by its definition, entry by entry."""
    weight = made.scale * made.up.detach().double() @ made.down.detach().double()
    for place, value in zip(made.index.tolist(), made.values.detach().double(), strict=True):
        weight[place // IN, place % IN] += value
    return weight


def test_forward_is_the_definition():
    made = layer(dtype=torch.float64)
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    torch.testing.assert_close(made(x).detach(), x @ dense(made).T + made.bias.detach())
    torch.testing.assert_close(made.effective_weight().detach(), dense(made))


def test_gradients_pass_gradcheck():
    made = layer(dtype=torch.float64)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)

    def forward(x, up, down, values, bias):
        parameters = {"up": up, "down": down, "values": values, "bias": bias}
        return torch.func.functional_call(made, parameters, (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in (made.up, made.down, made.values, made.bias)))
    assert torch.autograd.gradcheck(forward, inputs)


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward():
    made, kept = layer(), []
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    assert sorted(t.numel() for t in kept) == sorted(
        t.numel() for t in (x, made.up, made.down, made.values, made.index)
    )
    assert max(t.numel() for t in kept) < OUT * IN


def test_under_autocast_the_products_are_bf16_and_the_gradients_float32():
    made = layer()
    x = torch.randn(64, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in made.parameters()} == {torch.float32}
    exact = layer()
    (exact(x.detach()) ** 2).sum().backward()
    for ours, theirs in zip(made.parameters(), exact.parameters(), strict=True):
        assert difference(ours.grad, theirs.grad) < 0.03


@pytest.mark.parametrize("density", [0.03, 0.1, 1.0, 1e-9])
def test_the_support_has_exactly_its_size_once_each(density):
    made = layer(density=density)
    count = max(1, int(density * OUT * IN))
    assert len(made.values) == len(made.index) == len(set(made.index.tolist())) == count
    assert made.index.dtype == torch.int32
    assert made.index.tolist() == sorted(made.index.tolist())
    assert int(made.index.min()) >= 0 and int(made.index.max()) < OUT * IN


def test_it_starts_as_in_the_paper():
    made = SparseLowRankLinear(nn.Linear(IN, OUT), rank=RANK, scale=0.5, density=0.5)
    assert not made.up.any()
    assert float(made.down.detach().abs().max()) <= IN**-0.5
    assert 0.9 * IN**-0.5 < float(made.values.detach().abs().max()) <= IN**-0.5


def test_the_support_stays_and_comes_back_with_the_state():
    model, method = prepared(SLTrainConfig(rank=8))
    kept = {name: index.clone() for name, index in method.state_dict().items()}
    Loop(model, method).run(3)
    _, other = prepared(SLTrainConfig(rank=8), seed=3)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(other.state_dict()[name], kept[name])
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(kept[name], index) for name, index in other.state_dict().items())


def test_spectral_start_keeps_what_it_can_of_the_weights():
    model, _ = prepared(SLTrainConfig(rank=64, density=0.1, init="spectral"))
    w0 = small_model().model.layers[0].mlp.up_proj.weight.detach()
    made = model.model.layers[0].mlp.up_proj
    product = made.scale * made.up.detach() @ made.down.detach()
    remainder = torch.linalg.svdvals(w0.double())[64:].norm()
    assert float((w0 - product).double().norm()) == pytest.approx(float(remainder), rel=1e-5)
    places = made.index.long()
    torch.testing.assert_close(made.effective_weight().detach().flatten()[places], w0.flatten()[places])


def test_a_restart_balances_the_factors_and_keeps_the_weight():
    model, method = prepared(SLTrainConfig(rank=8, restart_every=2, reset=False))
    loop = Loop(model, method)
    loop.run(1)
    made = model.model.layers[0].mlp.up_proj
    up, down = made.up.detach().double(), made.down.detach().double()
    assert float((up.T @ up - down @ down.T).norm() / (down @ down.T).norm()) > 0.1
    loop.run(1)
    up, down = made.up.detach().double(), made.down.detach().double()
    assert float((up.T @ up - down @ down.T).norm() / (down @ down.T).norm()) < 1e-6


def test_costs_are_those_of_the_formula_and_of_torch():
    model, method = prepared(SLTrainConfig(rank=16, density=0.03))
    loop = Loop(model, method)
    loop.run(2)
    expected = sum(
        16 * (linear.in_features + linear.out_features) + int(0.03 * linear.in_features * linear.out_features)
        for name, linear in small_model().named_modules()
        if isinstance(linear, nn.Linear) and name != "lm_head"
    )
    numbers = method.describe(model).numbers
    assert numbers["parameters"] == expected
    assert numbers["density"] == pytest.approx(0.03, abs=1e-4)
    inside = [p for m in model.modules() if isinstance(m, SparseLowRankLinear) for p in m.parameters()]
    assert sum(loop.optimizer.state[p]["exp_avg"].nbytes for p in inside) == 4 * expected
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert sum(p.grad.nbytes for p in inside) == 4 * expected
    made = layer(bias=False)
    x = torch.randn(100, IN, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        made(x).sum().backward()
    # dense forward and backward; W built twice; the gradients of both factors
    assert counter.get_total_flops() == 3 * 100 * made.flops() + 4 * made.flops_per_forward()
    assert numbers["without_saving"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 8, "density": 0.0}, "greater than 0"),
        ({"rank": 8, "density": 1.5}, "less than or equal to 1"),
        ({"rank": 8, "alpha": 0}, "greater than 0"),
        ({"rank": 8, "restart_every": 10}, "rewarm_steps"),
    ],
)
def test_settings_without_sense_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        SLTrainConfig(**settings)
