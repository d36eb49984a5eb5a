"""Low-rank training: the mathematics of factors, restarts, ReLoRA, and that it saves what it says."""

import pytest
import torch
from methods import Loop, difference, logits, prepared, small_model, tokens
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgewright.compress.factors import FactoredLinear, Factors, cola, rebalanced, spectral
from edgewright.compress.lowrank import LowRankConfig, ReLoRAConfig
from edgewright.compress.relora import ReLoRALinear
from edgewright.errors import RecipeError

OUT, IN, RANK = 48, 80, 12


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors(rank=RANK):
    """Badly balanced on purpose."""
    return Factors(up=random(OUT, rank, seed=1) * 20, down=random(rank, IN, seed=2) * 0.01)


def layer(activation="none", *, rank=RANK, columns=0, mix=1.0, bias=False):
    index = torch.arange(3, 3 + 2 * columns, 2, dtype=torch.int32)
    return FactoredLinear(
        Factors(up=random(OUT, rank, seed=1), down=random(rank, IN, seed=2)),
        bias=nn.Parameter(random(OUT, seed=3)) if bias else None,
        activation=activation,
        columns=random(OUT, columns, seed=4) if columns else None,
        index=index if columns else None,
        mix=mix,
        method="lowrank",
    )


def balance(found):
    up, down = found.up.detach().double(), found.down.detach().double()
    return float((up.T @ up - down @ down.T).norm() / (up.T @ up).norm())


# ---------------------------------------------------------------- factors


def test_spectral_factors_are_the_best_approximation_and_balanced():
    weight = random(OUT, IN)
    found = spectral(weight, RANK)
    lost = torch.linalg.svdvals(weight.double())[RANK:]
    error = (weight.double() - found.up.double() @ found.down.double()).norm()
    assert float(error) == pytest.approx(float(lost.norm()), rel=1e-6)  # Eckart and Young
    assert balance(found) < 1e-6


def test_cola_factors_have_the_spread_of_the_paper():
    found = cola(torch.empty(1024, 512), 64)
    assert float(found.up.std()) == pytest.approx(64**-0.25 * 1536**-0.25, rel=0.02)
    assert float((found.up @ found.down).std()) == pytest.approx(1536**-0.5, rel=0.02)


def test_rebalancing_keeps_the_product_and_is_the_balanced_split_of_its_svd():
    before = factors()
    after = rebalanced(before)
    product, again = before.up.double() @ before.down.double(), after.up.double() @ after.down.double()
    assert float((again - product).norm() / product.norm()) < 3e-7
    assert balance(after) < 1e-6 < balance(before)
    assert torch.allclose((after.up**2).sum(0).double(), torch.linalg.svdvals(product)[:RANK], rtol=1e-5)


def test_a_direction_that_the_product_lacks_still_gets_gradients():
    lacking = factors()
    lacking.up[:, 0] = lacking.up[:, 1]
    lacking.down[0] = lacking.down[1]
    after = rebalanced(lacking)
    product = lacking.up.double() @ lacking.down.double()
    assert float((after.up.double() @ after.down.double() - product).norm() / product.norm()) < 3e-7
    empty = (after.up == 0).all(0)
    assert int(empty.sum()) == 1
    assert (after.down.norm(dim=1) > 1e-3).all()


def test_a_product_of_zero_is_left_as_it_is():
    zero = layer()
    nn.init.zeros_(zero.up.weight)
    kept = zero.down.weight.clone()
    zero.refactor()
    assert torch.equal(zero.down.weight, kept) and not zero.up.weight.any()


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("columns", [0, 7])
def test_forward_and_gradients_follow_the_formula_in_float64(activation, columns):
    ours = layer(activation, columns=columns, mix=0.7 if columns else 1.0, bias=True).double()
    x = random(5, 3, IN, dtype=torch.float64).requires_grad_()
    probe = random(5, 3, OUT, seed=9, dtype=torch.float64)
    (ours(x) * probe).sum().backward()
    # by hand: h = A x, y = g B act(h) + (1 - g) S x_I + b
    a, b = ours.down.weight.detach(), ours.up.weight.detach()
    h = x.detach() @ a.T
    sigmoid = torch.sigmoid(h)
    inner, slope = (h, 1.0) if activation == "none" else (h * sigmoid, sigmoid * (1 + h * (1 - sigmoid)))
    expected = ours.mix * inner @ b.T + ours.bias.detach()
    of_h = ours.mix * (probe @ b) * slope
    of_x = of_h @ a
    if columns:
        s, index = ours.columns.weight.detach(), ours.index.long()
        expected = expected + (1 - ours.mix) * x.detach()[..., index] @ s.T
        of_x[..., index] += (1 - ours.mix) * probe @ s
        of_s = (1 - ours.mix) * torch.einsum("bto,btk->ok", probe, x.detach()[..., index])
        torch.testing.assert_close(ours.columns.weight.grad, of_s)
    torch.testing.assert_close(ours(x).detach(), expected)
    torch.testing.assert_close(x.grad, of_x)
    torch.testing.assert_close(ours.down.weight.grad, torch.einsum("btr,btn->rn", of_h, x.detach()))
    torch.testing.assert_close(ours.up.weight.grad, ours.mix * torch.einsum("bto,btr->or", probe, inner))
    torch.testing.assert_close(ours.bias.grad, probe.sum((0, 1)))


