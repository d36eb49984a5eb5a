"""Sparse training: zeros that stay zeros in weights, gradients and moments, exact counts, and the 2:4 pattern."""

import copy
import math

import numpy as np
import pytest
import torch
from methods import Loop, logits, prepared, small_model, tokens
from torch import nn

from edgewright.compress.layers import CompressedLinear
from edgewright.compress.masked import MaskedLinear, largest, magnitude_masks
from edgewright.compress.semi_structured import SemiStructuredLinear, has_pattern, two_of_four, use_sparse_kernels
from edgewright.compress.sparse import GradualMask, SparseConfig, StaticMask, TwoOfFourMask
from edgewright.errors import RecipeError

GRADUAL = SparseConfig(density=0.25, mask=GradualMask(prune_every=2))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def masked_are_zero(loop):
    """Whether masked weights, and both their moments, are exactly 0."""
    for layer in layers_of(loop.model).values():
        state = loop.optimizer.state[layer.weight]
        tensors = [layer.weight.detach(), state["exp_avg"], state["exp_avg_sq"]]
        if any(tensor[~layer.mask].count_nonzero() for tensor in tensors):
            return False
    return True


def used(model):
    return {name: int(layer.kept().sum()) for name, layer in layers_of(model).items()}


@pytest.mark.parametrize("shapes", [[(7, 5)], [(3, 4), (1, 9), (6, 2)]])
def test_the_largest_are_those_of_a_sort(shapes):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator) for shape in shapes]
    flat = torch.cat([score.flatten() for score in scores])
    for keep in range(len(flat) + 1):
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[flat.argsort(descending=True)[:keep]] = True
        assert torch.equal(torch.cat([mask.flatten() for mask in largest(scores, keep)]), expected)


def test_of_equal_scores_the_first_are_taken_and_negative_ones_never():
    scores = [torch.tensor([0.0, 2.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, 0.0])]
    taken = [[mask.int().tolist() for mask in largest(scores, keep)] for keep in (1, 2, 3, 5, 6)]
    assert taken == [
        [[0, 1, 0], [0, 0, 0, 0]],
        [[0, 1, 1], [0, 0, 0, 0]],
        [[0, 1, 1], [1, 0, 0, 0]],
        [[1, 1, 1], [1, 0, 1, 0]],
        [[1, 1, 1], [1, 0, 1, 1]],
    ]
    with pytest.raises(AssertionError):
        largest(scores, 7)


def test_static_counts_are_exact_from_before_the_first_step_to_the_last():
    model, method = prepared(SparseConfig(density=0.3))
    expected = {name: round(0.3 * layer.weight.numel()) for name, layer in layers_of(model).items()}
    loop = Loop(model, method)
    for _ in range(4):
        assert used(model) == expected
        assert all(int(layer.weight.count_nonzero()) <= expected[name] for name, layer in layers_of(model).items())
        loop.run(1)
        assert masked_are_zero(loop)
    report = method.describe(model)
    assert report.numbers["density"] == pytest.approx(0.3, abs=1e-5)
    assert report.numbers["min_density"] == pytest.approx(0.3, abs=1e-4)
    assert report.numbers["active"] == sum(expected.values())
    assert report.numbers["active_flops"] == 2 * sum(expected.values())
    assert report.numbers["flops"] == 2 * report.numbers["weights"]


def test_the_seed_of_the_run_draws_the_masks():
    def masks(seed):
        return [layer.mask for layer in layers_of(prepared(SparseConfig(), seed)[0]).values()]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(masks(0), masks(0), strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(masks(0), masks(1), strict=True))
    same_shape = [mask for mask in masks(0) if mask.shape == (256, 256)]
    assert (same_shape[0] == same_shape[1]).float().mean() == pytest.approx(0.5, abs=0.01)


def test_masks_do_not_depend_on_which_other_layers_there_are():
    alone = layers_of(prepared(SparseConfig(layers=("down_proj",)))[0])
    together = layers_of(prepared(SparseConfig())[0])
    assert all(torch.equal(layer.mask, together[name].mask) for name, layer in alone.items())


def test_masked_gradients_are_zero_before_clipping_even_where_not_finite():
    model, method = prepared(SparseConfig())
    loop = Loop(model, method)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    layer = next(iter(layers_of(model).values()))
    gradient = layer.weight.grad.clone()
    layer.weight.grad[~layer.mask] = float("nan")
    method.after_backward(loop.context())
    assert torch.equal(layer.weight.grad, torch.where(layer.mask, gradient, 0.0))


