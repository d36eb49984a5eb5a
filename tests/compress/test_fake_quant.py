"""Training through rounding: once a step, never stale, at the cost of dense training, in every precision."""

import copy

import pytest
import torch
from methods import Loop, difference, logits, prepared, small_model, tokens
from torch import nn

from edgewright.compress.integer import IntegerConfig
from edgewright.compress.quantizers import QUANTIZERS
from edgewright.compress.ternary import TernaryConfig
from edgewright.compress.ternary_linear import TernaryLinear

CONFIGS = {
    **{f"ternary-{name}": TernaryConfig(quantizer=name) for name in QUANTIZERS},
    "integer": IntegerConfig(),
}
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def layers_of(model):
    return [module for module in model.modules() if type(module).__name__ in ("TernaryLinear", "IntegerLinear")]


@every
def test_lambda_zero_is_the_dense_model_bit_for_bit(config):
    model, _ = prepared(config)
    for layer in layers_of(model):
        layer.strength = 0.0
    assert torch.equal(logits(model), logits(small_model()))


@every
def test_lambda_one_is_the_finished_model_bit_for_bit(config):
    model, method = prepared(config)
    Loop(model, method).run(3)
    plain, lattice = method.finish(model)
    assert torch.equal(logits(plain), logits(model))
    for name, layer in method._layers.items():
        assert torch.equal(torch.from_numpy(lattice[f"{name}.weight"].dequantize()), layer.effective_weight().detach())


def test_the_warm_up_ends_at_the_lattice_and_finish_is_there_from_the_start():
    model, method = prepared(TernaryConfig(quantizer="tequila", warmup_ratio=0.5))
    loop = Loop(model, method, total_steps=8)
    seen = []
    for _ in range(6):
        loop.run(1)
        seen.append(layers_of(model)[0].strength)
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    early, method = prepared(TernaryConfig(quantizer="tequila", warmup_ratio=0.9))
    Loop(early, method).run(1)
    plain, lattice = method.finish(early)
    name = "model.layers.0.mlp.up_proj"
    assert (plain.get_submodule(name).weight.detach().numpy() == lattice[f"{name}.weight"].dequantize()).all()
    assert layers_of(early)[0].strength < 1, "finish leaves the trained form alone"


@every
def test_weights_are_rounded_once_a_step(config, monkeypatch):
    model, method = prepared(config)
    layer = layers_of(model)[0]
    calls = []
    original = type(layer).round_into
    monkeypatch.setattr(type(layer), "round_into", lambda self, codes: calls.append(self) or original(self, codes))
    loop = Loop(model, method)
    method.before_step(loop.context())  # the first step's strength and residual are new
    for micro_batches in (1, 3):
        calls.clear()
        method.before_step(loop.context())
        for _ in range(micro_batches):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert not calls
        loop.optimizer.step()
        method.after_step(loop.context())
        loop.step += 1
        model(input_ids=tokens())
        assert len([one for one in calls if one is layer]) == 1


@every
def test_a_step_can_be_simulated_without_memory(config):
    """No rule looks at values to decide what to do, which a GPU would have to wait for, too."""
    with torch.device("meta"):
        model = small_model()
    method = config.build()
    method.prepare(model)
    loop = Loop(model, method)
    method.before_step(loop.context())
    model(input_ids=tokens().to("meta"), attention_mask=None).logits.sum().backward()
    method.after_step(loop.context())
    assert layers_of(model)[0].weight.grad.is_meta


def test_a_weight_that_changes_behind_its_back_is_seen():
    layer = TernaryLinear(nn.Linear(256, 8))
    x = torch.randn(2, 256)
    before = layer(x).detach().clone()
    with torch.no_grad():
        layer.weight.neg_()
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - before)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.neg_()
    torch.testing.assert_close(twin(x), before)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_a_change_that_torch_does_not_count_is_rounded_after_the_step():
    model, method = prepared(TernaryConfig())
    layer = layers_of(model)[0]
    before = layer.effective_weight().detach().clone()
    layer.weight.data.neg_()
    method.after_step(Loop(model, method).context())
    assert torch.equal(layer.effective_weight().detach(), -before)


@every
def test_nothing_more_is_saved_for_the_backward_than_in_dense_training(config):
    def saved(model) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    model, _ = prepared(config)
    assert saved(model) == saved(small_model())


@every
def test_bf16_autocast_computes_with_the_lattice_and_leaves_gradients_in_float32(config):
    model, method = prepared(config)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.parameters())
    plain, _ = method.finish(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(plain), logits(model))


@every
def test_micro_batches_add_up(config):
    whole, _ = prepared(config)
    halves = copy.deepcopy(whole)
    batch = tokens(rows=4)
    whole(input_ids=batch, labels=batch).loss.backward()
    for half in batch.split(2):
        (halves(input_ids=half, labels=half).loss / 2).backward()
    for ours, theirs in zip(halves.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # in torch's own compiler
@pytest.mark.parametrize(
    ("name", "part", "backend"),
    [
        *(
            (f"ternary-{name}", "model.layers.0.mlp", "aot_eager")
            for name in ("absmean", "seq_2bit", "sherry", "tequila")
        ),
        pytest.param("ternary-tequila", "model", "inductor", marks=pytest.mark.slow),
        pytest.param("ternary-seq_2bit", "model", "inductor", marks=pytest.mark.slow),
        pytest.param("integer", "model", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_is_the_same(name, part, backend):
    """A compiled forward cannot see that a weight has changed: the method's hooks must tell it."""
    plain, compiled = prepared(CONFIGS[name]), prepared(CONFIGS[name])
    compiled[0].get_submodule(part).compile(dynamic=False, backend=backend)
    for model, method in (plain, compiled):
        Loop(model, method).run(4)
    ours, theirs = compiled[0].state_dict(), plain[0].state_dict()
    assert max(difference(ours[name], theirs[name]) for name in ours) < 2e-2
    assert difference(logits(compiled[0]), logits(plain[0])) < 2e-2
    torch.compiler.reset()
