"""Distillation losses: gradients by finite differences, the chunked rule against the plain form, the T^2 rule."""

import pytest
import torch
from torch.nn import functional as F

from edgewright import chunked
from edgewright.chunked import IGNORED, Head, chunked_loss
from edgewright.compress.losses import distillation_rule, forward_kl
from edgewright.compress.targets import HeadLogits


def _logits(rows, columns, seed, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_forward_kl_gradient_is_q_minus_t():
    student, teacher = _logits(1, 12, 0).requires_grad_(), _logits(1, 12, 1)
    forward_kl(student, teacher).backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, teacher, temperature=2.0), (student,), atol=1e-6)


def test_forward_kl_is_zero_only_for_the_same_distribution():
    student = _logits(4, 12, 0)
    assert float(forward_kl(student, student + 3.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(forward_kl(student, _logits(4, 12, 1))) > 0.01


def test_the_temperature_factor_keeps_the_size_of_the_gradient():
    sizes = []
    for temperature in (50.0, 200.0):
        student = _logits(8, 30, 0).requires_grad_()
        forward_kl(student, _logits(8, 30, 1), temperature=temperature).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kl_weight", [0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_chunked_distillation_equals_the_plain_losses(monkeypatch, temperature, kl_weight, rows):
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: rows)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(23, 8, generator=generator, requires_grad=True)
    weight = torch.randn(40, 8, generator=generator, requires_grad=True)
    teacher_hidden, teacher_weight = torch.randn(23, 6, generator=generator), torch.randn(40, 6, generator=generator)
    labels = torch.randint(40, (23,), generator=generator)
    labels[3] = labels[20] = IGNORED
    counted = labels != IGNORED
    rule = distillation_rule(
        labels,
        HeadLogits(teacher_hidden, Head(teacher_weight, None), torch.float32),
        scale=1 / 21,
        temperature=temperature,
        kl_weight=kl_weight,
    )
    loss, parts = chunked_loss(hidden, Head(weight, None), rule, parts=2, dtype=torch.float32)
    loss.backward()
    logits = hidden @ weight.T
    divergence = forward_kl(logits[counted], (teacher_hidden @ teacher_weight.T)[counted], temperature=temperature)
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    expected = kl_weight * divergence + (1 - kl_weight) * cross_entropy
    gradients = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts, torch.stack((kl_weight * divergence, (1 - kl_weight) * cross_entropy)))
    torch.testing.assert_close(hidden.grad, gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad, gradients[1], rtol=1e-4, atol=1e-6)


def test_a_teacher_with_padding_rows_is_cut_to_the_students_vocabulary():
    hidden, teacher_hidden = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    weight = torch.randn(40, 8)
    padded = torch.cat((weight, torch.randn(24, 8)))
    labels = torch.arange(5)
    values = [
        chunked_loss(
            hidden,
            Head(weight, None),
            distillation_rule(
                labels,
                HeadLogits(teacher_hidden, Head(head, None), torch.float32),
                scale=0.2,
                temperature=1.0,
                kl_weight=1.0,
            ),
            parts=2,
            dtype=torch.float32,
        )[0]
        for head in (weight, padded)
    ]
    torch.testing.assert_close(*values)
