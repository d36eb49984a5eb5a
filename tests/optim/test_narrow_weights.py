"""Weights in eight bits and in bfloat16: to autograd and to optimizers they are float32 parameters, in memory not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgewright.optim.bf16_weight import Bf16Weight
from edgewright.optim.int8_weight import GROUP, Int8Weight
from edgewright.optim.narrow_weight import NarrowWeight

KINDS = [Int8Weight, Bf16Weight]


def weight(shape=(64, 128), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize(
    "low, high", [(0.5, 1.0), (-1.0, -0.5), (-0.3, 1.0), (1e-6, 2e-6), (-1e-30, 1.0)], ids=lambda value: str(value)
)
def test_no_value_of_a_group_is_off_by_more_than_half_a_step_whatever_its_signs(low, high):
    values = torch.rand(16, GROUP, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    narrow = Int8Weight.narrowed(values)
    step = (max(high, 0) - min(low, 0)) / 255
    assert (narrow.dequantized() - values).abs().max() <= 0.51 * step


def test_a_group_of_zeros_stays_zero_and_can_leave_it():
    narrow = Int8Weight.narrowed(torch.zeros(2, GROUP))
    assert (narrow.dequantized() == 0).all()
    narrow.add_(1e-7)
    assert narrow.dequantized().mean() == pytest.approx(1e-7, rel=1e-3)


def test_a_number_of_weights_that_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 50\) are no multiple of 128"):
        Int8Weight.narrowed(torch.zeros(3, 50))


@pytest.mark.parametrize("kind", KINDS)
def test_writing_is_right_on_average_at_the_ends_of_a_group_too(kind):
    """The reference's rounding clamps at the ends, and draws the largest weights towards zero step by step."""
    torch.manual_seed(0)
    values = weight((1, GROUP))
    total = torch.zeros_like(values, dtype=torch.float64)
    narrow = kind.narrowed(torch.zeros_like(values))
    for _ in range(4000):
        narrow.copy_(values)
        total += narrow.dequantized()
    error = total / 4000 - values
    step = (values.max() - values.min()) / 255 if kind is Int8Weight else values.abs().max() / 128
    assert error.abs().max() < 0.05 * step
    assert (kind.narrowed(values).dequantized() - values).abs().max() > 0.2 * step


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_smaller_than_the_rounding_step_is_made_on_average(kind):
    torch.manual_seed(0)
    narrow = kind.narrowed(weight((256, 256)))
    start = narrow.dequantized()
    for _ in range(20):
        narrow.add_(1e-6)
    assert (narrow.dequantized() - start).mean() == pytest.approx(2e-5, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_again_and_again_unchanged_keeps_its_values(kind):
    torch.manual_seed(0)
    narrow = kind.narrowed(weight())
    before = narrow.dequantized()
    for _ in range(50):
        narrow.mul_(1.0)
    assert ((narrow.dequantized() - before).abs() <= 1e-6 * before.abs().max()).float().mean() > 0.999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradients_are_those_of_the_dequantized_layer(kind, dtype):
    narrow = nn.Parameter(kind.narrowed(weight()))
    plain = nn.Parameter(narrow.dequantized().detach().clone())
    results = []
    for parameter in (narrow, plain):
        x = torch.randn(4, 7, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = F.linear(x, parameter)
        y.float().square().sum().backward()
        results.append((y, parameter.grad, x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert type(ours) is torch.Tensor and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_no_float_copy_is_saved_for_backward(kind, autocast):
    saved = []
    parameter = nn.Parameter(kind.narrowed(weight()))
    x = torch.randn(5, 128, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        F.linear(F.linear(x, parameter), parameter.t())
    assert sum(isinstance(tensor, NarrowWeight) for tensor in saved) >= 2
    assert all(tensor.numel() < parameter.numel() for tensor in saved if not isinstance(tensor, NarrowWeight))
    stored = {part.data_ptr() for part in parameter.parts.values()}
    kept = {part.data_ptr() for t in saved if isinstance(t, NarrowWeight) for part in t.parts.values()}
    assert kept == stored


def test_memory_is_one_byte_and_two_a_weight():
    assert Int8Weight.narrowed(weight()).stored_bytes / weight().numel() == pytest.approx(1 + 5 / GROUP)
    assert Bf16Weight.narrowed(weight()).stored_bytes == 2 * weight().numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_adamw_of_torch_takes_the_steps_that_it_takes_on_floats(kind, how):
    torch.manual_seed(0)
    narrow = [nn.Parameter(kind.narrowed(weight(seed=seed))) for seed in range(2)]
    plain = [nn.Parameter(parameter.dequantized().detach().clone()) for parameter in narrow]
    start = [parameter.detach().clone() for parameter in plain]
    ours, theirs = torch.optim.AdamW(narrow, lr=3e-3, **how), torch.optim.AdamW(plain, lr=3e-3, **how)
    direction = torch.randn(64, 128)
    for _ in range(15):
        gradient = direction + 0.3 * torch.randn(64, 128)
        for parameter in [*narrow, *plain]:
            parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(narrow, 1.0)
        nn.utils.clip_grad_norm_(plain, 1.0)
        ours.step()
        theirs.step()
    for a, b, c in zip(narrow, plain, start, strict=True):
        assert (a.dequantized() - b).norm() < 0.05 * (b - c).norm()
        assert all(type(value) is torch.Tensor for value in ours.state[a].values())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_copies_and_casts_share_but_cannot_be_written(kind):
    parameter = nn.Parameter(kind.narrowed(weight()))
    twin, clone = copy.deepcopy(parameter), parameter.detach().clone()
    cast = parameter.detach().to(torch.bfloat16)
    before = parameter.dequantized().detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    assert torch.equal(twin.dequantized(), before) and torch.equal(clone.dequantized(), before)
    assert torch.equal(cast.dequantized(), parameter.dequantized().bfloat16())
    with pytest.raises(TypeError, match="shares the weight"):
        cast.add_(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_that_would_lose_what_is_written_there_is_refused(kind):
    parameter = kind.narrowed(weight())
    for view in (lambda: parameter[3], lambda: parameter.view(-1), lambda: parameter[:, :5], parameter.diagonal):
        with pytest.raises(TypeError, match="would be lost"):
            view()
    assert torch.equal(parameter.t().dequantized(), parameter.dequantized().t())
    assert torch.equal(parameter.transpose(0, 1).t().dequantized(), parameter.dequantized())
    assert parameter.transpose(0, 0).shape == parameter.shape and parameter.view(64, 128).shape == (64, 128)
    assert torch.equal(parameter.permute(1, 0).dequantized(), parameter.dequantized().t())


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_copying_between_weights_keeps_the_bits(kind):
    layer = nn.Linear(128, 64, bias=False)
    layer.weight = nn.Parameter(kind.narrowed(weight()))
    before = {name: part.clone() for name, part in layer.weight.parts.items()}
    layer.to("cpu", torch.float32)
    other = kind.narrowed(weight(seed=9))
    other.copy_(layer.weight.detach())
    for holder in (layer.weight, other):
        assert isinstance(holder, kind)
        assert all(torch.equal(part, before[name]) for name, part in holder.parts.items())
    plain = torch.empty(64, 128).copy_(other)
    assert torch.equal(plain, other.dequantized())


def test_an_embedding_in_bf16_looks_up_rows_and_may_be_the_head():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
    reference = nn.Embedding(50, 32)
    embedding.weight = head.weight = nn.Parameter(Bf16Weight.narrowed(embedding.weight))
    reference.weight = nn.Parameter(head.weight.dequantized().detach().clone())
    ids = torch.randint(0, 50, (2, 9))
    F.cross_entropy(head(embedding(ids)).flatten(0, 1), ids.flatten()).backward()
    F.cross_entropy(F.linear(reference(ids), reference.weight).flatten(0, 1), ids.flatten()).backward()
    assert torch.equal(head.weight.grad, reference.weight.grad)


def test_rows_of_a_bf16_weight_share_what_it_stores():
    weight = Bf16Weight.narrowed(torch.arange(12.0).reshape(4, 3))
    rows = weight.window(slice(1, 3))
    assert torch.equal(rows.dequantized(), torch.arange(3.0, 9.0).reshape(2, 3))
    rows.store(torch.full((2, 3), 7.0))
    assert weight.dequantized().tolist() == [[0, 1, 2], [7, 7, 7], [7, 7, 7], [9, 10, 11]]
    for whole in (weight.t(), Int8Weight.narrowed(torch.randn(4, GROUP))):
        with pytest.raises(TypeError, match="cannot be shared by rows"):
            whole.window(slice(1, 3))
