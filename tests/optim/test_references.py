"""APOLLO and GaLore take the very steps of the public packages, with their seeds."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn

from edgewright.optim import Apollo, ApolloMini, Fira, GaLore

STEPS = 50
GAP = 20


def package(module):
    """An optimizer class of a public package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module).AdamW
        except ModuleNotFoundError as missing:
            pytest.skip(f"{missing.name} is not installed")


def network():
    """Matrices that are higher, wider and square; vectors; and an embedding that is not projected."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 16)
    )


def groups(model, **options):
    matrices = [module.weight for module in model if isinstance(module, nn.Linear)]
    rest = [parameter for parameter in model.parameters() if all(parameter is not each for each in matrices)]
    return [{"params": rest}, {"params": matrices, **options}]


def train(model, optimizer, gradients=None):
    """The parameters after each step on a fixed regression, and the gradients; or on gradients that are given."""
    torch.manual_seed(1)
    weights, seen = [], []
    for step in range(STEPS):
        tokens, target = torch.randint(50, (32,)), torch.randn(32, 16)
        (model(tokens) - target).square().mean().backward()
        for number, parameter in enumerate(model.parameters()):
            if gradients is not None:
                parameter.grad = gradients[step][number].clone()
        seen.append([parameter.grad for parameter in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    return weights, seen


def same_steps(ours, theirs, ours_model, theirs_model, *, given=False):
    """
    Args:
        given: hand the gradients of our run to theirs. The sign of a singular vector hangs on the last bits, and
            moments outlive it, so that two runs of even the same code part ways when a bit differs.
    """
    start = [parameter.detach().clone() for parameter in ours_model.parameters()]
    mine, gradients = train(ours_model, ours)
    other, _ = train(theirs_model, theirs, gradients if given else None)
    for step in range(STEPS):
        for number, (a, b, first) in enumerate(zip(mine[step], other[step], start, strict=True)):
            worst = float((a - b).norm() / b.norm())
            assert worst < 1e-6, (step, number, worst)
            assert not torch.equal(a, first)


@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_apollo_is_that_of_apollo_torch(proj, decay):
    reference = package("apollo_torch.apollo")
    ours, theirs = network(), network()
    options = {"rank": 6, "update_proj_gap": GAP, "scale": 0.25}
    package_options = options | {"proj": proj, "proj_type": "std", "scale_type": "channel"}
    rest, matrices = groups(ours, **options, proj=proj)
    same_steps(
        Apollo([{**rest, "rank": None}, matrices], lr=0.01, weight_decay=decay),
        reference(groups(theirs, **package_options), lr=0.01, weight_decay=decay),
        ours,
        theirs,
        given=proj == "svd",
    )


@pytest.mark.parametrize("front", [False, True])
def test_apollo_mini_is_that_of_apollo_torch(front):
    reference = package("apollo_torch.apollo")
    ours, theirs = network(), network()
    options = {"rank": 1, "update_proj_gap": GAP, "scale": 128.0}
    package_options = options | {"proj": "random", "proj_type": "std", "scale_type": "tensor"}
    rest, matrices = groups(ours, **options)
    same_steps(
        ApolloMini([{**rest, "rank": None}, matrices], lr=0.005, scale_front=front),
        reference(groups(theirs, **package_options), lr=0.005, scale_front=front),
        ours,
        theirs,
    )


def test_galore_is_that_of_galore_torch():
    reference = package("galore_torch.adamw")
    ours, theirs = network(), network()
    options = {"rank": 6, "update_proj_gap": GAP, "scale": 0.25}
    rest, matrices = groups(ours, **options)
    same_steps(
        GaLore([{**rest, "rank": None}, matrices], lr=0.01, weight_decay=0.05),
        reference(groups(theirs, **options, proj_type="std"), lr=0.01, weight_decay=0.05, no_deprecation_warning=True),
        ours,
        theirs,
        given=True,
    )


@pytest.mark.parametrize("released", [False, True])
def test_fira_by_hand(released):
    """Three steps of the formulas of its paper, and of its code, written out in float64."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    expected, lr, alpha, rank = weight.detach().clone(), 0.01, 0.5, 3
    optimizer = Fira([{"params": [weight], "rank": rank}], lr=lr, scale=alpha, released=released)
    first, second, norm = torch.zeros(12, rank).double(), torch.zeros(12, rank).double(), None
    for step in range(1, 4):
        gradient = torch.randn(12, 8, dtype=torch.float64) * step**2
        if step == 1:
            basis = torch.linalg.svd(gradient)[2][:rank]
        low = gradient @ basis.T
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        direction = first / (second.sqrt() + 1e-6)
        residual = gradient - (alpha if released else 1) * low @ basis
        residual = residual * (direction.norm(dim=1) / (low.norm(dim=1) + 1e-8))[:, None]
        if norm is not None:
            residual = residual / (max(residual.norm() / (norm + 1e-8), 1.01) / 1.01)
        norm = residual.norm()
        update = alpha * direction @ basis + (1 if released else alpha) * residual
        expected -= lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step) * update
        weight.grad = gradient
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-7, atol=1e-9)


def test_the_adamw_of_the_rest_is_that_of_the_packages():
    """And not torch's, which adds eps to the corrected root: with small gradients that is another step."""
    reference = package("apollo_torch.apollo")
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(3, 5))]
    theirs = copy.deepcopy(ours)
    mine = Apollo([{"params": ours, "rank": None}], lr=0.01, weight_decay=0.3)
    other = reference(theirs, lr=0.01, weight_decay=0.3)
    for _ in range(STEPS):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = 1e-5 * torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