@pytest.mark.parametrize("columns", [0, 7])
def test_the_effective_weight_is_the_forward_without_an_activation(columns):
    ours = layer(columns=columns, mix=0.25 if columns else 1.0)
    x = random(5, IN, seed=8)
    with torch.no_grad():
        assert difference(x @ ours.effective_weight().T, ours(x)) < 1e-6


def test_no_matrix_stands_for_factors_with_an_activation():
    with pytest.raises(ValueError, match="silu lies between"):
        layer("silu").effective_weight()


@pytest.mark.parametrize("columns", [0, 7])
def test_forward_and_backward_cost_what_the_formula_says(columns):
    ours = layer(columns=columns, mix=0.7 if columns else 1.0)
    x = random(10, IN).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ours(x).sum().backward()
    forward = 10 * (2 * RANK * (OUT + IN) + 2 * columns * OUT)
    assert ours.flops() * 10 == forward
    assert counter.get_total_flops() == 3 * forward


# ---------------------------------------------------------------- what it saves


def test_parameters_gradients_and_moments_are_those_of_the_formula():
    model, method = prepared(LowRankConfig(rank_fraction=0.25))
    loop = Loop(model, method)
    loop.run(1)
    expected = 0
    for _, linear in small_model().named_modules():
        if isinstance(linear, nn.Linear) and linear.out_features != 64:  # not the head
            rank = min(linear.in_features, linear.out_features) // 4
            expected += rank * (linear.in_features + linear.out_features)
    numbers = method.describe(model).numbers
    assert numbers["parameters"] == expected
    inside = {id(p) for m in model.modules() if isinstance(m, FactoredLinear) for p in m.parameters()}
    state = [s for p, s in loop.optimizer.state.items() if id(p) in inside]
    assert sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in state) == 8 * expected
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert sum(p.grad.nbytes for p in model.parameters() if id(p) in inside) == 4 * expected
    assert numbers["without_saving"] == 0


def test_a_rank_too_high_to_save_anything_is_counted():
    model, method = prepared(LowRankConfig(rank_fraction=1.0))
    assert method.describe(model).numbers["without_saving"] == 14


# ---------------------------------------------------------------- restarts


def test_a_restart_keeps_the_function_forgets_the_moments_and_dips_the_rate():
    model, method = prepared(LowRankConfig(rank=32, restart_every=4, rewarm_steps=2))
    loop = Loop(model, method, total_steps=20)
    loop.run(3)
    loop.model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    loop.optimizer.step()
    before = logits(model)
    unbalanced = model.model.layers[0].self_attn.q_proj
    assert balance(Factors(up=unbalanced.up.weight, down=unbalanced.down.weight)) > 1e-4
    assert loop.optimizer.state
    method.after_step(loop.context())  # of step 3: four are done
    assert difference(logits(model), before) < 1e-6
    assert balance(Factors(up=unbalanced.up.weight, down=unbalanced.down.weight)) < 1e-6
    assert not loop.optimizer.state
    assert loop.rewarmed == [(3, 2)]


def test_the_first_step_after_a_reset_moves_every_entry_by_the_learning_rate():
    model, method = prepared(LowRankConfig(rank=32, restart_every=2, refactor=False, rewarm_steps=0))
    loop = Loop(model, method, total_steps=20, learning_rate=1e-3)
    loop.optimizer.param_groups[0]["weight_decay"] = 0.0
    loop.run(2)
    before = model.model.layers[0].mlp.up_proj.down.weight.clone()
    loop.run(1)
    moved = (model.model.layers[0].mlp.up_proj.down.weight.detach() - before.detach()).abs() / 1e-3
    assert float(moved.median()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("total", "steps"), [(12, [3, 7]), (13, [3, 7]), (15, [3, 7]), (16, [3, 7, 11]), (8, [3])])
def test_restarts_come_at_the_end_of_a_period_that_another_follows(total, steps):
    model, method = prepared(LowRankConfig(rank=8, restart_every=4, rewarm_steps=1, layers=("q_proj",)))
    loop = Loop(model, method, total_steps=total)
    for loop.step in range(total):
        method.after_step(loop.context())
    assert [step for step, _ in loop.rewarmed] == steps


