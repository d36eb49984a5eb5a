"""What saves memory changes no result: steps inside the backward, state in host memory, blocks that are recomputed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from edgewright.compress.granet import GranetConfig
from edgewright.compress.integer import IntegerConfig
from edgewright.compress.lost import LostConfig
from edgewright.compress.lowrank import LowRankConfig
from edgewright.compress.sltrain import SLTrainConfig
from edgewright.compress.ternary import TernaryConfig
from edgewright.errors import RecipeError
from edgewright.memory_rules import check_offload, check_release
from edgewright.objective import ModelInputs, NextToken
from edgewright.optim.adamw import AdamWConfig
from edgewright.optim.adamw_8bit import AdamW8bitConfig
from edgewright.optim.projected_config import ApolloConfig, ApolloMiniConfig, FiraConfig, GaLoreConfig
from edgewright.optim.state import named_state
from edgewright.student import PresetStudentConfig, build_preset, recompute_blocks
from edgewright.trainer import TrainingModule, compile_model
from edgewright.update import ReleasedUpdate, Update, WholeUpdate
from edgewright.weights import hold_weights_as
from edgewright.world import Whole

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OPTIMIZERS = [
    AdamWConfig(),
    AdamW8bitConfig(),
    ApolloConfig(rank=4, update_proj_gap=2),
    ApolloMiniConfig(update_proj_gap=2),
    GaLoreConfig(rank=4, update_proj_gap=2),
    FiraConfig(rank=4, update_proj_gap=2),
]
METHODS = [
    TernaryConfig(granularity="row", warmup_ratio=0),
    IntegerConfig(),
    LowRankConfig(rank=8),
    LostConfig(rank=8, columns=0.2),
    SLTrainConfig(rank=8, density=0.1),
    GranetConfig(density=0.5, initial_density=0.5),
]


def student(*, tied: bool = True) -> Any:
    config = PresetStudentConfig(preset="llama-1m", tie_word_embeddings=tied, **SIZES)
    return build_preset(config, vocab_size=96, max_position_embeddings=32, bos=0, eos=0, seed=3)


def inputs(seed: int) -> ModelInputs:
    ids = torch.randint(96, (4, 32), generator=torch.Generator().manual_seed(seed))
    return ModelInputs(input_ids=ids, labels=ids.roll(-1, 1), position_ids=None, attention_mask=None)


def loss_of(model: Any, seed: int) -> torch.Tensor:
    loss, _ = TrainingModule(model, NextToken(), torch.float32)(inputs(seed), 1 / 128)
    return loss


def train(model: Any, update: Update, steps: int = 5) -> list[float]:
    """A few steps as the trainer takes them; their gradients' norms."""
    model.train()
    replica, norms = Whole(TrainingModule(model, NextToken(), torch.float32)), []
    for step in range(steps):
        update.begin(1e-2 / (1 + step))
        update.backward(loss_of(model, step))
        norms.append(update.norm(replica))
        update.apply()
    return norms


def same(first: Any, second: Any, *optimizers: torch.optim.Optimizer) -> None:
    """Weights, and the optimizers' states, are the same bits."""
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    one, two = (named_state(o, m) for o, m in zip(optimizers, (first, second), strict=True))
    assert one.keys() == two.keys() and one
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
def test_released_gradients_give_the_very_steps_of_whole_ones(config: Any) -> None:
    models = [student(), student()]
    whole, released = (config.build(model) for model in models)
    norms = train(models[0], WholeUpdate(whole, models[0], max_grad_norm=None))
    assert train(models[1], ReleasedUpdate(released, models[1])) == pytest.approx(norms, rel=1e-5)
    same(*models, whole, released)


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
@pytest.mark.parametrize("release", [False, True])
def test_a_state_that_rests_elsewhere_gives_the_very_steps_of_one_in_place(config: Any, release: bool) -> None:
    models = [student(), student()]
    plain, offloaded = (config.build(model) for model in models)
    train(models[0], WholeUpdate(plain, models[0], max_grad_norm=None))
    update: Update = (
        ReleasedUpdate(offloaded, models[1], offload=True)
        if release
        else WholeUpdate(offloaded, models[1], offload=True, max_grad_norm=None)
    )
    train(models[1], update)
    same(*models, plain, offloaded)


def test_the_resting_state_keeps_its_place_and_is_fetched_for_one_parameter_at_a_time() -> None:
    model = student()
    optimizer = AdamWConfig().build(model)
    update = WholeUpdate(optimizer, model, offload=True, max_grad_norm=1.0)
    train(model, update, steps=1)
    places = {key: value.data_ptr() for key, value in named_state(optimizer, model).items()}
    elsewhere: list[int] = []

    def count(*_: Any) -> None:
        now = {key: value.data_ptr() for key, value in named_state(optimizer, model).items()}
        elsewhere.append(sum(now[key] != places[key] for key in places))

    optimizer.register_step_pre_hook(count)
    train(model, update, steps=1)
    assert {key: value.data_ptr() for key, value in named_state(optimizer, model).items()} == places
    assert elsewhere == [3] * len(list(model.parameters()))  # its two moments and its count


def test_a_method_resets_a_state_that_rests_elsewhere() -> None:
    model = student()
    optimizer = AdamWConfig().build(model)
    update = WholeUpdate(optimizer, model, offload=True, max_grad_norm=None)
    train(model, update, steps=1)
    weight = model.model.layers[0].mlp.up_proj.weight
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:3] = True
    place = optimizer.state[weight]["exp_avg"].data_ptr()
    update.reset(weight, mask)
    moments = optimizer.state[weight]["exp_avg"]
    assert moments.data_ptr() == place
    assert not moments[:3].any() and moments[3:].all()
    update.reset(weight, None)
    assert weight not in optimizer.state
    update.reset_all()
    assert not optimizer.state


