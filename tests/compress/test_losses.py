"""Distillation losses: gradients by finite differences, chunked against plain, and what each tends to."""

from __future__ import annotations

import math

import pytest
import torch
from loss_table import CASES, DENSE, IDS, Case, differences, logits
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from edgewright import chunked
from edgewright.chunked import IGNORED, Head, chunked_loss
from edgewright.compress import loss_rule, losses
from edgewright.compress.loss_config import CrossEntropyConfig
from edgewright.compress.loss_rule import distillation_rule
from edgewright.compress.losses import forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl, top_k
from edgewright.compress.targets import HeadLogits, Logits, Sampled, TopK
from edgewright.errors import RecipeError

TEMPERATURES = [1.0, 2.5]
tables = pytest.mark.parametrize("case", CASES, ids=IDS)
temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)


@tables
@temperatures
def test_the_plain_gradient_is_that_of_finite_differences(case: Case, temperature: float) -> None:
    student = logits(3, 12, 0).requires_grad_()
    targets = case.targets(logits(3, 12, 1), temperature)
    case.plain(student, targets, temperature).backward()
    expected = differences(case.held(student.detach(), targets, temperature), student)
    assert student.grad is not None and float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-6)


def chunked_value(
    case: Case, hidden: Tensor, head: Head, targets: object, labels: Tensor, temperature: float
) -> Tensor:
    rule = distillation_rule(
        [case.config(temperature=temperature).build()], [1.0], labels, targets, scale=1 / len(labels)
    )
    return chunked_loss(hidden, head, rule, parts=1, dtype=hidden.dtype)[0]


