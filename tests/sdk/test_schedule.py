"""Schedules: borders, continuity, and the published shapes."""

import pytest

from edgewright.schedule import ConstantConfig, CosineConfig, WsdConfig, rewarm_factor

ALL = [
    CosineConfig(warmup_ratio=0.1, final_ratio=0.1),
    WsdConfig(warmup_ratio=0.1, decay_ratio=0.2),
    ConstantConfig(warmup_ratio=0.1),
    CosineConfig(warmup_ratio=0.0),
]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.type)
@pytest.mark.parametrize("total", [1, 7, 100, 5000])
def test_factors_stay_in_range_and_never_jump(schedule, total):
    factors = [schedule.factor(step, total) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    if total == 5000:
        assert max(abs(a - b) for a, b in zip(factors, factors[1:], strict=False)) < 0.01


def test_warm_up_is_linear_to_the_peak():
    schedule = CosineConfig(warmup_ratio=0.1)
    assert [schedule.factor(step, 100) for step in range(10)] == pytest.approx([0.1 * (i + 1) for i in range(10)])


def test_cosine_ends_at_its_final_ratio_and_is_half_way_in_the_middle():
    schedule = CosineConfig(warmup_ratio=0.0, final_ratio=0.2)
    assert schedule.factor(99, 100) == pytest.approx(0.2)
    assert schedule.factor(49, 100) == pytest.approx(0.6)


def test_wsd_is_flat_then_linear():
    schedule = WsdConfig(warmup_ratio=0.0, decay_ratio=0.5, final_ratio=0.0)
    assert [schedule.factor(step, 10) for step in range(10)] == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_a_rewarm_dips_and_meets_the_schedule_again():
    schedule = CosineConfig(warmup_ratio=0.1, final_ratio=0.1)
    factors = [rewarm_factor(schedule, step, 1000, 200, 10) for step in range(200, 212)]
    target = schedule.factor(210, 1000)
    assert factors[0] == pytest.approx(1e-3 * target)
    assert factors[9] == pytest.approx(target)
    assert factors[5] == pytest.approx(target * (0.001 + 0.999 * 5 / 9))
    assert factors[10] == schedule.factor(210, 1000)
    assert factors[11] == schedule.factor(211, 1000)
    assert rewarm_factor(schedule, 995, 1000, 995, 10) == pytest.approx(1e-3 * schedule.factor(999, 1000))
