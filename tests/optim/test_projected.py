"""What holds for every optimizer over projected gradients."""

import copy
import math

import pytest
import torch
from torch import nn

import edgewright.optim
from edgewright.errors import RecipeError
from edgewright.optim import Apollo, ApolloMini, Fira, GaLore, GradNormLoRP, QGaLore
from edgewright.optim.bf16_weight import Bf16Weight
from edgewright.optim.projection import random_projection
from edgewright.optim.state import named_state, reset_all_state, reset_state, restore_state
from edgewright.optim.weights import readable

ALL = [Apollo, ApolloMini, GaLore, Fira, GradNormLoRP]
STATES = ["fp32", "bf16", "int8"]
SHAPES = [(96, 64), (64, 96), (64, 64), (96,), (300, 16)]
every = pytest.mark.parametrize("kind", ALL)


def parameters(seed=0, shapes=SHAPES):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(optimizer, params, first, count):
    for step in range(first, first + count):
        give_gradients(params, step)
        optimizer.step()


def values(params):
    return [parameter.detach().clone() for parameter in params]


def identical(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_public_names_are_frozen():
    names = {"Apollo", "ApolloMini", "Fira", "GaLore", "GradNormLoRP"}
    assert names <= set(edgewright.optim.__all__)
    assert all(issubclass(getattr(edgewright.optim, name), torch.optim.Optimizer) for name in names)


@every
@pytest.mark.parametrize("states", STATES)
def test_every_parameter_changes_in_every_step(kind, states):
    params = parameters()
    optimizer = kind(params, states=states)
    for step in range(4):
        before = values(params)
        steps(optimizer, params, step, 1)
        for parameter, old in zip(params, before, strict=True):
            assert parameter.isfinite().all() and not torch.equal(parameter, old), parameter.shape


@every
def test_the_loss_falls(kind):
    params, targets = parameters(0), parameters(1)
    optimizer = kind(params, lr=0.05, limiter=None) if kind in (Apollo, ApolloMini, Fira) else kind(params, lr=0.05)
    losses = []
    for _ in range(40):
        loss = torch.stack([(a - b.detach()).square().mean() for a, b in zip(params, targets, strict=True)]).sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


@every
@pytest.mark.parametrize("states", STATES)
def test_a_state_that_was_saved_goes_on_with_the_same_bits(kind, states):
    """Across a refresh of the projection, and with moments that torch would turn into the parameters' type."""
    whole, cut = parameters(), parameters()
    optimizer = kind(whole, states=states, update_proj_gap=4)
    torch.manual_seed(5)
    steps(optimizer, whole, 0, 6)
    rng = torch.get_rng_state()
    steps(optimizer, whole, 6, 6)
    first = kind(cut, states=states, update_proj_gap=4)
    torch.manual_seed(5)
    steps(first, cut, 0, 6)
    saved = copy.deepcopy(first.state_dict())
    second = kind(cut, states=states, update_proj_gap=4)
    second.load_state_dict(saved)
    torch.set_rng_state(rng)
    steps(second, cut, 6, 6)
    assert identical(values(whole), values(cut))
    for a, b in zip(whole, cut, strict=True):
        assert optimizer.state[a].keys() == second.state[b].keys()
        for key, value in optimizer.state[a].items():
            other = second.state[b][key]
            assert value.dtype == other.dtype and torch.equal(value, other), key


@every
def test_the_state_by_names_goes_on_with_the_same_bits(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32))

    whole, cut = model(), model()
    optimizer = kind(whole.parameters(), update_proj_gap=4)
    steps(optimizer, list(whole.parameters()), 0, 10)
    first = kind(cut.parameters(), update_proj_gap=4)
    steps(first, list(cut.parameters()), 0, 5)
    save_file({name: tensor.contiguous() for name, tensor in named_state(first, cut).items()}, tmp_path / "state")
    second = kind(cut.parameters(), update_proj_gap=4)
    restore_state(second, cut, load_file(tmp_path / "state"))
    steps(second, list(cut.parameters()), 5, 5)
    assert identical(whole.parameters(), cut.parameters())