def test_a_gradient_that_is_not_finite_in_a_used_place_is_still_there_to_be_found():
    model, method = prepared(SparseConfig())
    loop = Loop(model, method)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    layer = next(iter(layers_of(model).values()))
    row, column = (int(index[0]) for index in layer.mask.nonzero(as_tuple=True))
    layer.weight.grad[row, column] = float("inf")
    method.after_backward(loop.context())
    assert not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def test_an_optimizer_that_moves_everything_does_not_move_masked_weights():
    model, method = prepared(SparseConfig())
    loop = Loop(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    method.after_step(loop.context())
    for layer in layers_of(model).values():
        assert torch.equal(layer.weight != 0, layer.mask)


def test_full_density_is_dense_training_bit_for_bit():
    model, method = prepared(SparseConfig(density=1.0))
    dense, idle = small_model(), Idle()
    Loop(model, method).run(3)
    Loop(dense, idle).run(3)
    assert same_weights(model, dense)


def test_before_the_first_pruning_gradual_is_dense_training_bit_for_bit():
    model, method = prepared(GRADUAL)
    first = GRADUAL.mask.schedule(20, 0.25).first
    assert first == 2
    ours, theirs = Loop(model, method), Loop(small_model(), Idle())
    ours.run(first - 1)
    theirs.run(first - 1)
    assert same_weights(ours.model, theirs.model)
    ours.run(1)
    theirs.run(1)
    assert not same_weights(ours.model, theirs.model)


def test_gradual_masks_only_shrink_and_have_the_density_of_the_schedule():
    model, method = prepared(GRADUAL)
    schedule = GRADUAL.mask.schedule(14, 0.25)
    loop = Loop(model, method, total_steps=14)
    size = sum(layer.weight.numel() for layer in layers_of(model).values())
    before = {name: layer.mask.clone() for name, layer in layers_of(model).items()}
    for step in range(14):
        loop.run(1)
        assert sum(used(model).values()) == round(schedule.density_after(step + 1) * size)
        assert masked_are_zero(loop)
        for name, layer in layers_of(model).items():
            assert not (layer.mask & ~before[name]).any()
            before[name] = layer.mask.clone()
    assert method.describe(model).numbers["density"] == pytest.approx(0.25, abs=1 / size)


def test_pruning_is_global_by_magnitude_but_for_the_floor():
    model, method = prepared(SparseConfig(density=0.25, mask=GradualMask(floor=0.4)))
    layers = layers_of(model)
    starving = "model.layers.0.self_attn.v_proj"
    with torch.no_grad():
        layers[starving].weight.mul_(1e-3)
    Loop(model, method, total_steps=8, learning_rate=0.0).run(8)
    size = layers[starving].weight.numel()
    assert int(layers[starving].mask.sum()) == int(0.4 * 0.25 * size)
    others = [layer for name, layer in layers.items() if name != starving]
    kept = min(float(layer.weight.detach()[layer.mask].abs().min()) for layer in others)
    pruned = max(
        float(prepared(GRADUAL)[0].get_submodule(name).weight.detach()[~layer.mask].abs().max())
        for name, layer in layers.items()
        if name != starving
    )
    assert pruned <= kept
    assert method.describe(model).numbers["min_density"] == pytest.approx(0.1, abs=1e-4)


def test_pruning_takes_nothing_back_even_where_used_weights_are_zero():
    torch.manual_seed(0)
    layers = {name: MaskedLinear(nn.Linear(8, 8), "sparse") for name in ("a", "b")}
    for layer in layers.values():
        layer.mask[:, 4:] = False
        layer.weight.detach().zero_()
    masks = magnitude_masks(layers, 0.4, floor=0.5)
    assert not any((masks[name] & ~layer.mask).any() for name, layer in layers.items())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.4 * 128)


def test_a_floor_of_one_prunes_every_layer_alike():
    model, method = prepared(SparseConfig(density=0.25, mask=GradualMask(floor=1.0)))
    Loop(model, method, total_steps=8).run(8)
    for layer in layers_of(model).values():
        assert int(layer.mask.sum()) == layer.weight.numel() // 4


def test_a_density_too_low_for_the_layers_is_refused_before_training():
    with pytest.raises(RecipeError, match="EW-726"):
        prepared(SparseConfig(density=1e-7))
    with pytest.raises(RecipeError, match="EW-726"):
        prepared(SparseConfig(density=1e-7, mask=GradualMask()))


def test_a_schedule_that_does_not_fit_is_refused_before_training():
    method = SparseConfig(mask=GradualMask(prune_every=100)).build()
    with pytest.raises(RecipeError, match="EW-728"):
        method.check_run(100)
    method.check_run(1000)
    SparseConfig().build().check_run(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "greater than 0"),
        ({"density": 1.5}, "less than or equal to 1"),
        ({"density": 0.3, "mask": {"type": "2:4"}}, "density 0.5"),
        ({"mask": {"type": "gradual", "start": 0.8}}, "start must be below end"),
        ({"mask": {"type": "static", "start": 0.8}}, "start"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig.model_validate(settings)


def test_two_of_four_follows_the_definition_also_for_equal_weights():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-2, 3, (64, 32), generator=generator).float()
    expected = np.zeros((64, 32), dtype=bool)
    for row in range(64):
        for group in range(0, 32, 4):
            order = np.argsort(-weight[row, group : group + 4].abs().numpy(), kind="stable")
            expected[row, group + order[:2]] = True
    assert np.array_equal(two_of_four(weight).numpy(), expected)


