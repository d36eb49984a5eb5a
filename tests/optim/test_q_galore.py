"""Q-GaLore: GaLore's steps but for four bits of the projection, which is taken anew only where it changes."""

import pytest
import torch
from torch import nn

from edgewright.optim import GaLore, QGaLore
from edgewright.optim.int8_weight import Int8Weight
from edgewright.optim.projection import svd_projection
from edgewright.optim.q_galore import _keep, _kept

SHAPES = [(96, 64), (64, 96), (50, 50)]


def gradient(shape, seed):
    """Of low rank, but for noise, and with the same leading vectors whatever the seed."""
    fixed = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], 4, generator=fixed), torch.randn(4, shape[1], generator=fixed)
    scale = torch.tensor([8.0, 4.0, 2.0, 1.0])
    return (left * scale) @ right + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1 + seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_projection_in_four_bits_is_off_by_half_a_step_of_its_group_at_most(shape):
    projection = svd_projection(gradient(shape, 0), 8)
    state = {}
    _keep(state, projection)
    kept = _kept(state, tuple(projection.shape))
    steps = state["projection_scale"].repeat_interleave(256)[: projection.numel()].view(projection.shape)
    assert ((kept - projection).abs() <= 0.5001 * steps).all()
    assert state["projection"].numel() == -(-projection.numel() // 256) * 128
    assert (state["projection_scale"] <= 1.1 * (projection.max() - projection.min()) / 15).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_steps_are_galores_but_for_rounding(shape):
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    settings = {"lr": 1e-2, "rank": 4, "update_proj_gap": 100}
    q_galore, galore = QGaLore([ours], **settings, states="fp32"), GaLore([theirs], **settings)
    for step in range(10):
        ours.grad = gradient(shape, step)
        theirs.grad = ours.grad.clone()
        q_galore.step()
        galore.step()
    likeness = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert 0.85 < likeness < 0.999
    assert float(ours.detach().norm() / theirs.detach().norm()) == pytest.approx(1.0, abs=0.1)


def refreshes(gradients, **settings):
    """The steps at which the projection was taken anew."""
    weight = nn.Parameter(torch.zeros(gradients[0].shape))
    optimizer = QGaLore([weight], lr=1e-3, rank=4, **settings)
    found = []
    for step, value in enumerate(gradients):
        weight.grad = value
        optimizer.step()
        if int(optimizer.state[weight]["refreshed"]) == step:
            found.append(step)
    return found


def test_the_gap_doubles_once_five_refreshes_changed_little_whatever_the_signs():
    """The leading vectors stay, and their signs flip, since a gradient's do."""
    gradients = [gradient((64, 96), step) * (-1) ** (step // 2) for step in range(60)]
    assert refreshes(gradients, update_proj_gap=2) == [0, 2, 4, 6, 8, 10, 14, 22, 38]


def test_the_gap_stays_where_the_subspace_changes():
    torch.manual_seed(0)
    gradients = [torch.randn(64, 96) for _ in range(30)]
    assert refreshes(gradients, update_proj_gap=2) == list(range(0, 30, 2))


def test_the_state_goes_on_with_the_same_bits_and_is_as_large_as_predicted():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(96, 64)) for _ in range(2)]
    first, second = (QGaLore([weight], rank=48, update_proj_gap=2) for weight in weights)
    for step in range(13):
        weights[0].grad = gradient((96, 64), step)
        first.step()
    state = first.state[weights[0]]
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == first.state_bytes()
    assert state["exp_avg"].dtype == torch.uint8
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(first.state_dict())
    for step in range(13, 25):
        for weight, optimizer in zip(weights, (first, second), strict=True):
            weight.grad = gradient((96, 64), step)
            optimizer.step()
    assert torch.equal(weights[0], weights[1])
    assert int(second.state[weights[1]]["gap"]) > 2


def test_it_trains_weights_in_eight_bits():
    torch.manual_seed(0)
    target = 0.02 * torch.randn(128, 64)
    weight = nn.Parameter(Int8Weight.narrowed(torch.zeros(128, 64)))
    optimizer = QGaLore([weight], lr=2e-3, rank=16, update_proj_gap=10, scale=1.0)
    for _ in range(100):
        weight.grad = (weight.dequantized() - target).detach()
        optimizer.step()
    assert (weight.dequantized() - target).norm() < 0.5 * target.norm()
