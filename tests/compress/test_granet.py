"""GraNet: what an update prunes, drops and grows, exactly; and what it leaves zeroed."""

import copy
import math

import pytest
import torch
from methods import Loop, prepared, tokens
from test_sparse import layers_of, masked_are_zero, used

from edgewright.compress.density import erk, exact_counts
from edgewright.compress.granet import GRADIENT_STEPS, GranetConfig, half_cosine
from edgewright.errors import RecipeError

DENSE_TO_SPARSE = GranetConfig(density=0.25, update_every=2)
SPARSE_TO_SPARSE = GranetConfig(density=0.2, initial_density=0.4, update_every=3, regrow="gradient")
STEADY = GranetConfig(density=0.3, initial_density=0.3, update_every=2)
"""Nothing is pruned: masks move and counts do not."""


def size_of(model):
    return sum(layer.weight.numel() for layer in layers_of(model).values())


@pytest.mark.parametrize(
    "config",
    [DENSE_TO_SPARSE, SPARSE_TO_SPARSE, STEADY, DENSE_TO_SPARSE.model_copy(update={"regrow": "none"})],
    ids=["random", "gradient", "steady", "none"],
)
def test_counts_follow_the_curve_exactly_and_masked_weights_and_moments_are_zero(config):
    model, method = prepared(config)
    schedule = config.schedule(12)
    loop = Loop(model, method, total_steps=12)
    start = sum(used(model).values())
    assert start == pytest.approx(config.initial_density * size_of(model), abs=7)  # half a weight a layer
    for step in range(12):
        loop.run(1)
        curve = round(schedule.density_after(step + 1) * size_of(model))
        assert sum(used(model).values()) == (min(start, curve) if step + 1 >= schedule.first else start)
        assert masked_are_zero(loop)
    assert schedule.density_after(12) == config.density


def test_the_curve_is_a_cubic_that_reaches_its_end():
    schedule = GranetConfig(density=0.2, start=0.1, end=0.6, update_every=10).schedule(1000)
    assert (schedule.first, schedule.last, schedule.prunings) == (100, 600, 51)
    for k in (1, 20, 51):
        expected = 1 - 0.8 * (1 - (1 - k / 51) ** 3)
        assert schedule.density_after(100 + (k - 1) * 10) == pytest.approx(expected, rel=1e-12)
    assert schedule.density_after(599) > schedule.density_after(600) == 0.2


def test_sparse_to_sparse_starts_with_erk_densities():
    model, _ = prepared(SPARSE_TO_SPARSE)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers_of(model).items()}
    assert used(model) == exact_counts(shapes, erk(shapes, 0.4, 0))


def until_update(config, step, total_steps=12):
    """A loop that has run up to before the step whose end has the update; its masks and weights after the step's
    optimizer, before the update."""
    model, method = prepared(config)
    loop = Loop(model, method, total_steps=total_steps)
    loop.run(step - 1)
    before = {}
    after_step = method.after_step

    def watched(ctx):
        for name, layer in layers_of(model).items():
            before[name] = (layer.mask.clone(), layer.weight.detach().clone(), layer.weight.grad.clone())
        after_step(ctx)

    method.after_step = watched
    loop.run(1)
    return loop, before


def test_an_update_drops_the_smallest_and_grows_as_many_at_zero():
    loop, before = until_update(STEADY, 4)
    share = 0.005 + 0.495 * half_cosine(4 / 12)
    returned = 0
    for name, layer in layers_of(loop.model).items():
        mask, weight, _ = before[name]
        count = int(mask.sum())
        number = math.ceil(share * count)
        order = torch.where(mask, weight.abs(), math.inf).flatten().argsort()
        dropped = torch.zeros_like(mask).flatten()
        dropped[order[:number]] = True
        dropped = dropped.view(mask.shape)
        grown = layer.mask & ~(mask & ~dropped)
        assert torch.equal(layer.mask | dropped, mask | grown)
        assert int(layer.mask.sum()) == count and int(grown.sum()) == number
        state = loop.optimizer.state[layer.weight]
        for tensor in (layer.weight.detach(), state["exp_avg"], state["exp_avg_sq"]):
            assert not tensor[grown].count_nonzero()
            assert not tensor[~layer.mask].count_nonzero()
        assert torch.equal(layer.weight[mask & ~dropped], weight[mask & ~dropped])
        returned += int((dropped & layer.mask).sum())
    assert returned > 0