@pytest.mark.parametrize("refactor", [True, False])
def test_refactor_and_reset_are_switched_apart(refactor):
    rewarm = {} if refactor else {"rewarm_steps": 1}
    config = LowRankConfig(rank=8, restart_every=2, refactor=refactor, reset=not refactor, **rewarm)
    model, method = prepared(config)
    loop = Loop(model, method)
    loop.run(2)
    first = model.model.layers[0].self_attn.q_proj
    assert (balance(Factors(up=first.up.weight, down=first.down.weight)) < 1e-6) == refactor
    assert bool(loop.optimizer.state) == refactor
    assert bool(loop.rewarmed) != refactor


# ---------------------------------------------------------------- ReLoRA


def test_relora_trains_only_the_factors_and_merges_them():
    model, method = prepared(LowRankConfig(rank=8, relora=ReLoRAConfig(merge_every=4, alpha=16), rewarm_steps=2))
    first = model.model.layers[0].self_attn.q_proj
    assert isinstance(first, ReLoRALinear) and first.scale == 2
    start = first.weight.clone()
    loop = Loop(model, method)
    loop.run(3)
    assert torch.equal(first.weight, start) and first.up.any()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    loop.optimizer.step()
    before, effective = logits(model), first.effective_weight().detach().clone()
    embedding = model.get_input_embeddings().weight
    method.after_step(loop.context())
    assert difference(logits(model), before) < 1e-5
    assert torch.equal(first.weight, effective) and not first.up.any() and first.down.any()
    assert first.up not in loop.optimizer.state and first.down not in loop.optimizer.state
    assert embedding in loop.optimizer.state
    assert loop.rewarmed == [(3, 2)]


def test_many_merges_reach_a_rank_that_the_factors_do_not_have():
    model, method = prepared(LowRankConfig(rank=2, relora=ReLoRAConfig(merge_every=2), rewarm_steps=0))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    Loop(model, method).run(6)
    plain, _ = method.finish(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    change = plain.get_parameter(name).double() - start[name].double()
    values = torch.linalg.svdvals(change)
    assert int((values > 1e-5 * values[0]).sum()) == 6


# ---------------------------------------------------------------- bad input


def test_a_rank_above_the_matrix_is_refused_by_name():
    with pytest.raises(RecipeError) as error:
        prepared(LowRankConfig(rank=129))
    assert error.value.code == "EW-720"
    assert "model.layers.0.self_attn.k_proj" in str(error.value)
    assert "at most 128" in str(error.value.expected)


def test_a_period_that_never_comes_is_refused():
    with pytest.raises(RecipeError) as error:
        LowRankConfig(rank=8, restart_every=11).build().check_run(20)
    assert error.value.code == "EW-721" and "restart_every: 10" in error.value.fix
    LowRankConfig(rank=8, restart_every=11).build().check_run(22)
    with pytest.raises(RecipeError, match="merge_every"):
        LowRankConfig(rank=8, relora=ReLoRAConfig(merge_every=100)).build().check_run(20)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "exactly one of rank"),
        ({"rank": 8, "rank_fraction": 0.5}, "exactly one of rank"),
        ({"rank_fraction": 1.5}, "less than or equal to 1"),
        ({"rank": 8, "activation": "silu", "restart_every": 50}, "cannot be refactored"),
        ({"rank": 8, "restart_every": 50, "refactor": False, "reset": False}, "does nothing"),
        ({"rank": 8, "restart_every": 10}, "rewarm_steps must be below restart_every"),
        ({"rank": 8, "relora": {"merge_every": 100}, "activation": "silu"}, "relora merges"),
        ({"rank": 8, "relora": {"merge_every": 100}, "init": "cola"}, "starts from B = 0"),
        ({"rank": 8, "relora": {"merge_every": 10}}, "below merge_every"),
        ({"rank": 8, "refactor": False}, "refactor is of restarts"),
        ({"rank": 8, "reset": False}, "reset is of restarts"),
        ({"rank": 8, "rewarm_steps": 5}, "rewarm_steps is of restarts"),
        ({"rank": 8, "relora": {"merge_every": 100}, "reset": False}, "reset is of restarts"),
        ({"rank": 8, "restart_every": 50, "reset": False, "rewarm_steps": 5}, "rewarm_steps is of a reset"),
        ({"rank": 8, "relora": {"merge_every": 100}, "refactor": False}, "refactor is of restarts"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        LowRankConfig(**settings)


@pytest.mark.parametrize("relora", [None, {"merge_every": 100}])
def test_a_resolved_recipe_is_accepted_with_all_its_defaults(relora):
    config = LowRankConfig(rank=8, relora=relora)
    assert LowRankConfig.model_validate(config.model_dump()) == config


def test_restarts_with_an_activation_may_reset_alone():
    LowRankConfig(rank=8, activation="silu", restart_every=50, refactor=False)
