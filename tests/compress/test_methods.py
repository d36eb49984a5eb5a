"""What must be true of every method, over the table of all of them."""

import numpy as np
import pytest
import torch
from methods import CASES, Loop, difference, logits, prepared, small_model, tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgewright.compress.four_bits import FOUR_BIT_PRODUCTS
from edgewright.compress.layers import CompressedLinear
from edgewright.errors import RecipeError
from edgewright.method import Method

STEPS = 7
"""More than one period of everything that the table's settings do now and then."""

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_every_method_is_in_the_table():
    """But those that take the whole model, or the head alone: test_elastic.py, test_shear.py, test_draft_head.py."""
    from edgewright import recipe  # imports all
    from edgewright.recipe_rules import WHOLE

    assert recipe
    assert {case.config.type for case in CASES} == set(Method.registry) - WHOLE - {"draft_head"}


@every
def test_at_the_limit_it_is_the_dense_model(case):
    if case.limit is None:
        pytest.skip("it has no such limit")
    model, method = prepared(case.limit)
    method.before_step(Loop(model, method).context())
    assert difference(logits(model), logits(small_model())) < 1e-6


@every
def test_gradients_reach_everything_that_is_trained(case):
    model, method = prepared(case.config)
    loop = Loop(model, method)
    loop.run(2)
    method.before_step(loop.context())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    ]
    assert not without


@every
def test_training_changes_the_finished_model(case):
    model, method = prepared(case.config)
    before, _ = method.finish(model)
    Loop(model, method).run(STEPS)
    after, _ = method.finish(model)
    assert difference(logits(after), logits(before)) > 1e-4


@every
def test_finish_leaves_the_trained_form_alone_and_gives_the_same_function(case):
    model, method = prepared(case.config)
    loop = Loop(model, method, total_steps=STEPS)
    loop.run(STEPS)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = logits(model)
    plain, lattice = method.finish(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), trained)
    assert difference(logits(plain), trained) <= case.exact
    if case.merges:
        assert not any(isinstance(module, CompressedLinear) for module in plain.modules())
        assert plain.state_dict().keys() >= small_model().state_dict().keys()
    assert bool(lattice) == case.quantizes
    for name, tensor in lattice.items():
        weight = plain.get_parameter(name).detach().numpy()
        assert np.array_equal(tensor.dequantize(), weight)


@every
def test_state_survives_a_stop_bit_for_bit(case):
    model, method = prepared(case.config)
    whole = Loop(model, method)
    whole.run(4)
    state = whole.state()
    whole.run(STEPS - 4)
    again = Loop(*prepared(case.config, seed=5))
    again.load(state)
    again.run(STEPS - 4)
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@every
def test_what_it_says_it_costs_is_what_it_costs(case):
    model, method = prepared(case.config)
    report = method.describe(model)
    dense = small_model()
    plain = sum(parameter.numel() for parameter in dense.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = report.numbers.get("frozen", 0)
    assert trained == plain - report.numbers["weights"] - frozen + report.numbers["parameters"]
    assert report.changed == 14  # seven linear layers in each of two blocks
    layer = next(module for module in model.modules() if isinstance(module, CompressedLinear))
    with FlopCounterMode(display=False, custom_mapping=FOUR_BIT_PRODUCTS) as counter:
        layer(torch.randn(3, layer.in_features, requires_grad=True))
    assert counter.get_total_flops() == pytest.approx(3 * layer.flops() + layer.flops_per_forward(), rel=0.01)


@every
def test_it_touches_what_it_was_given_and_nothing_else(case):
    config = case.config.model_copy(update={"layers": ("mlp.down_proj",)})
    model, method = prepared(config)
    taken = {name for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    assert taken == {f"model.layers.{index}.mlp.down_proj" for index in (0, 1)}
    assert not taken & set(method.describe(model).skipped)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@every
def test_two_methods_do_not_share_a_weight(case):
    model, _ = prepared(case.config)
    with pytest.raises(RecipeError) as error:
        case.config.build().prepare(model)
    assert error.value.code == "EW-711"
    assert "model.layers.0.self_attn.q_proj" in str(error.value)


@every
def test_two_methods_share_out_the_layers(case):
    model, first = prepared(case.config.model_copy(update={"exclude": ("down_proj",)}))
    second = case.config.model_copy(update={"layers": ("down_proj",)}).build()
    second.prepare(model)
    assert first.describe(model).changed == 12
    assert second.describe(model).changed == 2


@every
def test_a_layer_that_does_not_exist_is_refused(case):
    for setting in ("layers", "exclude"):
        with pytest.raises(RecipeError) as error:
            prepared(case.config.model_copy(update={setting: ("dwon_proj",)}))
        assert error.value.code == "EW-708"
        assert "down_proj" in error.value.fix