def test_two_of_four_uses_the_pattern_and_its_gradient_reaches_all_weights():
    torch.manual_seed(0)
    layer = SemiStructuredLinear(nn.Linear(16, 8), "sparse", decay=0.0)
    x = torch.randn(5, 16)
    output = layer(x)
    assert torch.equal(output, nn.functional.linear(x, layer.weight * two_of_four(layer.weight), layer.bias))
    output.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(8, 16))


def test_the_decay_is_that_of_unused_weights_once_a_step():
    torch.manual_seed(0)
    layer = SemiStructuredLinear(nn.Linear(16, 8), "sparse", decay=0.01)
    for _ in range(3):
        layer(torch.randn(5, 16)).sum().backward()
    before = layer.weight.grad.clone()
    layer.fix_gradient()
    unused = torch.where(two_of_four(layer.weight), 0.0, layer.weight.detach())
    torch.testing.assert_close(layer.weight.grad - before, 0.01 * unused, atol=1e-6, rtol=0)


def test_two_of_four_is_exact_in_the_finished_model():
    model, method = prepared(SparseConfig(mask=TwoOfFourMask()))
    loop = Loop(model, method)
    before = [layer.kept().clone() for layer in layers_of(model).values()]
    loop.run(6)
    after = [layer.kept() for layer in layers_of(model).values()]
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True))
    assert all(layer.weight.count_nonzero() == layer.weight.numel() for layer in layers_of(model).values())
    plain, _ = method.finish(model)
    for name, layer in layers_of(model).items():
        weight = plain.get_submodule(name).weight
        assert has_pattern(weight) and not has_pattern(layer.weight)
        assert weight.count_nonzero() == weight.numel() // 2
    assert method.describe(model).numbers["density"] == 0.5


def test_rows_that_are_no_multiple_of_four_are_refused_by_name():
    model = small_model()
    model.model.layers[1].mlp.down_proj = nn.Linear(510, 256, bias=False)
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.down_proj[\s\S]*EW-729[\s\S]*508"):
        SparseConfig(mask=TwoOfFourMask()).build().prepare(model)


def test_sparse_kernels_are_refused_where_there_are_none():
    model, method = prepared(SparseConfig(mask=TwoOfFourMask()))
    plain, _ = method.finish(model)
    with pytest.raises(RecipeError, match=r"EW-730[\s\S]*on cpu"):
        use_sparse_kernels(plain.bfloat16())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("mask", [StaticMask(), GradualMask(), TwoOfFourMask()], ids=lambda mask: mask.type)
def test_it_trains_under_autocast_and_in_a_compiled_graph_that_is_made_once(mask):
    model, method = prepared(SparseConfig(mask=mask))
    compiled: list[int] = []

    def count(graph, inputs):
        compiled.append(1)
        return graph.forward

    model.model.compile(backend=count, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        loop = Loop(model, method, total_steps=8)
        loop.run(1)
        made = len(compiled)
        loop.run(7)
    assert made == len(compiled) > 0
    assert method.describe(model).numbers["density"] == pytest.approx(0.5, abs=1e-5)


def test_resumed_masks_are_those_of_the_checkpoint_and_not_drawn_anew():
    model, method = prepared(GRADUAL)
    loop = Loop(model, method)
    loop.run(6)
    state = copy.deepcopy(method.state_dict())
    again, other = prepared(GRADUAL, seed=3)
    buffer = next(iter(layers_of(again).values())).mask
    other.load_state_dict(state)
    assert next(iter(layers_of(again).values())).mask is buffer
    assert used(again) == used(model)


def test_masks_lie_in_the_layers_where_a_copy_of_the_model_takes_them_along():
    model, method = prepared(SparseConfig())
    assert not any("mask" in name for name in model.state_dict())
    twin = copy.deepcopy(model)
    assert isinstance(next(iter(layers_of(twin).values())), MaskedLinear)
    assert method.describe(twin) == method.describe(model)
    assert torch.equal(logits(twin), logits(model))


class Idle:
    """A method that does nothing, for the dense twin."""

    def before_step(self, ctx): ...

    def after_backward(self, ctx): ...

    def after_step(self, ctx): ...

    def penalty(self):
        return None


def same_weights(ours, theirs):
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)
