"""GradNormLoRP does what its paper says, which its released code does not."""

import pytest
import torch
from torch import nn

from edgewright.optim import GradNormLoRP
from edgewright.optim.gradnorm_lorp import weight_norm_gradients


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_gradients_of_magnitude_and_direction_are_autograds(shape):
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape[0], 1, dtype=torch.float64, requires_grad=True)  # of either sign
    length = v.norm(dim=1, keepdim=True)
    weight = g * v / length
    (weight.sin().sum() + (weight**3).mean()).backward()
    gradient = torch.autograd.grad(
        (lambda w: w.sin().sum() + (w**3).mean())(leaf := weight.detach().requires_grad_()), leaf
    )[0]
    dg, dv = weight_norm_gradients(gradient, g.detach(), (v / length).detach(), length.detach())
    torch.testing.assert_close(dg, g.grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(dv, v.grad, rtol=1e-13, atol=1e-15)
    assert (dv * v.detach()).sum(dim=1).abs().max() < 1e-14


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_its_steps_are_those_of_an_explicit_magnitude_and_direction(shape):
    """Written out in float64 with autograd, v kept whole: ours has W alone. Over a change of the subspace."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    rank, lr, scale = 3, 2.0, 0.1  # so large that magnitudes change their sign
    optimizer = GradNormLoRP([{"params": [weight], "rank": rank}], lr=lr, scale=scale, update_proj_gap=4)
    v = weight.detach().clone().requires_grad_()
    g = v.detach().norm(dim=1, keepdim=True).requires_grad_()
    right = shape[0] >= shape[1]
    moments = {name: [0.0, 0.0] for name in ("g", "v")}

    def direction(name, gradient):
        first, second = moments[name]
        moments[name] = [0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2]
        return moments[name][0] / (moments[name][1].sqrt() + 1e-6)

    signs = set()
    for step in range(1, 11):
        coefficients = torch.randn(shape, dtype=torch.float64)
        loss = (coefficients * (g * v / v.norm(dim=1, keepdim=True))).sum()
        dg, dv = torch.autograd.grad(loss, [g, v])
        if step % 4 == 1:
            left_vectors, _, right_vectors = torch.linalg.svd(dv, full_matrices=False)
            basis = right_vectors[:rank] if right else left_vectors[:, :rank]
        low = dv @ basis.T if right else basis.T @ dv
        rate = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        with torch.no_grad():
            g -= rate * direction("g", dg)
            moved = direction("v", low)
            v -= rate * scale * (moved @ basis if right else basis @ moved)
            expected = g * v / v.norm(dim=1, keepdim=True)
        weight.grad = coefficients
        optimizer.step()
        signs |= set(g.sign().flatten().tolist())
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-10)
        state = optimizer.state[weight]
        torch.testing.assert_close(state["magnitude"], g.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(weight.detach().norm(dim=1, keepdim=True), state["magnitude"].abs())
    assert signs == {-1.0, 1.0}


def test_a_row_of_zeros_stays():
    """It has no direction; a mask made it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 12))
    optimizer = GradNormLoRP([{"params": [weight], "rank": 2}], lr=0.1)
    for step in range(4):
        if step == 1:
            weight.data[3] = 0
        weight.grad = torch.randn(8, 12)
        optimizer.step()
    assert weight.isfinite().all() and not weight[3].any() and weight[2].all()


def test_what_was_done_to_the_weight_in_between_counts():
    """Magnitudes are those of the weight as it is, so halving it halves them."""
    weight = nn.Parameter(torch.ones(8, 12))
    optimizer = GradNormLoRP([{"params": [weight], "rank": 2}], lr=1e-6)
    weight.grad = torch.randn(8, 12)
    optimizer.step()
    weight.data /= 2
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((8, 12), 0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(optimizer.state[weight]["magnitude"], torch.full((8, 1), 3**0.5), rtol=1e-4, atol=0)


def test_its_state_is_smaller_than_adamws():
    weight = nn.Parameter(torch.empty(1024, 1024, device="meta"))
    assert GradNormLoRP([{"params": [weight], "rank": 0.25}]).state_bytes() < 0.4 * 8 * weight.numel()