def test_random_growth_is_another_one_at_every_update_and_the_same_for_the_same_seed():
    def grown(step):
        loop, before = until_update(STEADY.model_copy(update={"drop": 0.3, "final_drop": 0.3}), step)
        return [layer.mask & ~before[name][0] for name, layer in layers_of(loop.model).items()]

    first, again, later = grown(2), grown(2), grown(4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(first, later, strict=True))


def test_gradient_growth_takes_the_largest_sum_of_dense_gradients():
    config = SPARSE_TO_SPARSE.model_copy(update={"density": 0.4, "update_every": 6})
    model, method = prepared(config)
    loop = Loop(model, method, total_steps=14)
    sums: dict[str, torch.Tensor] = {}
    after_backward = method.after_backward

    def watched(ctx):
        for name, layer in layers_of(model).items():
            if ctx.step % 6 == 6 - GRADIENT_STEPS:
                sums[name] = torch.zeros_like(layer.weight)
            if ctx.step % 6 >= 6 - GRADIENT_STEPS:
                sums[name] += layer.weight.grad
        after_backward(ctx)

    method.after_backward = watched
    for _ in range(2):
        loop.run(5)
        before = {name: layer.mask.clone() for name, layer in layers_of(model).items()}
        loop.run(1)
        for name, layer in layers_of(model).items():
            grown = layer.mask & ~before[name]
            least = float(sums[name][grown].abs().min())
            assert float(sums[name][~layer.mask & ~before[name]].abs().max()) <= least


def test_a_gradient_that_is_not_finite_does_not_grow():
    model, method = prepared(SPARSE_TO_SPARSE)
    loop = Loop(model, method, total_steps=12)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    layer = next(iter(layers_of(model).values()))
    layer.weight.grad[~layer.mask] = math.nan
    method.after_backward(loop.context())
    kept = method.state_dict()
    assert all(tensor.isfinite().all() for name, tensor in kept.items() if name.endswith(".gradient"))
    assert torch.isfinite(layer.weight.grad).all()


def test_a_stop_between_the_steps_that_are_summed_changes_nothing():
    model, method = prepared(SPARSE_TO_SPARSE)
    whole = Loop(model, method, total_steps=12)
    whole.run(5)
    state = copy.deepcopy(whole.state())
    assert any(name.endswith(".gradient") for name in state["method"])
    whole.run(3)
    again = Loop(*prepared(SPARSE_TO_SPARSE, seed=4), total_steps=12)
    again.run(2)
    again.load(state)
    again.run(3)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.mask, layers_of(again.model)[name].mask)
        assert torch.equal(layer.weight, layers_of(again.model)[name].weight)


def test_without_regrowth_nothing_comes_back():
    model, method = prepared(DENSE_TO_SPARSE.model_copy(update={"regrow": "none"}))
    loop = Loop(model, method, total_steps=12)
    for _ in range(12):
        before = {name: layer.mask.clone() for name, layer in layers_of(model).items()}
        loop.run(1)
        assert not any((layer.mask & ~before[name]).any() for name, layer in layers_of(model).items())


def test_the_last_step_drops_nothing_because_nothing_could_learn_any_more():
    loop, before = until_update(STEADY, 12)
    assert all(torch.equal(layer.mask, before[name][0]) for name, layer in layers_of(loop.model).items())


def test_at_full_density_there_is_nowhere_to_grow_so_nothing_is_dropped():
    loop, before = until_update(GranetConfig(density=1.0, update_every=2), 4)
    for name, layer in layers_of(loop.model).items():
        assert layer.mask.all() and torch.equal(layer.weight, before[name][1])


def test_the_share_falls_along_half_a_cosine():
    assert [half_cosine(progress) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-12)


def test_updates_that_do_not_fit_are_refused_with_the_nearest_number_that_does():
    with pytest.raises(RecipeError, match=r"EW-728[\s\S]*update_every of 60 in a run of 100") as error:
        GranetConfig(update_every=60).build().check_run(100)
    assert "update_every: 50" in error.value.fix
    GranetConfig(update_every=50).build().check_run(100)
    with pytest.raises(RecipeError, match="EW-728[\\s\\S]*a longer budget"):
        GranetConfig().build().check_run(1)


@pytest.mark.parametrize("total", range(4, 80))
def test_updates_stay_within_the_run(total):
    schedule = GranetConfig(start=0.2, end=1.0).schedule(total)
    assert 0 < schedule.first <= schedule.last < total
    assert schedule.density_after(total) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.5, "initial_density": 0.4}, "density must not be above initial_density"),
        ({"start": 0.6}, "start must be below end"),
        ({"drop": 0.001}, "final_drop must not be above drop"),
        ({"density": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GranetConfig.model_validate(settings)
