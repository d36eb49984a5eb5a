"""The chunked head against the plain loss: values, gradients, memory; float64 finite differences for the rule."""

import pytest
import torch
from torch.nn import functional as F

from edgewright import chunked
from edgewright.chunked import IGNORED, Head, chunked_loss, cross_entropy_rule

N, H, V = 37, 16, 50


def _problem(bias: bool = True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    offset = torch.randn(V, generator=generator, requires_grad=True) if bias else None
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = IGNORED
    return hidden, weight, offset, labels


@pytest.mark.parametrize("rows", [1, 2, 5, N, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_naive_loss_for_every_chunk_size(monkeypatch, rows, bias):
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: rows)
    hidden, weight, offset, labels = _problem(bias)
    counted = int((labels != IGNORED).sum())
    loss, parts = chunked_loss(
        hidden, Head(weight, offset), cross_entropy_rule(labels, 1 / counted), parts=1, dtype=torch.float32
    )
    (3.0 * loss).backward()
    inputs = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    got = [tensor.grad.clone() for tensor in inputs]
    naive = F.cross_entropy(F.linear(hidden, weight, offset), labels, ignore_index=IGNORED)
    expected = torch.autograd.grad(3.0 * naive, inputs)
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=1e-6)
    assert float(parts.sum()) == float(loss.detach())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"scale": 0.5}, {"cap": 2.0}])
def test_how_many_rows_a_rule_gets_at_a_time_changes_nothing(monkeypatch, dtype, shape):
    """The same bits for every row; sums over rows, in another order, to float32's rounding."""
    hidden, weight, offset, labels = _problem()
    inputs = (hidden, weight, offset)
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: 16)
    found = {}
    for rows in (1, 3, 16):
        seen = []
        monkeypatch.setattr(chunked, "cached_rows", lambda vocabulary, device, rows=rows: rows)
        rule = cross_entropy_rule(labels, 0.1)

        def counting(logits, window, rule=rule, seen=seen):
            seen.append((len(logits), window.stop - window.start))
            return rule(logits, window)

        loss, _ = chunked_loss(hidden, Head(weight, offset, **shape), counting, parts=1, dtype=dtype, few_rows=True)
        found[rows] = (loss.detach(), *torch.autograd.grad(loss, inputs))
        assert sum(taken for taken, _ in seen) == N and max(taken for taken, _ in seen) == rows
        assert all(taken == asked for taken, asked in seen)
    for rows in (1, 3):
        loss, into_hidden, into_weight, into_offset = found[rows]
        assert torch.equal(into_hidden, found[16][1]) and torch.equal(into_weight, found[16][2])
        torch.testing.assert_close(loss, found[16][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(into_offset, found[16][3], rtol=1e-5, atol=1e-6)


def test_without_gradients_gives_the_same_value():
    hidden, weight, offset, labels = _problem()
    rule = cross_entropy_rule(labels, 1.0)
    with torch.no_grad():
        value, _ = chunked_loss(hidden, Head(weight, offset), rule, parts=1, dtype=torch.float32)
    trained, _ = chunked_loss(hidden, Head(weight, offset), rule, parts=1, dtype=torch.float32)
    torch.testing.assert_close(value, trained.detach())


def test_ignored_tokens_get_no_gradient_and_all_ignored_is_zero():
    hidden, weight, _, labels = _problem()
    chunked_loss(hidden, Head(weight, None), cross_entropy_rule(labels, 1.0), parts=1, dtype=torch.float32)[
        0
    ].backward()
    assert torch.count_nonzero(hidden.grad[::5]) == 0
    assert torch.count_nonzero(hidden.grad[1::5]) > 0
    nothing = torch.full_like(labels, IGNORED)
    loss, _ = chunked_loss(hidden, Head(weight, None), cross_entropy_rule(nothing, 1.0), parts=1, dtype=torch.float32)
    assert float(loss.detach()) == 0.0


def test_rule_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    labels = torch.tensor([4, IGNORED, 11])
    rule = cross_entropy_rule(labels, 0.5)
    _, gradient = rule(logits.clone(), slice(0, 3))
    step = 1e-6
    for row in range(3):
        for column in range(12):
            up, down = logits.clone(), logits.clone()
            up[row, column] += step
            down[row, column] -= step
            difference = rule(up, slice(0, 3))[0] - rule(down, slice(0, 3))[0]
            assert abs(float(difference) / (2 * step) - float(gradient[row, column])) < 1e-6


def test_the_logits_never_exist_whole():
    """The largest tensor that the loss makes has the rows of a chunk, not of the batch."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    Largest.numel = max(Largest.numel, tensor.numel())
            return result

    tokens, vocabulary = 4096, 32000
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with Largest():
        chunked_loss(hidden, Head(weight, None), cross_entropy_rule(labels, 1.0), parts=1, dtype=torch.float32)
    assert Largest.numel <= chunked.chunk_rows(vocabulary) * vocabulary < tokens * vocabulary / 10