@every
@pytest.mark.parametrize("states", STATES)
def test_the_predicted_state_bytes_are_the_real_ones(kind, states):
    params = parameters(shapes=[(256, 128), (128, 512), (128, 128), (99,), (300, 16)])
    optimizer = kind([{"params": params[:3], "rank": 100}, {"params": params[3:], "rank": None}], states=states)
    predicted = optimizer.state_bytes()
    steps(optimizer, params, 0, 2)
    assert sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()) == predicted


@every
def test_a_deep_copy_takes_the_same_steps(kind):
    params = parameters()
    optimizer = kind(params)
    steps(optimizer, params, 0, 2)
    both = copy.deepcopy((params, optimizer))
    steps(optimizer, params, 2, 3)
    steps(both[1], both[0], 2, 3)
    assert identical(params, both[0])


@every
def test_weight_decay_is_decoupled_and_comes_last(kind):
    """One step with it is one without, times 1 - lr * decay; the moments do not see it."""
    plain, decayed = parameters(), parameters()
    one, two = kind(plain, lr=0.01), kind(decayed, lr=0.01, weight_decay=0.5)
    steps(one, plain, 0, 1)
    steps(two, decayed, 0, 1)
    for a, b in zip(plain, decayed, strict=True):
        torch.testing.assert_close(a * (1 - 0.005), b, rtol=1e-6, atol=1e-7)
        assert torch.equal(one.state[a]["exp_avg"], two.state[b]["exp_avg"])


@every
def test_groups_have_options_of_their_own(kind):
    """Two matrices in groups with other rates, ranks and gaps do what each does alone."""
    both = parameters(shapes=[(96, 64), (64, 96)])
    alone = values(both)
    options = [{"lr": 0.01, "rank": 8, "update_proj_gap": 2}, {"lr": 0.03, "rank": 20, "scale": 0.5, "eps": 1e-3}]
    together = kind([{"params": [p], **each} for p, each in zip(both, options, strict=True)])
    steps(together, both, 0, 4)
    for number, each in enumerate(options):
        parameter = nn.Parameter(alone[number])
        optimizer = kind(
            [{"params": [parameter], **each}], **({"seed": number} if kind in (Apollo, ApolloMini) else {})
        )
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            gradients = [torch.randn(p.shape, generator=generator) for p in both]
            parameter.grad = gradients[number]
            optimizer.step()
        assert torch.equal(parameter, both[number])
        assert together.state[both[number]]["exp_avg"].shape[number] == [96, 96][number]
        assert min(together.state[both[number]]["exp_avg"].shape) == each["rank"]


@every
def test_a_flat_list_is_split_by_shape(kind):
    params = parameters(shapes=[(96, 64), (64, 32), (64,), (33, 33), (200, 2)])
    named = [(f"weight{number}", parameter) for number, parameter in enumerate(params)]
    optimizer = kind(named, rank=32)
    matrices, rest = optimizer.param_groups
    assert (matrices["param_names"], rest["param_names"]) == (["weight0", "weight3"], ["weight1", "weight2", "weight4"])
    assert (matrices["rank"], rest["rank"]) == (32, None)
    steps(optimizer, params, 0, 1)
    assert optimizer.state[params[1]]["exp_avg"].shape == (64, 32)


@every
def test_a_parameter_without_gradient_stays(kind):
    params = parameters()
    optimizer = kind(params)
    give_gradients(params, 0)
    params[0].grad = params[3].grad = None
    before = values(params)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(params, before, strict=True)]
    assert moved == [False, True, True, False, True]
    assert params[0] not in optimizer.state


