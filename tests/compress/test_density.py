"""How a density is shared out, and when weights are pruned: the papers' numbers and the exactness of counts."""

import math

import pytest

from edgewright.compress.density import DISTRIBUTIONS, erk, erk_plus, exact_counts, whole
from edgewright.compress.pruning import (
    PRUNE_EVERY,
    cubic,
    dense_equivalent,
    geometric,
    journey,
    journey_phases,
    mean_density,
    steps_between,
)
from edgewright.errors import RecipeError

LLAMA_60M = {
    f"{block}.{name}": shape
    for block in range(8)
    for name, shape in {
        **dict.fromkeys(("q", "k", "v", "o"), (512, 512)),
        **dict.fromkeys(("gate", "up"), (1376, 512)),
        "down": (512, 1376),
    }.items()
}
WEIGHTS = sum(math.prod(shape) for shape in LLAMA_60M.values())


def mean(densities, shapes):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(densities[name] * sizes[name] for name in shapes) / sum(sizes.values())


def test_erk_gives_the_published_densities_of_llama_60m():
    densities = erk(LLAMA_60M, 0.1, 0)
    assert densities["0.q"] == pytest.approx(0.1266, abs=5e-5)
    assert densities["3.down"] == densities["0.up"] == pytest.approx(0.0868, abs=5e-5)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.7, 0.95, 1.0])
def test_erk_has_the_mean_that_was_asked_for_and_no_layer_above_one(density):
    shapes = {"tiny": (4, 4), "small": (16, 64), "wide": (2048, 64), "large": (1024, 1024)}
    densities = erk(shapes, density, 0)
    assert mean(densities, shapes) == pytest.approx(density, abs=1e-12)
    assert all(0 < value <= 1 for value in densities.values())
    assert densities["tiny"] == max(densities.values())


def test_a_tiny_layer_stays_dense_and_the_others_make_up_for_it():
    shapes = {"tiny": (4, 4), "large": (512, 512), "wide": (1024, 512)}
    densities = erk(shapes, 0.1, 0)
    assert densities["tiny"] == 1
    raw = {name: 1 / shape[0] + 1 / shape[1] for name, shape in shapes.items()}
    assert densities["large"] / densities["wide"] == pytest.approx(raw["large"] / raw["wide"])


def test_erk_plus_counts_the_dense_head():
    head = 512 * 4000
    densities = erk_plus(LLAMA_60M, 0.3, head)
    assert (mean(densities, LLAMA_60M) * WEIGHTS + head) / (WEIGHTS + head) == pytest.approx(0.3, abs=1e-12)


def test_a_head_that_is_too_large_is_refused_with_the_least_density():
    head = 512 * 32000
    share = head / (WEIGHTS + head)
    with pytest.raises(RecipeError, match=f"EW-727[\\s\\S]*above {share:.4f}"):
        erk_plus(LLAMA_60M, share - 1e-4, head)
    assert erk_plus(LLAMA_60M, share + 1e-4, head)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_counts_are_exact(distribution):
    densities = DISTRIBUTIONS[distribution](LLAMA_60M, 0.3, 512 * 100)
    counts = exact_counts(LLAMA_60M, densities)
    assert counts == {name: round(densities[name] * math.prod(shape)) for name, shape in LLAMA_60M.items()}
    assert sum(counts.values()) == pytest.approx(mean(densities, LLAMA_60M) * WEIGHTS, abs=len(counts) / 2)


def test_a_layer_that_would_keep_nothing_is_refused_by_name():
    shapes = {"model.small": (4, 4), "model.large": (64, 64)}
    with pytest.raises(RecipeError, match=r"model\.small[\s\S]*EW-726[\s\S]*0\.0625"):
        exact_counts(shapes, {"model.small": 0.01, "model.large": 0.01})


def test_the_steps_of_the_journey_are_the_published_ones():
    large = journey_phases(50_000, 0.5).rounded(100)
    assert (large.dense, large.dense + large.pruning, large.total) == (12_500, 47_200, 72_200)
    small = journey_phases(16_400, 0.4).rounded(100)
    assert (small.dense, small.dense + small.pruning, small.total) == (4_100, 16_600, 26_800)


