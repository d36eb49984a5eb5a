"""Rounding to bfloat16: right on average, exact where it can be, and the same for the same generator."""

import pytest
import torch

from edgewright.optim.stochastic_rounding import round_to_bf16


@pytest.mark.parametrize("value", [1.001, -1.001, 3.3e-5, 1.003e30, -7.0 / 3])
def test_it_is_right_on_average_where_rounding_to_nearest_is_not(value):
    torch.manual_seed(0)
    values = torch.full((200_000,), value)
    rounded = round_to_bf16(values).double()
    low, high = rounded.min(), rounded.max()
    unit = high - low
    assert unit > 0 and torch.isin(rounded, torch.stack([low, high])).all()
    exact = torch.tensor(value).double()
    assert low <= exact <= high and unit <= 2.0**-7 * abs(exact)
    assert abs(rounded.mean() - exact) < 0.01 * unit
    assert abs(values.bfloat16().double().mean() - exact) > 0.1 * unit


def test_what_bfloat16_holds_is_kept_and_so_is_what_is_no_number():
    torch.manual_seed(0)
    values = torch.randn(10_000).bfloat16().float()
    assert torch.equal(round_to_bf16(values).float(), values)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40])
    rounded = round_to_bf16(special)
    assert rounded[0] == torch.inf and rounded[1] == -torch.inf and rounded[2].isnan()
    assert torch.equal(rounded[3:5].view(torch.int16), special[3:5].bfloat16().view(torch.int16))


def test_the_generator_decides():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    one, same, other = (round_to_bf16(values, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.manual_seed(5)
    default = round_to_bf16(values)
    torch.manual_seed(5)
    assert torch.equal(round_to_bf16(values), default)


def test_a_view_is_rounded_by_its_values():
    values = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(round_to_bf16(values.t()).float(), values.t())
