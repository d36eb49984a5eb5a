"""Schedules: borders, continuity, and the published shapes."""

import pytest

from edgewright.schedule import ConstantConfig, CosineConfig, WsdConfig

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
