"""LOST: its columns come from the true weight, its branches follow the formula, its costs are those that it says."""

import pytest
import torch
from methods import Loop, difference, logits, prepared, small_model
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgewright.compress.factors import FactoredLinear, split
from edgewright.compress.lost import LostConfig

OUT, IN, RANK = 48, 80, 12


def weight(seed=0):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score_rank", [5, 256])
def test_the_columns_are_the_largest_of_the_explicit_remainder(score_rank):
    w0 = weight()
    u, s, vh = torch.linalg.svd(w0.double(), full_matrices=False)
    rest = slice(RANK, RANK + score_rank)
    remainder = u[:, rest] @ torch.diag(s[rest]) @ vh[rest]
    largest = remainder.norm(dim=0).argsort(descending=True)[:9]
    parts = split(w0, RANK, columns=9, score_rank=score_rank)
    assert parts.index.tolist() == sorted(largest.tolist())
    assert parts.index.dtype == torch.int32


def test_without_a_remainder_the_columns_are_the_largest_of_the_weight():
    w0 = weight()
    largest = w0.norm(dim=0).argsort(descending=True)[:9]
    assert split(w0, min(w0.shape), columns=9, score_rank=256).index.tolist() == sorted(largest.tolist())


def test_the_score_finds_a_column_that_the_factors_miss():
    w0 = torch.outer(torch.linspace(1, 2, OUT), torch.linspace(1, 2, IN))
    w0[:, 30] += 0.1 * weight()[:, 0]
    w0[:, 3] += 0.1 * weight()[:, 1]
    assert split(w0, 1, columns=2, score_rank=256).index.tolist() == [3, 30]


def test_a_layer_holds_the_factors_and_the_initial_columns():
    model, _ = prepared(LostConfig(rank=32, columns=0.05, gamma=0.6, score_rank=64))
    dense = dict(small_model().named_modules())
    for name, layer in model.named_modules():
        if not isinstance(layer, FactoredLinear):
            continue
        w0 = dense[name].weight.detach()
        assert len(layer.index) == max(1, w0.shape[1] * 5 // 100)
        assert torch.equal(layer.columns.weight, w0[:, layer.index])
        assert layer.index.tolist() == sorted(set(layer.index.tolist()))
        assert layer.mix == 0.6 and layer.activation == "silu"
        up, down = layer.up.weight.detach().double(), layer.down.weight.detach().double()
        values = torch.linalg.svdvals(w0.double())[:32]
        assert float((up.T @ up - torch.diag(values)).norm() / values.norm()) < 1e-6
        assert float((down @ down.T - torch.diag(values)).norm() / values.norm()) < 1e-6


def test_there_is_always_a_column():
    model, _ = prepared(LostConfig(rank=32, columns=0.001))
    assert {len(m.index) for m in model.modules() if isinstance(m, FactoredLinear)} == {1}


def test_columns_never_move_and_come_back_with_the_state():
    model, method = prepared(LostConfig(rank=32))
    kept = {name: index.clone() for name, index in method.state_dict().items()}
    Loop(model, method).run(3)
    other_model, other = prepared(LostConfig(rank=32), seed=3)
    index = other_model.model.layers[0].mlp.up_proj.index
    assert not torch.equal(index, kept["model.layers.0.mlp.up_proj"])
    other.load_state_dict(method.state_dict())
    assert torch.equal(index, kept["model.layers.0.mlp.up_proj"])
    assert all(torch.equal(kept[name], index) for name, index in method.state_dict().items())


def test_with_an_activation_the_finished_model_keeps_both_branches():
    model, method = prepared(LostConfig(rank=32))
    Loop(model, method).run(2)
    finished, lattice = method.finish(model)
    assert not lattice
    kept = finished.model.layers[1].mlp.down_proj
    assert isinstance(kept, FactoredLinear) and not kept.merges
    assert difference(logits(finished), logits(model)) == 0


def test_costs_are_those_of_the_formula_and_of_torch():
    model, method = prepared(LostConfig(rank=32, columns=0.05))
    parameters = flops = 0
    for name, linear in small_model().named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            columns = int(0.05 * linear.in_features)
            parameters += 32 * (linear.in_features + linear.out_features) + columns * linear.out_features
            flops += 2 * 32 * (linear.in_features + linear.out_features) + 2 * columns * linear.out_features
    numbers = method.describe(model).numbers
    assert (numbers["parameters"], numbers["flops"]) == (parameters, flops)
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(6, layer.in_features, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 6 * layer.flops()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 8, "columns": 0.0}, "greater than 0"),
        ({"rank": 8, "columns": 1.1}, "less than or equal to 1"),
        ({"rank": 8, "gamma": 1.0}, "less than 1"),
        ({"rank": 8, "restart_every": 50}, "cannot be refactored"),
        ({}, "exactly one of rank"),
    ],
)
def test_settings_without_sense_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        LostConfig(**settings)