@tables
@temperatures
def test_the_chunked_gradient_is_that_of_finite_differences(case: Case, temperature: float) -> None:
    """Through the head: hidden states, weight and bias, with a cap, in float64."""
    hidden, weight, bias = (logits(*shape, seed).mul_(0.7) for shape, seed in (((4, 3), 2), ((12, 3), 3), ((1, 12), 4)))
    targets, labels = case.targets(logits(4, 12, 1), temperature), torch.arange(4)

    def student(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return 5.0 * torch.tanh((h @ w.T + b[0]) / 5.0)

    held = case.held(student(hidden, weight, bias), targets, temperature)
    arguments = (hidden, weight, bias)
    for index in range(3):
        leaves = [one.clone().requires_grad_() for one in arguments]
        value = chunked_value(case, leaves[0], Head(leaves[1], leaves[2][0], cap=5.0), targets, labels, temperature)
        value.backward()

        def moved(x: Tensor, index: int = index) -> Tensor:
            return held(student(*(x if i == index else one for i, one in enumerate(arguments))))

        assert value.item() == pytest.approx(held(student(*arguments)).item(), rel=1e-10)
        torch.testing.assert_close(leaves[index].grad, differences(moved, arguments[index]), rtol=0, atol=1e-6)


@tables
@pytest.mark.parametrize("rows", [1, 2, 5, 23])
def test_chunked_equals_plain(monkeypatch: pytest.MonkeyPatch, case: Case, rows: int) -> None:
    """In float32, whatever the sizes of chunks and blocks; tokens that are not counted change nothing."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: rows)
    monkeypatch.setattr(loss_rule, "FEWEST_ROWS", 2)
    monkeypatch.setattr(loss_rule, "BLOCK_BYTES", 1)
    hidden, weight = (logits(n, 8, seed, torch.float32).requires_grad_() for n, seed in ((23, 0), (40, 1)))
    targets, labels = case.targets(logits(23, 40, 2, torch.float32), 2.0), torch.arange(23)
    labels[3] = labels[20] = IGNORED
    counted = labels != IGNORED
    rule = distillation_rule([case.config(temperature=2.0).build()], [0.7], labels, targets, scale=1 / 21)
    loss, parts = chunked_loss(hidden, Head(weight, None), rule, parts=1, dtype=torch.float32)
    loss.backward()
    kept = [torch.arange(23)[counted]]
    expected = 0.7 * case.plain((hidden @ weight.T)[counted], targets.rows(kept[0]), 2.0)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, gradients[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, gradients[1], rtol=1e-4, atol=1e-5)


def test_several_losses_are_summed_with_their_weights() -> None:
    hidden, weight = logits(9, 5, 0).requires_grad_(), logits(30, 5, 1).requires_grad_()
    teacher, labels = logits(9, 30, 2), torch.arange(9)
    kinds = [Case("forward_kl").config(temperature=2.0), Case("jsd").config(), CrossEntropyConfig()]
    built, weights = [kind.build() for kind in kinds], [0.5, 0.0, 0.3]
    rule = distillation_rule(built, weights, labels, Logits(teacher), scale=1 / 9)
    loss, parts = chunked_loss(hidden, Head(weight, None), rule, parts=3, dtype=torch.float64)
    loss.backward()
    student = hidden @ weight.T
    values = [forward_kl(student, teacher, temperature=2.0), F.cross_entropy(student, labels)]
    expected = 0.5 * values[0] + 0.3 * values[1]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts, torch.stack((0.5 * values[0], torch.zeros_like(loss), 0.3 * values[1])))
    torch.testing.assert_close((hidden.grad, weight.grad), torch.autograd.grad(expected, (hidden, weight)))


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(40, 64), (64, 40)])
@pytest.mark.parametrize("case", DENSE, ids=IDS[: len(DENSE)])
def test_rows_that_pad_one_vocabulary_are_left_out(case: Case, student_rows: int, teacher_rows: int) -> None:
    hidden = logits(5, 8, 0).requires_grad_()
    weight, teacher = logits(student_rows, 8, 1), logits(5, teacher_rows, 2)
    loss = chunked_value(case, hidden, Head(weight, None), Logits(teacher), torch.arange(5), 1.0)
    loss.backward()
    expected = case.plain((hidden @ weight.T)[:, :40], Logits(teacher[:, :40]), 1.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected, hidden)[0])


@pytest.mark.parametrize("case", CASES[:-1], ids=IDS[:-1])
def test_the_same_distribution_costs_nothing(case: Case) -> None:
    student = logits(4, 12, 0).requires_grad_()
    same = case.plain(student, case.targets(student.detach() + 3.0, 1.5), 1.5)
    same.backward()
    assert same.item() == pytest.approx(0.0, abs=1e-12)
    if case.name not in ("total_variation", "lk_hybrid", "uld"):  # which have a corner there
        torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)
    assert float(case.plain(student.detach(), case.targets(logits(4, 12, 1), 1.5), 1.5)) > 0.01


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl"])
def test_the_temperature_factor_keeps_the_size_of_the_gradient(name: str) -> None:
    sizes = []
    for temperature in (50.0, 200.0):
        student = logits(8, 30, 0).requires_grad_()
        getattr(losses, name)(student, logits(8, 30, 1), temperature=temperature).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_jsd_is_symmetric_in_the_middle_and_continuous_at_its_ends() -> None:
    student, teacher = logits(4, 12, 0), logits(4, 12, 1)
    torch.testing.assert_close(jsd(student, teacher, beta=0.3), jsd(teacher, student, beta=0.7))
    small = 1e-5
    assert float(jsd(student, teacher, beta=0.0)) == float(jsd(student, teacher, beta=1.0)) == 0.0
    assert float(jsd(student, teacher, beta=small)) < 1e-3 > float(jsd(student, teacher, beta=1 - small))
    towards_zero = jsd(student, teacher, beta=small) / small
    towards_one = jsd(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(towards_zero, forward_kl(student, teacher), rtol=1e-3, atol=0)
    torch.testing.assert_close(towards_one, reverse_kl(student, teacher), rtol=1e-3, atol=0)
    assert 0 < float(jsd(student, teacher)) <= math.log(2)


def test_skewed_divergences_end_in_the_plain_ones_and_stay_finite() -> None:
    student, teacher = logits(4, 12, 0), logits(4, 12, 1)
    torch.testing.assert_close(skew_forward_kl(student, teacher, alpha=0.0), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, alpha=0.0), reverse_kl(student, teacher))
    assert float(skew_forward_kl(student, teacher, alpha=1.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(skew_reverse_kl(student, teacher, alpha=1.0)) == pytest.approx(0.0, abs=1e-12)
    far = torch.zeros(1, 12, dtype=torch.float64)
    far[0, 0] = 800.0
    for divergence in (skew_forward_kl, skew_reverse_kl):
        assert float(divergence(far, far.flip(-1), alpha=0.1)) == pytest.approx(math.log(10), rel=1e-6)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: f"{case.name}-{case.settings}")
def test_distributions_that_are_far_apart_give_the_gradient_of_the_formula(case: Case) -> None:
    """As small temperatures make them: ratios of probabilities that no float32 holds."""
    student, teacher = logits(4, 12, 0) * 200.0, logits(4, 12, 1) * 200.0
    plain = student.clone().requires_grad_()
    case.plain(plain, Logits(teacher), 1.0).backward()
    rule = distillation_rule([case.config().build()], [1.0], torch.arange(4), Logits(teacher.float()), scale=0.25)
    torch.testing.assert_close(rule(student.float(), slice(0, 4))[1].double(), plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [math.inf, math.nan, 0.0, -1.0])
def test_a_weight_is_a_number_above_zero(weight: float) -> None:
    with pytest.raises(ValidationError, match="weight"):
        Case("forward_kl").config(weight=weight)


def test_reverse_and_forward_kl_are_each_other_turned_round() -> None:
    student, teacher = logits(4, 12, 0), logits(4, 12, 1)
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(forward_kl(student, teacher), expected)


def test_lk_hybrid_goes_from_divergence_to_acceptance() -> None:
    student, teacher = logits(4, 12, 0), logits(4, 12, 1)
    kl = forward_kl(student, teacher)
    torch.testing.assert_close(losses.lk_hybrid(student, teacher, decay=0.0), kl)
    torch.testing.assert_close(losses.lk_hybrid(student, teacher, decay=1e4), losses.total_variation(student, teacher))
    accepted = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses.total_variation(student, teacher), 1 - accepted)


def test_the_ghost_bucket_keeps_the_mass_of_the_tail() -> None:
    """A student that is trained on the top 3 alone ends with the teacher's head, and the tail's mass in the tail."""
    teacher = logits(1, 12, 1)
    kept = TopK.of(teacher, 3)
    torch.testing.assert_close(kept.log_probs.exp().sum(-1) + kept.tail, torch.ones(1, dtype=torch.float64))
    student = torch.zeros(1, 12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([student], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = top_k(student, kept)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    q = student.detach().softmax(-1)
    torch.testing.assert_close(q.gather(-1, kept.ids), kept.log_probs.exp(), rtol=0, atol=1e-5)
    head = q.gather(-1, kept.ids).sum(-1)
    torch.testing.assert_close(1 - head, kept.tail, rtol=0, atol=1e-5)


def test_top_k_is_at_most_forward_kl_and_all_of_it_for_all_tokens() -> None:
    student, teacher = logits(4, 12, 0), logits(4, 12, 1)
    values = [float(top_k(student, teacher, k=k)) for k in (1, 4, 8, 12)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(float(forward_kl(student, teacher)), rel=1e-6)


def test_what_a_cache_rounded_still_sums_to_one_and_fillers_change_nothing() -> None:
    student, teacher = logits(4, 12, 0).requires_grad_(), logits(4, 12, 1)
    exact = TopK.of(teacher, 4)
    rounded = TopK(ids=exact.ids, log_probs=exact.log_probs.half().double(), tail=exact.tail.half().double())
    torch.testing.assert_close(top_k(student, rounded), top_k(student, exact), rtol=1e-2, atol=1e-3)
    same = TopK.of(student.detach(), 4)
    narrow = TopK(ids=same.ids, log_probs=same.log_probs - 0.01, tail=same.tail * math.exp(-0.01))
    assert top_k(student, narrow).item() == pytest.approx(0.0, abs=1e-9)
    filled = TopK(
        ids=F.pad(exact.ids, (0, 2), value=int(exact.ids[0, 0])),
        log_probs=F.pad(exact.log_probs, (0, 2), value=-torch.inf),
        tail=exact.tail,
    )
    ends = []
    for targets in (exact, filled):
        rule = distillation_rule([Case("top_k").config().build()], [1.0], torch.arange(4), targets, scale=0.25)
        z = student.detach().clone()
        value, gradient = rule(z, slice(0, 4))
        ends.append((value, gradient))
        torch.testing.assert_close(value[0], top_k(student, targets))
    torch.testing.assert_close(ends[0], ends[1])


def test_tokens_that_the_student_lacks_count_as_tail_or_not_at_all() -> None:
    student, teacher = logits(4, 12, 0), logits(4, 16, 1)
    kept = TopK.of(teacher, 8)
    assert bool((kept.ids >= 12).any())
    cut = kept.within(12)
    torch.testing.assert_close(cut.log_probs.exp().sum(-1) + cut.tail, torch.ones(4, dtype=torch.float64))
    assert math.isfinite(float(top_k(student, kept)))
    drawn = Sampled.of(teacher, 50, generator=torch.Generator().manual_seed(1))
    assert math.isfinite(float(losses.rs_kd(student, drawn)))
    assert float(drawn.within(12).weights.sum()) < float(drawn.weights.sum())


@pytest.mark.parametrize("power", [1.0, 0.8])
def test_random_sampling_is_unbiased(power: float) -> None:
    """Mean weight of each token is its probability, and so the mean gradient q - t, within 5 standard errors."""
    teacher, draws = logits(1, 12, 1), 200_000
    t = teacher.softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    drawn = Sampled.of(teacher, draws, proposal_power=power, generator=generator)
    mean = torch.zeros(12, dtype=torch.float64).scatter_add_(0, drawn.ids[0], drawn.weights[0])
    worst = (drawn.weights.max() * draws) * 5 / math.sqrt(draws)
    torch.testing.assert_close(mean, t, rtol=0, atol=float(worst * 0.5))
    student = logits(1, 12, 0).requires_grad_()
    losses.rs_kd(student, drawn).backward()
    forward = logits(1, 12, 0).requires_grad_()
    forward_kl(forward, teacher).backward()
    torch.testing.assert_close(student.grad, forward.grad, rtol=0, atol=float(worst))


def test_a_teacher_beside_the_student_gives_sparse_targets_too() -> None:
    hidden, weight = logits(5, 8, 0), logits(12, 8, 1)
    teacher = HeadLogits(logits(5, 6, 2), Head(logits(12, 6, 3), None), torch.float64)
    whole = teacher.rows(slice(0, 5)).values
    labels = torch.arange(5)
    rule = distillation_rule(
        [Case("top_k", {"k": 3}).config(temperature=2.0).build()], [1.0], labels, teacher, scale=0.2
    )
    value = chunked_loss(hidden, Head(weight, None), rule, parts=1, dtype=torch.float64)[0]
    torch.testing.assert_close(value, top_k(hidden @ weight.T, whole, k=3, temperature=2.0))
    rule = distillation_rule([Case("rs_kd", {"samples": 4000}).config().build()], [1.0], labels, teacher, scale=0.2)
    value = chunked_loss(hidden, Head(weight, None), rule, parts=1, dtype=torch.float64)[0]
    entropy = -(whole.softmax(-1) * whole.log_softmax(-1)).sum(-1).mean()
    assert float(value) == pytest.approx(float(forward_kl(hidden @ weight.T, whole) + entropy), rel=0.05)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda a, b: forward_kl(a, b, temperature=0.0), "found: 0.0"),
        (lambda a, b: reverse_kl(a, b, temperature=-1.0), "-1.0"),
        (lambda a, b: forward_kl(a, b[:, :5]), r"\[4, 12\]"),
        (lambda a, b: jsd(a, b, beta=1.5), "0 to 1"),
        (lambda a, b: skew_forward_kl(a, b, alpha=-0.1), "0 to 1"),
        (lambda a, b: top_k(a, b, k=13), "k of 1 to 12"),
        (lambda a, b: top_k(a, TopK.of(b, 3, temperature=2.0)), "temperature: 2.0"),
        (lambda a, b: losses.rs_kd(a, b, samples=0), "at least 1"),
        (lambda a, b: losses.rs_kd(a, b[:3]), "places"),
        (lambda a, b: losses.rs_kd(a, Sampled.of(b[:3], 5)), "places"),
        (lambda a, b: top_k(a, b[:3], k=3), "places"),
        (lambda a, b: top_k(a, TopK.of(b[:1], 3)), "places"),
        (lambda a, b: losses.uld(a, b[:3]), "places"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, found: str) -> None:
    with pytest.raises(RecipeError, match=found) as error:
        call(logits(4, 12, 0), logits(4, 12, 1))  # type: ignore[operator]
    assert error.value.code == "EW-780"


def test_sparse_losses_take_logits_of_batches_as_all_others_do() -> None:
    student, teacher = logits(6, 12, 0), logits(6, 12, 1)
    batched = student.view(2, 3, 12), teacher.view(2, 3, 12)
    torch.testing.assert_close(top_k(*batched, k=4), top_k(student, teacher, k=4))
    drawn = [losses.rs_kd(*both, generator=torch.Generator().manual_seed(0)) for both in (batched, (student, teacher))]
    torch.testing.assert_close(*drawn)