@every
def test_bf16_weights_are_rounded_stochastically(kind):
    """Updates far below half a unit in the last place move the mean all the same."""
    weight = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
    optimizer = kind([{"params": [weight], "rank": 16}], lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert weight.dtype == torch.bfloat16
    assert weight.float().mean().item() == pytest.approx((1 - 1e-4) ** 20, abs=4e-4)  # nearest would leave 1


def test_a_reset_of_all_begins_anew():
    params = parameters()
    for kind in ALL:
        optimizer = kind(params)
        steps(optimizer, params, 0, 3)
        reset_all_state(optimizer)
        assert not any("exp_avg" in state or "step" in state for state in optimizer.state.values())
        steps(optimizer, params, 3, 1)
        assert all(int(optimizer.state[parameter]["step"]) == 1 for parameter in params)


def test_after_a_reset_the_random_projection_is_another():
    """Else restarts in the rhythm of the refresh would draw the same one for ever."""
    (weight,) = params = parameters(shapes=[(96, 64)])
    optimizer = Apollo(params)
    steps(optimizer, params, 0, 1)
    seed = int(optimizer.state[weight]["seed"])
    reset_state(optimizer, weight, None)
    steps(optimizer, params, 1, 1)
    assert seed == 1 and int(optimizer.state[weight]["seed"]) != seed


@every
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("shape", [(512, 64), (64, 512)])
def test_a_masked_reset_forgets_whole_channels(kind, states, shape):
    (weight,) = params = parameters(shapes=[shape])
    optimizer = kind([{"params": params, "rank": 32}], states=states)
    steps(optimizer, params, 0, 3)
    storage = {key: optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    mask = torch.zeros(shape, dtype=torch.bool)
    channels = mask if shape[0] > shape[1] else mask.T
    channels[3] = channels[7] = True
    channels[9, :5] = True
    optimizer.reset_state(weight, mask)
    from edgewright.optim.storage import moment_storage

    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        now = moment_storage(states, signed=signed).read(optimizer.state[weight], key)
        now = now if shape[0] > shape[1] else now.T
        assert not now[[3, 7]].any() and now[9].any() and now[4].any()
        kept, old = optimizer.state[weight][key], storage[key]
        kept, old = (kept, old) if shape[0] > shape[1] else (kept.T, old.T)
        rest = [row for row in range(512) if row not in (3, 7)]
        assert torch.equal(kept[rest], old[rest])


def test_a_masked_reset_of_a_vector_is_elementwise():
    (vector,) = params = parameters(shapes=[(10,)])
    optimizer = GaLore(params)
    steps(optimizer, params, 0, 2)
    optimizer.reset_state(vector, torch.arange(10) < 4)
    assert not optimizer.state[vector]["exp_avg"][:4].any() and optimizer.state[vector]["exp_avg"][4:].all()


@pytest.mark.parametrize(("kind", "extra"), [(Apollo, {}), (ApolloMini, {}), (Fira, {}), (GaLore, {})])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_the_rank_of_an_update(kind, extra, shape):
    """GaLore's has the rank that was asked for, the others' is full; APOLLO's is a positive diagonal times G."""
    (weight,) = params = parameters(shapes=[shape])
    optimizer = kind([{"params": params, "rank": 5}], lr=1.0, **extra)
    for step in range(3):
        before = weight.detach().clone()
        steps(optimizer, params, step, 1)
        update = before - weight.detach()
        assert torch.linalg.matrix_rank(update, rtol=1e-3) == (5 if kind is GaLore else min(shape))
        ratio = update / weight.grad
        if kind is ApolloMini:
            assert ratio.min() > 0
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=2e-3, atol=0)
        if kind is Apollo:
            channels = ratio if shape[0] >= shape[1] else ratio.T
            assert channels.min() > 0 and channels.median(dim=1).values.std() > 0
            median = channels.median(dim=1, keepdim=True).values
            torch.testing.assert_close(channels, median.expand_as(channels), rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", [Apollo, ApolloMini, Fira])
def test_the_norm_of_what_is_limited_grows_by_a_hundredth_at_most(kind):
    (weight,) = params = parameters(shapes=[(60, 40)])
    optimizer = kind([{"params": params, "rank": 8}])
    norms = []
    for step in range(40):
        give_gradients(params, step)
        weight.grad *= 10.0 ** (step % 7 - 3)
        optimizer.step()
        norms.append(float(optimizer.state[weight]["norm"]))
    growth = [after / before for before, after in zip(norms, norms[1:], strict=False)]
    assert max(growth) <= 1.01 * (1 + 1e-6) and sum(rate > 1.0099 for rate in growth) > 5 and min(growth) < 0.9


def test_a_step_without_a_gradient_does_not_stop_apollo():
    """The limiter would let the norm grow from 0 by a hundredth a step, which is never."""
    (weight,) = params = parameters(shapes=[(60, 40)])
    optimizer = Apollo([{"params": params, "rank": 8}])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    steps(optimizer, params, 0, 1)
    assert float((weight.detach() - before).norm()) > 0.1


@pytest.mark.parametrize("rank", [32, 64, 128, 256])
def test_apollo_underestimates_by_the_root_of_its_share_of_the_dimensions(rank):
    """Norm over channels of D at rank r, to that of Adam's own direction: sqrt(r / n)."""
    (weight,) = params = parameters(shapes=[(1024, 512)])
    optimizer = Apollo([{"params": params, "rank": rank}], lr=1.0, limiter=None)
    before = weight.detach().clone()
    give_gradients(params, 0)
    optimizer.step()
    factor = ((before - weight.detach()) / weight.grad).mean(dim=1)
    exact = 512**0.5 / weight.grad.norm(dim=1)  # Adam's first direction is the sign
    assert float((factor / exact).mean()) == pytest.approx(math.sqrt(rank / 512), rel=0.05)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_full_rank_galore_gives_the_gradient_back(shape):
    """With r = min(m, n), project_back(project(G)) is G, so the first step is Adam's in another basis."""
    from edgewright.optim.projection import project, project_back, svd_projection

    torch.manual_seed(0)
    gradient = torch.randn(shape)
    projection = svd_projection(gradient, min(shape))
    side = projection if shape[0] >= shape[1] else projection.T
    torch.testing.assert_close(side @ side.T, torch.eye(min(shape)), rtol=0, atol=2e-6)
    torch.testing.assert_close(project_back(project(gradient, projection), projection, gradient.shape), gradient)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_full_rank_fira_is_galore(shape):
    ours, theirs = parameters(shapes=[shape]), parameters(shapes=[shape])
    fira = Fira([{"params": ours, "rank": 20}], scale=1.0, update_proj_gap=3)
    galore = GaLore([{"params": theirs, "rank": 20}], scale=1.0, update_proj_gap=3)
    for step in range(8):
        steps(fira, ours, step, 1)
        steps(galore, theirs, step, 1)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)


def test_projections_are_independent_and_the_same_everywhere():
    shape = torch.Size((300, 200))
    one, two = random_projection(shape, 50, 1), random_projection(shape, 50, 2)
    assert torch.equal(one, random_projection(shape, 50, 1))
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 0.05
    assert float(one.var()) == pytest.approx(1 / 50, rel=0.05)
    params = parameters(shapes=[(96, 64), (96, 64)])
    optimizer = Apollo([{"params": params, "rank": 8}], update_proj_gap=2)
    seeds = []
    for step in range(6):
        steps(optimizer, params, step, 1)
        seeds.append([int(optimizer.state[parameter]["seed"]) for parameter in params])
    assert len({seed for pair in seeds for seed in pair}) == 6  # two matrices, three periods
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


@pytest.mark.parametrize("kind", [Apollo, ApolloMini])
def test_projections_that_are_drawn_in_every_step_are_those_that_are_kept(kind):
    ours, theirs = parameters(), parameters()
    steps(kind(ours, update_proj_gap=3), ours, 0, 7)
    steps(kind(theirs, update_proj_gap=3, keep_projections=False), theirs, 0, 7)
    assert identical(ours, theirs)


def test_the_memory_of_projections_that_are_kept_is_known():
    params = parameters(shapes=[(96, 64), (64, 200)])
    optimizers = [kind([{"params": params, "rank": 8}]) for kind in (Apollo, GaLore)]
    drawn = Apollo([{"params": params, "rank": 8}], keep_projections=False)
    assert [optimizer.kept_bytes() for optimizer in (*optimizers, drawn)] == [2 * 4 * 8 * 64, 0, 0]
    steps(optimizers[0], params, 0, 1)
    kept = optimizers[0]._projectors["random"]._kept
    assert sum(matrix.nbytes for _, matrix in kept.values()) == optimizers[0].kept_bytes()


@pytest.mark.parametrize(("kind", "options", "limit"), [(Apollo, {}, 1.1), (ApolloMini, {}, 0.02)])
def test_state_bytes_of_a_1b_llama(kind, options, limit):
    """Of the matrices that it owns, from one real block; bfloat16 states, rank d / 4."""
    shapes = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = kind([{"params": params, "rank": 512 if kind is Apollo else 1}], states="bf16")
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    state = optimizer.state_dict()["state"]
    real = sum(tensor.nbytes for values in state.values() for tensor in values.values())
    assert real == optimizer.state_bytes()
    assert real / sum(math.prod(shape) for shape in shapes) <= limit


def test_galores_state_is_as_published():
    """2 m r + n r values for m >= n."""
    shapes = [(2048, 2048), (5461, 2048), (2048, 5461)]
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = GaLore([{"params": params, "rank": 512}], states="bf16")
    values = sum(2 * max(shape) * 512 + min(shape) * 512 for shape in shapes)
    assert optimizer.state_bytes() == 2 * values + 8 * len(shapes)


@pytest.mark.parametrize(
    ("group", "found"),
    [
        ({"params": [("q_proj", nn.Parameter(torch.zeros(8, 4)))], "rank": 5}, r"q_proj: .*at least 5.*\[8, 4\]"),
        ({"params": [nn.Parameter(torch.zeros(8))], "rank": 1}, r"parameter 0: .*\[8\]"),
    ],
)
def test_a_rank_that_a_matrix_does_not_have_is_refused(group, found):
    with pytest.raises(RecipeError, match=f"(?s){found}") as refused:
        GaLore([group])
    assert refused.value.code == "EW-741"


@pytest.mark.parametrize("states", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.Tensor.float, torch.Tensor.bfloat16, Bf16Weight.narrowed])
def test_a_large_parameter_is_updated_in_pieces(monkeypatch, states, stored):
    """Rows after rows, which AdamW does not see; bfloat16 is rounded to nearest here, so that it draws nothing."""
    from edgewright.optim import bf16_weight, projected, storage, weights

    for module in (storage, weights, bf16_weight):
        monkeypatch.setattr(module, "round_to_bf16", lambda value: value.bfloat16())
    torch.manual_seed(0)
    start = stored(torch.randn(37, 16))
    gradients = [torch.randn(37, 16).to(start.dtype) for _ in range(4)]
    ends = []
    for piece in (1 << 24, 80):  # whole vectors of the kernel, whose ends round otherwise
        monkeypatch.setattr(projected, "PIECE", piece)
        parameter = nn.Parameter(start.clone())
        optimizer = Apollo([{"params": [parameter], "rank": None}], lr=0.1, weight_decay=0.1, states=states)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(
            (readable(parameter.detach()), *(optimizer.state[parameter][k] for k in ("exp_avg", "exp_avg_sq", "step")))
        )
    assert len(projected._pieces(parameter, optimizer.param_groups[0])) == 8
    for whole, pieces in zip(*ends, strict=True):
        assert whole.dtype == pieces.dtype and torch.equal(whole, pieces)