def live_gradients(model: Any, make: Any) -> int:
    """The most bytes of gradients that exist at once in a step."""
    parameters, most = list(model.parameters()), [0]

    def count(_: torch.Tensor) -> None:
        most[0] = max(most[0], sum(4 * p.grad.numel() for p in parameters if p.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)
    train(model, make(AdamWConfig().build(model), model), steps=2)
    return most[0]


def test_released_gradients_never_all_exist() -> None:
    sizes = [4 * p.numel() for p in student(tied=False).parameters()]
    assert live_gradients(student(tied=False), lambda o, m: WholeUpdate(o, m, max_grad_norm=None)) == sum(sizes)
    assert live_gradients(student(tied=False), ReleasedUpdate) == max(sizes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_stepped_from_a_gradient_that_is_not_finite_on(value: float) -> None:
    """The first block's gradients come after the second's, which are good, and are stepped: the caller rolls back."""
    model = student()
    update = ReleasedUpdate(AdamWConfig().build(model), model)
    train(model, update, steps=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.model.layers[0].mlp.down_proj.weight.register_hook(
        lambda gradient: gradient.index_fill(0, torch.tensor([1]), value)
    )
    (norm,) = train(model, update, steps=1)
    assert not math.isfinite(norm)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "model.layers.1.mlp.down_proj.weight" in changed
    assert not any("layers.0" in name or "embed" in name for name in changed)
    assert all(p.isfinite().all() and p.grad is None for p in model.parameters())


def test_nothing_at_all_is_stepped_where_the_loss_is_not_finite() -> None:
    model = student()
    update = ReleasedUpdate(AdamWConfig().build(model), model)
    before = [p.detach().clone() for p in model.parameters()]
    update.begin(1e-2)
    update.backward(loss_of(model, 0) + math.inf)  # its gradients are finite
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_clipping_is_to_the_limit_or_not_at_all() -> None:
    gradients = []
    for limit in (1e-3, 1e9, None):
        model = student()
        update = WholeUpdate(AdamWConfig().build(model), model, max_grad_norm=limit)
        update.begin(1e-2)
        update.backward(loss_of(model, 0))
        norm = update.norm(Whole(TrainingModule(model, NextToken(), torch.float32)))
        assert norm > 0.1
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm().item() == pytest.approx(1e-3, rel=1e-4)
    assert torch.equal(gradients[1], gradients[2])


def prepared(method: Any) -> Any:
    model = student()
    if method is not None:
        torch.manual_seed(5)
        method.build().prepare(model)
    return model.train()


def saved_bytes(model: Any) -> int:
    """Bytes that autograd keeps between forward and backward, each piece of memory once, but for the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    pieces: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, 0)
    loss.backward()
    return sum(pieces.values())


@pytest.mark.parametrize("method", [None, *METHODS], ids=lambda method: "plain" if method is None else method.type)
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(method: Any) -> None:
    plain, recomputed = prepared(method), prepared(method)
    recompute_blocks(recomputed)
    kept, less = saved_bytes(plain), saved_bytes(recomputed)
    assert less < 0.5 * kept
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name


def test_recomputed_blocks_with_released_gradients() -> None:
    models = [student(), student()]
    recompute_blocks(models[1])
    whole, released = (AdamWConfig().build(model) for model in models)
    train(models[0], WholeUpdate(whole, models[0], max_grad_norm=None))
    train(models[1], ReleasedUpdate(released, models[1]))
    same(*models, whole, released)


def test_a_model_without_blocks_is_refused() -> None:
    model = student()
    model.model.layers = nn.ModuleList()
    with pytest.raises(RecipeError, match="EW-750"):
        recompute_blocks(model)


def test_release_with_a_method_that_changes_gradients_is_refused() -> None:
    check_release([TernaryConfig().build()])
    with pytest.raises(RecipeError, match="granet.*EW-750"):
        check_release([TernaryConfig().build(), GranetConfig(density=0.5).build()])


def test_a_cpu_has_nowhere_to_offload_to() -> None:
    check_offload("cuda")
    with pytest.raises(RecipeError, match="EW-750"):
        check_offload("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("by_block", [False, True])
def test_compiled_recomputed_blocks_have_the_same_gradients(by_block: bool) -> None:
    """Compiled whole, recomputed inside the graph; block by block, each with its own."""
    plain, compiled = prepared(METHODS[0]), prepared(METHODS[0])
    recompute_blocks(compiled)
    compile_model(compiled, by_block=by_block)
    loss_of(plain, 0).backward()
    loss_of(compiled, 0).backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("stored", ["bf16", "int8"])
def test_narrow_weights_with_everything_that_saves_memory(stored: str) -> None:
    """Rounding is drawn in the order of the backward, so not the bits of whole gradients; the same ones every time."""
    models = [student(), student()]
    states = []
    for model in models:
        hold_weights_as(model, stored)
        recompute_blocks(model)
        torch.manual_seed(11)
        optimizer = ApolloConfig(rank=4, update_proj_gap=2).build(model)
        before = loss_of(model, 0).item()
        train(model, ReleasedUpdate(optimizer, model, offload=True))
        assert loss_of(model, 0).item() < before - 0.05
        assert all(parameter.grad is None for parameter in model.parameters())
        states.append({name: tensor.float() for name, tensor in model.state_dict().items()})
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