@pytest.mark.parametrize(
    ("total", "density", "first", "last"), [(72_200, 0.5, 12_500, 47_200), (26_800, 0.4, 4_100, 16_600)]
)
def test_a_run_of_the_published_length_prunes_at_the_published_steps(total, density, first, last):
    schedule = journey(total, density, start=0.25, end=0.75, every=None)
    assert (schedule.first, schedule.last, schedule.every) == (first, last, 100)
    assert schedule.prunings == (last - first) // 100 + 1
    assert [schedule.prunes_after(step) for step in (first - 100, first, first + 1, first + 100, last, last + 100)] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    assert schedule.density_after(first - 1) == 1
    assert schedule.density_after(first) == pytest.approx(density ** (1 / schedule.prunings), rel=1e-12)
    assert schedule.density_after(last - 1) > schedule.density_after(last) == schedule.density_after(total) == density


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("start", "end"), [(0.25, 0.75), (0.1, 1.0), (0.5, 0.6)])
def test_the_active_fractions_add_up_to_the_compute(density, start, end):
    total = 5000
    schedule = journey(total, density, start=start, end=end, every=1)
    spent = sum(schedule.density_after(step) for step in range(total))
    assert spent == pytest.approx(dense_equivalent(total, density, start=start, end=end), rel=2e-3)
    until = lambda last: sum(schedule.density_after(step) for step in range(last)) / spent  # noqa: E731
    assert until(schedule.first) == pytest.approx(start, abs=2e-3)
    assert until(schedule.last) == pytest.approx(end, abs=2e-3)


def test_the_mean_of_a_geometric_curve():
    curve = geometric(0.2)
    assert sum(curve((k + 0.5) / 1000) for k in range(1000)) / 1000 == pytest.approx(mean_density(0.2), rel=1e-6)
    assert mean_density(1.0) == 1.0


def test_a_cubic_curve_has_exact_ends_and_is_fast_at_first():
    curve = cubic(0.9, 0.3)
    assert (curve(0), curve(1)) == (pytest.approx(0.9, abs=1e-15), 0.3)
    assert curve(0.5) == pytest.approx(0.3 + 0.6 / 8)


def test_short_runs_prune_more_often():
    assert steps_between(34_700) == PRUNE_EVERY
    assert steps_between(500) == 10
    assert steps_between(500, fewest=20) == 25
    assert steps_between(3) == 1


def test_prunings_that_do_not_fit_are_refused_with_the_nearest_number_that_does():
    with pytest.raises(RecipeError, match=r"EW-728[\s\S]*prune_every of 1000 in a run of 300 steps") as error:
        journey(300, 0.5, start=0.25, end=0.75, every=1000)
    legal = int(error.value.fix.split(":")[1].split(",")[0])
    assert journey(300, 0.5, start=0.25, end=0.75, every=legal).last <= 300
    with pytest.raises(RecipeError, match="EW-728"):
        journey(300, 0.5, start=0.25, end=0.75, every=legal + 1)
    with pytest.raises(RecipeError, match="EW-728[\\s\\S]*a longer budget"):
        journey(1, 0.5, start=0.25, end=0.75, every=None)


@pytest.mark.parametrize("total", range(4, 60))
def test_no_schedule_ends_after_its_run(total):
    for every in (None, 1, 2):
        try:
            schedule = journey(total, 0.3, start=0.25, end=1.0, every=every)
        except RecipeError:
            assert total < 8
            continue
        assert 0 < schedule.first < schedule.last <= total


@pytest.mark.parametrize(("share", "count", "expected"), [(0.29, 100, 29), (0.03, 1000, 30), (0.5, 3, 1), (1.0, 7, 7)])
def test_a_share_of_a_whole_is_that_of_the_written_number(share, count, expected):
    assert whole(share, count) == expected


def test_no_share_of_a_matrix_is_a_weight_short():
    size = 1000 * 4096
    assert all(whole(percent / 100, size) == percent * size // 100 for percent in range(1, 101))