@every
def test_a_flat_list_of_which_nothing_can_be_projected_is_refused(kind):
    """It would be AdamW by another name; norms alone are AdamW's own."""
    small = [nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16))]
    with pytest.raises(RecipeError, match=r"(?s)larger than 16.*\[16, 16\]") as refused:
        kind(small, rank=16)
    assert refused.value.code == "EW-741"
    assert [group["rank"] for group in kind(small, rank=15).param_groups] == [15, None]
    assert [group["rank"] for group in kind(small[2:], rank=16).param_groups] == [None]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -0.1}, {"update_proj_gap": 0},
        {"rank": 0}, {"rank": 1.5}, {"rank": True}, {"scale": 0.0}, {"states": "fp8"},
    ],
)  # fmt: skip
@every
def test_values_that_no_formula_takes_are_refused(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(parameters(), **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Apollo, {"proj": "svd_of_old"}),
        (Apollo, {"limiter": 1.0}),
        (Fira, {"limiter": 0.5}),
        (QGaLore, {"queue_size": 0}),
    ],
)
def test_so_are_those_of_some_optimizers_alone(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(parameters(), **options)


@pytest.mark.parametrize("group", [{"rank": 65}, {"rank": None, "lr": -1.0}, {"scale": -1.0}], ids=str)
def test_a_group_that_is_refused_later_leaves_the_optimizer_as_it_was(group):
    params = parameters()
    optimizer = GaLore(params[:2])
    with pytest.raises(ValueError if "rank" not in group or "lr" in group else RecipeError):
        optimizer.add_param_group({"params": params[2:3], **group})
    assert len(optimizer.param_groups) == 1
    before = values(params)
    steps(optimizer, params, 0, 2)
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [False, False, True, True, True]


@pytest.mark.parametrize("states", ["bf16", "int8"])
@every
def test_narrow_states_serve_parameters_in_float64(kind, states):
    """The moments are as narrow as those of float32, and what is computed from them is what that computes."""
    shapes = [(96, 300), (300,)]  # of both kinds in eight bits: blocks, and what is too small for them
    exact, plain = (
        [nn.Parameter(p.detach().to(t)) for p in parameters(shapes=shapes)] for t in (torch.double, torch.float)
    )
    for params in (exact, plain):
        optimizer = kind(params, states=states)
        torch.manual_seed(3)
        for step in range(4):
            for parameter, gradient in zip(params, values(parameters(step + 1, shapes)), strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    assert all(parameter.dtype == torch.double for parameter in exact)
    for ours, theirs in zip(exact, plain, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("states", STATES)
def test_a_step_does_not_depend_on_the_order_of_memory(states):
    """Convolutions in channels_last, and gradients that lie in memory as their parameters do not."""
    start, gradients = torch.randn(64, 16, 3, 3), [torch.randn(64, 16, 3, 3) for _ in range(3)]
    plain, last, mixed = (nn.Parameter(start.clone()) for _ in range(3))
    last.data = start.to(memory_format=torch.channels_last)
    for parameter in (plain, last, mixed):
        optimizer = Apollo([{"params": [parameter], "rank": None}], states=states)
        torch.manual_seed(3)
        for gradient in gradients:
            parameter.grad = gradient.clone() if parameter is plain else gradient.to(memory_format=torch.channels_last)
            optimizer.step()
    assert not plain.equal(start)
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-6)
    assert torch.equal(mixed, plain)


@every
def test_a_parameter_that_is_a_part_of_a_tensor_leaves_the_rest_alone(kind):
    whole = torch.zeros(96, 128)
    parts = [nn.Parameter(whole[:48, :64]), nn.Parameter(whole[48:, :64])]
    steps(kind([{"params": parts[:1], "rank": 4}, {"params": parts[1:], "rank": None}]), parts, 0, 3)
    assert not whole[:, 64:].any()
    assert whole[48:, :64].all()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(100, 64, sparse=True)
    optimizer = Apollo(embedding.parameters(), rank=4)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
